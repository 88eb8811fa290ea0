"""Answers to questions, several at once, as text.

Invariant: an answer is the same alone and beside others, up to the rounding of logits; a question
whose answer has ended costs nothing more.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from forescale.errors import UserError
from forescale.inference.answering import Question
from forescale.inference.spelling import Speller, Stops
from forescale.models.decoding.batch import Batch
from forescale.models.decoding.choice import Choice
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


class Writing:
    """Answers of one model that are written at once, a token each a step. Others may be added
    between steps; one that has its `reason`, also by the caller's hand, leaves."""

    def __init__(self, model: nn.Module):
        self.model = model.eval()
        self._new: list[Answer] = []
        self._batches: list[tuple[Batch, list[Answer]]] = []  # the first one is that which grows

    @property
    def answers(self) -> list[Answer]:
        """Those that are being written."""
        return [*self._new, *(answer for _, answers in self._batches for answer in answers)]

    def add(self, answers: Sequence[Answer]) -> None:
        """Write these too, from the next step on."""
        self._new += answers

    def step(self) -> list[tuple[Answer, str]]:
        """Write a token of each answer; return the pieces of text that are certain now, and each
        answer that ends now with its last piece. Raises UserError if logits are not finite: nothing
        is left to write then."""
        batches, self._batches = [*self._batches, *self._begun()], []
        found: list[tuple[Answer, str]] = []
        try:
            for batch, answers in batches:
                found += self._stepped(batch, answers)
        except FloatingPointError as e:
            self._batches = []
            todo = "use an earlier checkpoint, from before the training diverged"
            raise UserError("the model", f"can't write text ({e})", todo) from e
        return found

    def _begun(self) -> list[tuple[Batch, list[Answer]]]:
        """Return the new answers in batches of which nothing is read."""
        new = [answer for answer in self._new if answer.reason is None]
        self._new = []
        groups = [[answer] for answer in new]
        if isinstance(self.model, Transformer):  # others take no padding
            longer = [a for a in new if len(a.question.start) > a.question.max_context]
            groups = [longer, [answer for answer in new if answer not in longer]]
        return [(_batch_of(self.model, group), group) for group in groups if group]

    def _stepped(self, batch: Batch, answers: list[Answer]) -> list[tuple[Answer, str]]:
        """Write a token of each answer of a batch; those that go on are kept."""
        found: list[tuple[Answer, str]] = []
        ids = batch.step()
        assert ids is not None, "a decoder that may read no more was left behind before"
        for answer, token in zip(answers, ids[:, 0].tolist(), strict=True):
            if answer.reason is None:  # else nobody waits for it any more
                piece = answer.add(token)
                if piece or answer.reason:
                    found.append((answer, piece))
        beyond = [i for i in batch.beyond() if answers[i].reason is None]
        if batch.has_source:
            found += [(answers[i], answers[i].close("length")) for i in beyond]
        elif beyond:
            apart = [answers[i] for i in beyond]
            self._batches.append((batch.apart(beyond), apart))
        still = [i for i, a in enumerate(answers) if a.reason is None and i not in beyond]
        if still:
            if len(still) < len(answers):
                batch.keep(still)
            self._keep(batch, [answers[i] for i in still])
        return found

    def _keep(self, batch: Batch, answers: list[Answer]) -> None:
        """Let a batch go on, in another one if it can."""
        for other, more in self._batches:
            if other.can_join(batch):
                other.join(batch)
                more += answers
                return
        self._batches.append((batch, answers))


def _batch_of(model: nn.Module, answers: Sequence[Answer]) -> Batch:
    """Return the batch of these answers, of which nothing is read."""
    device = next(model.parameters()).device
    # On any device the same.
    generators = [torch.Generator().manual_seed(answer.seed) for answer in answers]
    choice = Choice([answer.wanted.sampler for answer in answers], generators)
    questions = [answer.question for answer in answers]
    sources = [question.source for question in questions if question.source is not None]
    source, shown = _padded(sources, device) if sources else (None, None)
    tokens, real = _padded([question.start for question in questions], device)
    most = max(answer.most for answer in answers)
    context = questions[0].max_context
    return Batch(model, tokens, choice, context, real, source, shown, most)


def _padded(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return rows of ids, (B, L), padded on the left, and which are real; None: all."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    if min(map(len, rows)) == longest:
        return tokens, None
    real = [[False] * (longest - len(row)) + [True] * len(row) for row in rows]
    return tokens, torch.tensor(real, device=device)


def write(model: nn.Module, answers: Sequence[Answer]) -> Iterator[tuple[Answer, str]]:
    """Write these answers at once, all of one model; yield each piece of their texts, and each
    answer with its last piece when it ends. Errors as of `Writing.step`."""
    writing = Writing(model)
    writing.add(answers)
    while writing.answers:
        yield from writing.step()


def written(model: nn.Module, answers: Sequence[Answer], at_once: int) -> Iterator[Answer]:
    """Yield the answers in order, each complete; at most so many are written at once, and the next
    begins when one ends. Errors as of `Writing.step`."""
    writing, waiting = Writing(model), deque(answers)
    for answer in answers:
        while answer.reason is None:
            while waiting and len(writing.answers) < at_once:
                writing.add([waiting.popleft()])
            writing.step()
        yield answer
