"""A batch of rows that a model continues by one token a step. Rows join and leave between steps.

With a cache the model reads each token once. When a batch has more columns than the context of the
model, the oldest tokens leave it and the positions of all others change: from then on each step
runs the model on the whole context. A model class of the user has no cache. An encoder-decoder
reads a source once, and its decoder continues the rows.

Invariant: a row of a batch, padded on the left, is continued as it would be alone.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.decoding.cache import Cache
from forescale.models.decoding.sampler import Sampler
from forescale.models.transformer import Transformer

Draw = torch.Generator | Sequence[torch.Generator] | None


def generate(
    model: nn.Module,
    tokens_BL: Tensor,
    num_tokens: int,
    sampler: Sampler = Sampler(),  # noqa: B008 - it is frozen
    generator: Draw = None,
    max_context: int | None = None,
    padding_mask_BL: Tensor | None = None,
    source_BS: Tensor | None = None,
    source_mask_BS: Tensor | None = None,
) -> Tensor:
    """Continue each row by num_tokens sampled tokens: (B, L) int64 -> (B, L + num_tokens). The rows
    of an encoder-decoder end at max_context tokens.

    Args: `model` maps tokens (B, L) to logits (B, L, V); `generator` makes it repeatable: one for
    all rows, or one for each; `max_context`: maximum number of tokens that the model reads
    (default: its max_sequence_length, if any); padding_mask (B, L): False at padding, on the left;
    source (B, S): the input of an encoder; source_mask (B, S): False at its padding, on either
    side. The model runs in eval mode; its mode is restored at the end. Raises ValueError for an
    empty prompt, for a missing mask or source, and for one that the model doesn't take;
    FloatingPointError if the logits give no probabilities, as with NaN.
    """
    was_training = model.training
    model.eval()
    try:
        choice = Choice([sampler] * len(tokens_BL), generator)
        inputs = padding_mask_BL, source_BS, source_mask_BS, num_tokens
        batch = Batch(model, tokens_BL, choice, max_context, *inputs)
        for _ in range(num_tokens):
            if batch.step() is None:
                break
        return batch.tokens.clone()  # outside of inference mode: a loss may read them
    finally:
        model.train(was_training)


class Choice:
    """How rows choose their tokens: each by its own rules and its own random numbers.

    samplers: of each row; generator: one for all rows, or one for each; None: torch's own.
    Invariant: what a row draws depends on no other row, where each has a generator.
    """

    def __init__(self, samplers: Sequence[Sampler], generator: Draw = None):
        self.samplers, self.generator = [*samplers], generator
        self._held: Tensor | None = None  # (B, V): which tokens a row holds; None: not counted yet
        self._groups = _grouped(self.samplers)

    def next_tokens(self, logits_BV: Tensor, tokens_BS: Tensor, real_BS: Tensor | None) -> Tensor:
        """Return the next token of each row, (B, 1) int64. tokens: of the rows; real: False at
        padding."""
        held_BV = drawn_B1 = None
        if any(sampler.reads_row for sampler in self._groups):
            if self._held is None:
                real = torch.ones_like(tokens_BS) if real_BS is None else real_BS.long()
                counts = torch.zeros_like(logits_BV, dtype=torch.long)
                self._held = counts.scatter_add_(1, tokens_BS, real) > 0
            held_BV = self._held
        if any(sampler.draws for sampler in self._groups):
            drawn_B1 = self._drawn(logits_BV)
        if len(self._groups) == 1:
            next_B1 = self.samplers[0].choose(logits_BV, drawn_B1, held_BV)
        else:
            next_B1 = tokens_BS.new_empty(len(tokens_BS), 1)
            for sampler, numbers in self._groups.items():
                rows = torch.tensor(numbers, device=logits_BV.device)
                options = [None if x is None else x[rows] for x in (drawn_B1, held_BV)]
                next_B1[rows] = sampler.choose(logits_BV[rows], *options)
        if held_BV is not None:
            held_BV.scatter_(1, next_B1, True)
        return next_B1

    def keep(self, going: Tensor) -> None:
        """Keep these rows, (R,) int64, in this order."""
        rows = going.tolist()
        self.samplers = [self.samplers[i] for i in rows]
        self._groups = _grouped(self.samplers)
        self._held = None if self._held is None else self._held[going]
        if isinstance(self.generator, Sequence):
            self.generator = [self.generator[i] for i in rows]

    def join(self, other: "Choice") -> None:
        """Append the rows of another. In both, each row has a generator."""
        assert isinstance(self.generator, Sequence)
        assert isinstance(other.generator, Sequence)
        self.generator = [*self.generator, *other.generator]
        self.samplers += other.samplers
        self._groups, self._held = _grouped(self.samplers), None

    def _drawn(self, logits_BV: Tensor) -> Tensor:
        """Return one random number in [0, 1) for each row, (B, 1) fp64, on the logits' device."""
        if isinstance(self.generator, Sequence):
            parts = [
                torch.rand(1, dtype=torch.float64, generator=g, device=g.device)
                for g in self.generator
            ]
            return torch.stack(parts).to(logits_BV.device)
        where = logits_BV.device if self.generator is None else self.generator.device
        size = (len(logits_BV), 1)
        drawn = torch.rand(size, dtype=torch.float64, generator=self.generator, device=where)
        return drawn.to(logits_BV.device)


