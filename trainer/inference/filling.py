"""Answers of a model of objective.kind=seq2seq: the spans that a text lacks.

Sentinels are written as T5's tokenizer has them, <extra_id_0>, <extra_id_1>, ..., in a text and in
its answer. Invariant: what the model reads, and where it begins to write, are those of training,
see data/objectives/spans.py.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from torch import nn

from forescale.data.objectives.spans import Spans
from forescale.errors import UserError
from forescale.inference.sampling import sampled, text_ids
from forescale.inference.view import RunView
from forescale.models.config import ModelConfig
from forescale.run.feed import objective_of

_SENTINEL = re.compile("<extra_id_([0-9]{1,9})>")


@dataclass(frozen=True)
class Question:
    """A text that lacks spans, as a run's model reads it.

    source: its ids, with a sentinel for each span; num_spans: of these; has_encoder: the source is
    the encoder's, and not the beginning of the decoder's row.
    """

    source: list[int]
    num_spans: int
    spans: Spans
    has_encoder: bool

    @classmethod
    def of(cls, view: RunView, text: str) -> "Question":
        """Return `text` as the model of a run with objective.kind=seq2seq reads it.

        Raises UserError if its sentinels are not such as in training, it has more tokens than a
        source there, or the model is a class of the user's own.
        """
        model, size = view.config.model, view.identity["dataset"]["vocab_size"]
        if not isinstance(model, ModelConfig):
            what = f"is your own class {model.target}, of which only you know how it reads a source"
            raise UserError("model._target_", what, f"call forescale.open_run({view.name!r})")
        spans = objective_of(view.config, size)
        assert isinstance(spans, Spans)
        # Text and numbers of sentinels take turns.
        text_or_number = _SENTINEL.split(text)
        numbers, source = [int(n) for n in text_or_number[1::2]], list[int]()
        _check_sentinels(numbers, spans.extra_ids - 1)
        for i, part in enumerate(text_or_number):
            source += [size + int(part)] if i % 2 else text_ids(view.tokenizer, part)
        if len(source) > spans.split:
            what = f"has {len(source):,} tokens, and in training a source has {spans.split:,}"
            raise UserError("prompt", what, "give less text")
        return cls(source, len(numbers), spans, model.has_encoder)

    @property
    def start(self) -> int:
        """The id with which each target begins: the first sentinel."""
        return self.spans.vocab_size

    @property
    def end(self) -> int:
        """The id that ends the answer: the sentinel after those of the source."""
        return self.start + self.num_spans

    @property
    def most(self) -> int:
        """The most tokens that training has after the start of a target, its end among them."""
        return int(self.spans.num_targets(np.array(self.spans.window_length + 1)))

    @property
    def names(self) -> dict[int, str]:
        """How each sentinel is written, by its id."""
        return {self.start + i: f"<extra_id_{i}>" for i in range(self.spans.extra_ids)}

    def answered(
        self, model: nn.Module, num_tokens: int, *, temperature: float, top_k: int | None, seed: int
    ) -> Iterator[int]:
        """Yield num_tokens ids that the model samples after the start of the target, at most
        `most`. Errors as of `sampled`."""
        return sampled(
            model,
            [self.start] if self.has_encoder else [*self.source, self.start],
            min(num_tokens, self.most),
            temperature=temperature,
            top_k=top_k,
            seed=seed,
            max_context=self.spans.columns,
            source=self.source if self.has_encoder else None,
        )


def _check_sentinels(numbers: list[int], most: int) -> None:
    """Raise UserError if the sentinels of a text are not the first ones in order, or too many."""
    if not numbers:
        what = "has no <extra_id_0>, the place of a span that the model fills in"
        raise UserError("prompt", what, "write it into the text")
    if numbers != [*range(len(numbers))]:
        i = next(i for i, n in enumerate(numbers) if n != i)
        what = f"has <extra_id_{numbers[i]}> where the next one is <extra_id_{i}>"
        raise UserError("prompt", what, "number them from 0 on, in order")
    if len(numbers) > most:
        what = f"has {len(numbers):,} spans to fill in, and in training a text has {most:,}"
        raise UserError("prompt", what, "give fewer")
