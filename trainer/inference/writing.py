"""Answers to questions, several at once, as text.

Invariant: an answer is the same alone and beside others, up to the rounding of logits; a question
whose answer has ended costs nothing more.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer
from torch import nn

from forescale.inference.answering import Question
from forescale.inference.sampling import rows_sampled
from forescale.inference.spelling import Speller, Stops
from forescale.models.decoding.sampler import Sampler
from forescale.models.transformer import Transformer

Reason = Literal["end", "stop", "length"]


@dataclass(frozen=True)
class Wanted:
    """What is wanted of an answer: at most num_tokens, sampled so, up to the first of some stop
    texts, which is left out."""

    num_tokens: int
    sampler: Sampler
    stops: tuple[str, ...] = ()


class Answer:
    """The answer to a question, as far as it is written.

    text: without what the question shows before it; num_tokens: those of the text, and of the stop
    text that ended it; reason: why it ended, by its end (see Question), a stop text or the number
    of tokens; None: it hasn't.
    """

    def __init__(self, tokenizer: Tokenizer, question: Question, wanted: Wanted, seed: int):
        self.question, self.wanted, self.seed = question, wanted, seed
        self.most = min(wanted.num_tokens, question.most or wanted.num_tokens)
        self.text, self.num_tokens = "", 0
        self.reason: Reason | None = None
        self._speller = Speller(tokenizer, question.before, question.names)
        self._stops = Stops(wanted.stops)

    def add(self, token: int) -> str:
        """Take the next id; return the text that is certain now."""
        if token in (self.question.end, self.question.turn_end):
            return self.close("end")
        self.num_tokens += 1
        piece = self._stops.add(self._speller.add(token))
        self.text += piece
        if self._stops.found is not None:
            self.reason = "stop"
        elif self.num_tokens >= self.most:
            return piece + self.close("length")
        return piece

    def close(self, reason: Reason) -> str:
        """End the answer; return the rest of its text."""
        piece = self._stops.add(self._speller.rest())
        self.reason = reason if self._stops.found is None else "stop"
        piece += self._stops.rest()
        self.text += piece
        return piece


def write(model: nn.Module, answers: Sequence[Answer]) -> Iterator[tuple[Answer, str]]:
    """Write these answers at once, all of one model and one Sampler; yield each piece of their
    texts, and each answer with its last piece when it ends.

    Raises UserError if the model's logits are not finite.
    """
    going, first = list(answers), answers[0]
    rows = rows_sampled(
        model,
        [answer.question.start for answer in going],
        max(answer.most for answer in going),
        first.wanted.sampler,
        seeds=[answer.seed for answer in going],
        max_context=first.question.max_context,
        sources=None
        if first.question.source is None
        else [answer.question.source or [] for answer in going],
    )
    kept: list[int] | None = None
    with closing(rows):
        while going:
            try:
                ids = rows.send(kept)
            except StopIteration:  # the decoder may read no more
                for answer in going:
                    yield answer, answer.close("length")
                return
            for answer, token in zip(going, ids, strict=True):
                piece = answer.add(token)
                if piece or answer.reason:
                    yield answer, piece
            still = [i for i, answer in enumerate(going) if answer.reason is None]
            kept = still if len(still) < len(going) else None
            going = [going[i] for i in still]


def written(model: nn.Module, answers: Sequence[Answer], at_once: int) -> Iterator[Answer]:
    """Yield the answers in order, each complete; at most so many are written at once. Errors as of
    `write`."""
    if not isinstance(model, Transformer):  # it takes no padding
        at_once = 1
    for first in range(0, len(answers), at_once):
        batch = answers[first : first + at_once]
        for _ in write(model, batch):
            pass
        yield from batch