def _grouped(samplers: Sequence[Sampler]) -> dict[Sampler, list[int]]:
    """Return the rows of each sampler."""
    groups: dict[Sampler, list[int]] = {}
    for row, sampler in enumerate(samplers):
        groups.setdefault(sampler, []).append(row)
    return groups


def takes_padding(model: nn.Module) -> bool:
    """Return True if a model continues rows with padding on the left as it would without."""
    return isinstance(model, Transformer) or getattr(model, "takes_padding", False)


class Batch:
    """The tokens of all rows (B, S), their padding mask, and the model's cache.

    Arguments and errors: see `generate`. num_tokens: the cache reserves room for this many. The
    model is in eval mode.
    """

    def __init__(
        self,
        model: nn.Module,
        tokens_BL: Tensor,
        choice: Choice,
        max_context: int | None = None,
        padding_mask_BL: Tensor | None = None,
        source_BS: Tensor | None = None,
        source_mask_BS: Tensor | None = None,
        num_tokens: int = 0,
    ):
        if tokens_BL.shape[1] == 0:
            raise ValueError("the prompt is empty; give at least one token.")
        if padding_mask_BL is not None and not takes_padding(model):
            raise ValueError("this model takes no padding; give rows of one length.")
        if max_context is None:
            max_context = getattr(getattr(model, "config", None), "max_sequence_length", None)
        self.model, self.choice, self.longest = model, choice, max_context
        self.tokens = self.unread = tokens_BL
        self.real = self.unread_real = None if padding_mask_BL is None else padding_mask_BL.bool()
        self.cache: Cache | None = None
        self.logits: Tensor | None = None  # (B, V) fp32, of the last step
        if source_BS is not None:
            if not hasattr(model, "encode"):
                problem = "only forescale's own model and a class of transformers take a source"
                raise ValueError(f"{problem}; give it in the tokens.")
            with torch.inference_mode():
                self.cache = model.encode(source_BS, source_mask_BS)  # type: ignore[operator]
        elif hasattr(model, "new_cache"):
            self.cache = model.new_cache()  # type: ignore[operator]
        if self.cache is not None:
            columns = tokens_BL.shape[1] + num_tokens
            self.cache.reserve(columns if max_context is None else min(columns, max_context))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.tokens)

    @torch.inference_mode()
    def step(self) -> Tensor | None:
        """Append a token to each row and return these, (B, 1) int64; None if an encoder-decoder has
        reached its longest row. Raises FloatingPointError if the logits give no probabilities."""
        logits_BV = self._logits()
        if logits_BV is None:
            return None
        # A model may rule out single tokens by -inf; NaN anywhere is the largest.
        if not logits_BV.amax(-1).isfinite().all():
            raise FloatingPointError("the logits are not finite")
        self.logits = logits_BV
        next_B1 = self.choice.next_tokens(logits_BV, self.tokens, self.real)
        self.tokens, self.unread = torch.cat((self.tokens, next_B1), 1), next_B1
        self.unread_real = None
        if self.real is not None:
            self.real = F.pad(self.real, (0, 1), value=True)
        return next_B1

    @torch.inference_mode()
    def keep(self, rows: Tensor | Sequence[int]) -> None:
        """Keep these rows, in this order."""
        going = torch.as_tensor(rows, device=self.tokens.device)
        self.tokens, self.unread = self.tokens[going], self.unread[going]
        self.choice.keep(going)
        self.real = None if self.real is None else self.real[going]
        if self.cache is not None:
            self.cache.keep(going)
        if self.real is None or self.unread_real is not None or len(going) == 0:
            return
        # Drop the first columns where they are padding in all rows.
        count = int(self.real.any(0).long().argmax())
        self.tokens, self.real = self.tokens[:, count:], self.real[:, count:]
        if self.cache is not None:
            self.cache.drop_first(count)
        if self.real.all():
            self.real = None
            if self.cache is not None:
                self.cache.real = None

    @property
    def has_source(self) -> bool:
        """True for the decoder of an encoder-decoder."""
        return self.cache is not None and self.cache.source is not None

    def can_join(self, other: "Batch") -> bool:
        """True if the two batches can be joined: both still use a cache, or neither has one."""
        if not isinstance(self.model, Transformer):
            return False
        if self.cache is None or other.cache is None:
            return self.cache is other.cache
        return self._fits and other._fits

    @property
    def _fits(self) -> bool:
        return self.longest is None or self.tokens.shape[1] <= self.longest

    def beyond(self) -> list[int]:
        """Return the rows with more tokens than the context, if the model has a cache. Without
        these rows the others can still use the cache."""
        if self.cache is None or self._fits:
            return []
        if self.real is None:
            return [*range(len(self))]
        return [i for i, n in enumerate(self.real.sum(1).tolist()) if n > (self.longest or n)]

    def apart(self, rows: Sequence[int]) -> "Batch":
        """Return a batch of these rows, without a cache. They stay in this batch too."""
        batch = copy(self)
        batch.cache, batch.choice = None, copy(self.choice)
        batch.keep(rows)
        return batch

    @torch.inference_mode()
    def join(self, other: "Batch") -> None:
        """Append the rows of another batch of this model. Both have made a step, and can_join is
        true."""
        columns = max(self.tokens.shape[1], other.tokens.shape[1])
        pads = [columns - batch.tokens.shape[1] for batch in (self, other)]
        if any(pads) or self.real is not None or other.real is not None:
            reals = [batch.real for batch in (self, other)]
            filled = [
                torch.ones_like(batch.tokens, dtype=torch.bool) if real is None else real
                for batch, real in zip((self, other), reals, strict=True)
            ]
            self.real = _stacked(filled, pads)
        if self.cache is not None and other.cache is not None:
            self.cache.join(other.cache, None if self.real is None else self.real[:, :-1])
        self.tokens = _stacked([self.tokens, other.tokens], pads)
        self.unread = torch.cat((self.unread, other.unread))
        self.choice.join(other.choice)

    def _logits(self) -> Tensor | None:
        """Return the logits of the next token, (B, V) fp32; None if the row is at its longest."""
        if self.cache is not None and self._fits:
            options = dict(cache=self.cache, padding_mask_BL=self.unread_real, last=1)
            logits_B1V: Tensor = self.model(self.unread, **options)
            return logits_B1V[:, -1].float()
        if self.has_source:
            return None  # a target without its start has no meaning
        self.cache = None  # after `keep` the rows may fit again, and the cache would lack columns
        context, options = self.tokens, dict[str, Any]()
        if self.longest is not None:
            context = context[:, -self.longest :]
        if self.real is not None:
            options["padding_mask_BL"] = self.real[:, -context.shape[1] :]
        if hasattr(self.model, "new_cache"):
            options["last"] = 1
        return self.model(context, **options)[:, -1].float()


def _stacked(parts: list[Tensor], pads: list[int]) -> Tensor:
    """Return the rows of all parts, each padded with `pads` columns of 0 on the left."""
    padded = [F.pad(part, (pad, 0)) for part, pad in zip(parts, pads, strict=True)]
    return torch.cat(padded)
