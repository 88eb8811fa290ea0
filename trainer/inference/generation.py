"""Answers to questions as text: several at once, piece by piece, up to stop texts.

Invariant: an answer is the same alone and beside others, up to the rounding of logits, and one that
has ended costs nothing more. No piece ends within a character, or holds the beginning of a stop
text.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from forescale.ground.errors import UserError
from forescale.inference.logprobs import Likeliest, TokenScore, of_prompt, scored
from forescale.inference.question import Question
from forescale.models.decoding.batch import Batch, Choice, takes_padding
from forescale.models.decoding.sampler import Sampler

_BROKEN = "\N{REPLACEMENT CHARACTER}"
_NAMELESS: Mapping[int, str] = {}
_CONTEXT = 4  # previous tokens that are decoded together with new ones
Reason = Literal["end", "stop", "length"]


@dataclass(frozen=True)
class GenerationConfig:
    """How an answer is generated: at most num_tokens, by this sampler, up to the first of the stop
    texts, which is left out. logprobs: keep the log probabilities of its tokens, with so many of
    the likeliest of each place; None: keep none; echo: the answer begins with its prompt."""

    num_tokens: int
    sampler: Sampler
    stops: tuple[str, ...] = ()
    logprobs: int | None = None
    echo: bool = False


class Speller:
    """The text of ids that come one by one, after those in `before`.

    The pieces add up to the text of all tokens. None ends within a character: if its bytes are
    spread over several tokens, it comes with the last of them. names: the texts of ids that the
    tokenizer doesn't know; a character ends before them.
    """

    # Decoding depends on previous tokens (SentencePiece drops a leading space), so each piece is
    # the text of the last tokens with the new ones, minus their text without.

    def __init__(
        self, tokenizer: Tokenizer, before: Sequence[int], names: Mapping[int, str] = _NAMELESS
    ):
        self._tokenizer, self._names = tokenizer, names
        self._pending = list(before)
        self._text = tokenizer.decode(self._pending)

    def add(self, token: int) -> str:
        """Return the characters that this id completes."""
        if token in self._names:
            return self.rest() + self._names[token]
        self._pending.append(token)
        text = self._tokenizer.decode(self._pending)
        if text.endswith(_BROKEN):
            return ""
        new = text[len(self._text) :]
        self._pending = self._pending[-_CONTEXT:]
        self._text = self._tokenizer.decode(self._pending)
        return new

    def rest(self) -> str:
        """Return the pending text, which no later id can complete."""
        text = self._tokenizer.decode(self._pending)
        new, self._text = text[len(self._text) :], text
        return new


def pieces(
    tokenizer: Tokenizer,
    before: Sequence[int],
    ids: Iterable[int],
    names: Mapping[int, str] = _NAMELESS,
) -> Iterator[str]:
    """Yield the text of `ids`, which follow `before`, in pieces of complete characters."""
    speller = Speller(tokenizer, before, names)
    for token in ids:
        yield speller.add(token)
    yield speller.rest()


class StopTexts:
    """A text that comes in pieces, up to the first of some stop texts, none of them empty.

    match: the stop text that ended it; None: none so far. Of several, the one that is complete
    first, wherever pieces begin.
    """

    def __init__(self, texts: Sequence[str]):
        self._texts, self._pending = texts, ""
        self.match: str | None = None

    def add(self, piece: str) -> str:
        """Return the text that is certain now: no stop text begins in it."""
        if not self._texts or self.match is not None:
            return "" if self.match is not None else piece
        self._pending += piece
        starts = {text: self._pending.find(text) for text in self._texts}
        ends = [(start + len(text), start, text) for text, start in starts.items() if start >= 0]
        if ends:
            _, start, self.match = min(ends)
            return self._pending[:start]
        size = len(self._pending) - max(map(self._overlap, self._texts))
        certain, self._pending = self._pending[:size], self._pending[size:]
        return certain

    def _overlap(self, text: str) -> int:
        """Return how many characters at the end may begin this stop text."""
        sizes = range(min(len(text) - 1, len(self._pending)), 0, -1)
        return next((size for size in sizes if self._pending.endswith(text[:size])), 0)

    def rest(self) -> str:
        """Return the pending text, where the text ends without a stop text."""
        pending, self._pending = self._pending, ""
        return "" if self.match is not None else pending


class Answer:
    """The answer to a question, as far as it is written.

    text: without what the question shows before it; num_tokens: those of the text, and of the stop
    text that ended it; reason: why it ended, by its end (see Question), a stop text or the number
    of tokens; None: it hasn't; scores: of all tokens so far, its end among them, if they are
    wanted.
    """

    def __init__(
        self, tokenizer: Tokenizer, question: Question, config: GenerationConfig, seed: int
    ):
        self.question, self.config, self.seed = question, config, seed
        self.max_tokens = min(config.num_tokens, question.max_tokens or config.num_tokens)
        self.text, self.num_tokens = "", 0
        self.reason: Reason | None = None
        self.scores: list[TokenScore] = []
        self._tokenizer = tokenizer
        self._speller = Speller(tokenizer, question.previous, question.names)
        self._stops = StopTexts(config.stops)

    def begin(self, model: nn.Module) -> str:
        """Return what comes before the first new token: the prompt, if it is to be echoed."""
        if not self.config.echo:
            return ""
        question, count = self.question, self.config.logprobs
        if count is not None:
            ids = question.start
            rows = [(None, ()), *of_prompt(model, ids, count)]
            offset = 0
            parts = pieces(self._tokenizer, (), ids, question.names)
            for token, (logprob, likeliest), part in zip(ids, rows, parts, strict=False):
                self._score(token, offset, logprob, likeliest)
                offset += len(part)
        self.text = question.echo
        if self.max_tokens == 0:
            self.reason = "length"
        return self.text

    def score(self, token: int, logits_V: Tensor) -> None:
        """Keep the log probability of the next id, if it is wanted."""
        if self.config.logprobs is not None:
            ((logprob, likeliest),) = scored(logits_V[None], [token], self.config.logprobs)
            self._score(token, len(self.text), logprob, likeliest)

    def _score(self, token: int, offset: int, logprob: float | None, likeliest: Likeliest) -> None:
        texts = dict[str, float]()
        for other, value in likeliest:  # two may have one text; the likelier one has it
            texts.setdefault(self._text_of(other), value)
        self.scores.append(TokenScore(self._text_of(token), offset, logprob, (*texts.items(),)))

    def _text_of(self, token: int) -> str:
        """Return the text of an id alone; of a part of a character, its name in the vocabulary."""
        if token in self.question.names:
            return self.question.names[token]
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        return self._tokenizer.id_to_token(token) or text if _BROKEN in text or not text else text

    def add(self, token: int) -> str:
        """Take the next id; return the text that is certain now."""
        if token == self.question.end or token in self.question.other_ends:
            return self.close("end")
        self.num_tokens += 1
        piece = self._stops.add(self._speller.add(token))
        self.text += piece
        if self._stops.match is not None:
            self.reason = "stop"
        elif self.num_tokens >= self.max_tokens:
            return piece + self.close("length")
        return piece

    def close(self, reason: Reason) -> str:
        """End the answer; return the rest of its text."""
        piece = self._stops.add(self._speller.rest())
        self.reason = reason if self._stops.match is None else "stop"
        piece += self._stops.rest()
        self.text += piece
        return piece


class ContinuousBatch:
    """Answers of one model that are decoded at once, a token each a step. Others may be added
    between steps; one that has a `reason`, which the caller may set, leaves."""

    def __init__(self, model: nn.Module):
        self.model = model.eval()
        self._new: list[Answer] = []
        # A new one joins the first that it can.
        self._batches: list[tuple[Batch, list[Answer]]] = []

    @property
    def answers(self) -> list[Answer]:
        """Those that are being decoded."""
        return [*self._new, *(answer for _, answers in self._batches for answer in answers)]

    def add(self, answers: Sequence[Answer]) -> None:
        """Decode these too, from the next step on."""
        self._new += answers

    def step(self) -> list[tuple[Answer, str]]:
        """Decode a token of each answer; return the pieces of text that are certain now, and each
        answer that ends now with its last piece. Raises UserError if logits are not finite; the
        batch is empty then."""
        try:
            return self._pieces()
        except FloatingPointError as e:
            self._batches, self._new = [], []
            todo = "use an earlier checkpoint, from before the training diverged"
            raise UserError("the model", f"can't write text ({e})", todo) from e

    def _pieces(self) -> list[tuple[Answer, str]]:
        new, pieces = [], list[tuple[Answer, str]]()
        for answer in [answer for answer in self._new if answer.reason is None]:
            if text := answer.begin(self.model):
                pieces.append((answer, text))
            new += [answer] if answer.reason is None else []
        groups = [[answer] for answer in new]
        if takes_padding(self.model):
            longer = [a for a in new if len(a.question.start) > a.question.max_context]
            groups = [longer, [answer for answer in new if answer not in longer]]
        new_batches = [(_batch_of(self.model, group), group) for group in groups if group]
        batches, self._batches, self._new = [*self._batches, *new_batches], [], []
        for batch, answers in batches:
            pieces += self._step_of(batch, answers)
        return pieces

    def _step_of(self, batch: Batch, answers: list[Answer]) -> list[tuple[Answer, str]]:
        """Decode a token of each answer of a batch; keep those that are not complete."""
        pieces: list[tuple[Answer, str]] = []
        ids = batch.step()
        assert ids is not None, "a decoder that may read no more was left behind before"
        assert batch.logits is not None
        for i, (answer, token) in enumerate(zip(answers, ids[:, 0].tolist(), strict=True)):
            if answer.reason is None:  # else it was cancelled
                answer.score(token, batch.logits[i])
                piece = answer.add(token)
                if piece or answer.reason:
                    pieces.append((answer, piece))
        beyond = [i for i in batch.beyond() if answers[i].reason is None]
        if batch.has_source:
            pieces += [(answers[i], answers[i].close("length")) for i in beyond]
        elif beyond:
            apart = [answers[i] for i in beyond]
            self._batches.append((batch.apart(beyond), apart))
        unfinished = [i for i, a in enumerate(answers) if a.reason is None and i not in beyond]
        if unfinished:
            if len(unfinished) < len(answers):
                batch.keep(unfinished)
            left = [answers[i] for i in unfinished]
            for other, others in self._batches:
                if other.can_join(batch):
                    other.join(batch)
                    others += left
                    break
            else:
                self._batches.append((batch, left))
        return pieces


def _batch_of(model: nn.Module, answers: Sequence[Answer]) -> Batch:
    """Return a batch of these answers."""
    device = next(model.parameters()).device
    # On the CPU: the same numbers on any device.
    generators = [torch.Generator().manual_seed(answer.seed) for answer in answers]
    choice = Choice([answer.config.sampler for answer in answers], generators)
    questions = [answer.question for answer in answers]
    sources = [question.source for question in questions if question.source is not None]
    source, source_mask = _padded(sources, device) if sources else (None, None)
    tokens, mask = _padded([question.start for question in questions], device)
    max_tokens = max(answer.max_tokens for answer in answers)
    context = questions[0].max_context
    return Batch(model, tokens, choice, context, mask, source, source_mask, max_tokens)


def _padded(rows: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return rows of ids, (B, L), padded on the left, and the mask of real ids; None: all."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
    if min(map(len, rows)) == longest:
        return tokens, None
    mask = [[False] * (longest - len(row)) + [True] * len(row) for row in rows]
    return tokens, torch.tensor(mask, device=device)


def stream(model: nn.Module, answers: Sequence[Answer]) -> Iterator[tuple[Answer, str]]:
    """Decode these answers of one model at once; yield each piece of their texts, and each answer
    with its last piece when it ends. Errors as of `ContinuousBatch.step`."""
    decoding = ContinuousBatch(model)
    decoding.add(answers)
    while decoding.answers:
        yield from decoding.step()


def complete(model: nn.Module, answers: Sequence[Answer], batch: int) -> Iterator[Answer]:
    """Yield the answers in order, each complete; at most `batch` are decoded at once, and the next
    one begins when one ends. Errors as of `ContinuousBatch.step`."""
    decoding, waiting = ContinuousBatch(model), deque(answers)
    for answer in answers:
        while answer.reason is None:
            while waiting and len(decoding.answers) < batch:
                decoding.add([waiting.popleft()])
            decoding.step()
        yield answer
