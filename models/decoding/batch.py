"""Rows that a model continues together, a token each a step. Rows join and leave between steps.

With a cache the model reads each token once. Once a batch has more columns than the context that
the model may see, the oldest tokens leave it and the positions of all others change, so from there
on each step runs the model on the whole context. Models of a user's own have no cache. An
encoder-decoder reads a source once, and its decoder continues the rows.

Invariant: a row of a batch, padded on the left, is continued as it would be alone.
"""

from collections.abc import Sequence
from copy import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.decoding.cache import Cache
from forescale.models.decoding.choice import Choice
from forescale.models.transformer import Transformer


class Batch:
    """The tokens of all rows (B, S), which of them are real, and what the model keeps of them.

    Arguments and errors: see generate.py; num_tokens: for so many a cache makes room at once. The
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
        if padding_mask_BL is not None and not isinstance(model, Transformer):
            raise ValueError("only forescale's own model takes padding; give rows of one length.")
        if max_context is None:
            max_context = getattr(getattr(model, "config", None), "max_sequence_length", None)
        self.model, self.choice, self.longest = model, choice, max_context
        self.tokens = self.unread = tokens_BL
        self.real = self.unread_real = None if padding_mask_BL is None else padding_mask_BL.bool()
        self.cache = _cache_of(model, source_BS, source_mask_BS)
        if self.cache is not None:
            columns = tokens_BL.shape[1] + num_tokens
            self.cache.reserve(columns if max_context is None else min(columns, max_context))

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.tokens)

    @torch.inference_mode()
    def step(self) -> Tensor | None:
        """Add a token to each row, and return them, (B, 1) int64; None if an encoder-decoder can
        read no more. Raises FloatingPointError if no probabilities follow from the logits."""
        logits_BV = self._logits()
        if logits_BV is None:
            return None
        # A model may rule out single tokens by -inf; NaN anywhere is the largest.
        if not logits_BV.amax(-1).isfinite().all():
            raise FloatingPointError("the logits are not finite")
        next_B1 = self.choice.next_tokens(logits_BV, self.tokens, self.real)
        self.tokens, self.unread = torch.cat((self.tokens, next_B1), 1), next_B1
        self.unread_real = None
        if self.real is not None:
            self.real = F.pad(self.real, (0, 1), value=True)
        return next_B1

    @torch.inference_mode()
    def keep(self, rows: Tensor | Sequence[int]) -> None:
        """Drop all rows but these, and go on in their order."""
        going = torch.as_tensor(rows, device=self.tokens.device)
        self.tokens, self.unread = self.tokens[going], self.unread[going]
        self.choice.keep(going)
        self.real = None if self.real is None else self.real[going]
        if self.cache is not None:
            self.cache.keep(going)
        if self.real is not None and self.unread_real is None and len(going):
            self._drop_padding(self.real)

    @property
    def has_source(self) -> bool:
        """True for the decoder of an encoder-decoder."""
        return self.cache is not None and self.cache.source is not None

    def can_join(self, other: "Batch") -> bool:
        """True if these two can be one: both read their caches still, or neither has one."""
        if not isinstance(self.model, Transformer):
            return False
        if self.cache is None or other.cache is None:
            return self.cache is other.cache
        return self._fits and other._fits

    @property
    def _fits(self) -> bool:
        return self.longest is None or self.tokens.shape[1] <= self.longest

    def beyond(self) -> list[int]:
        """Return the rows that have more tokens than the model reads, if it has a cache: without
        them the others go on with theirs."""
        if self.cache is None or self._fits:
            return []
        if self.real is None:
            return [*range(len(self))]
        return [i for i, n in enumerate(self.real.sum(1).tolist()) if n > (self.longest or n)]

    def apart(self, rows: Sequence[int]) -> "Batch":
        """Return a batch of these rows, without a cache; they stay in this one too."""
        batch = copy(self)
        batch.cache, batch.choice = None, copy(self.choice)
        batch.keep(rows)
        return batch

    @torch.inference_mode()
    def join(self, other: "Batch") -> None:
        """Add the rows of another batch of this model, after these; both have made a step, and
        can_join is true of them."""
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

    def _drop_padding(self, real_BS: Tensor) -> None:
        """Drop the first columns where they are padding in all rows."""
        count = int(real_BS.any(0).long().argmax())
        self.tokens, self.real = self.tokens[:, count:], real_BS[:, count:]
        if self.cache is not None:
            self.cache.drop_first(count)
        if self.real.all():
            self.real = None
            if self.cache is not None:
                self.cache.real = None

    def _logits(self) -> Tensor | None:
        """Return the logits of the next token, (B, V) fp32; None if the model can read no more."""
        if self.cache is not None and self._fits:
            options = dict(cache=self.cache, padding_mask_BL=self.unread_real, last=1)
            logits_B1V: Tensor = self.model(self.unread, **options)
            return logits_B1V[:, -1].float()
        if self.has_source:
            return None  # a target is learned as a whole: without its start it has no meaning
        self.cache = None  # the rows that stay may fit again, and it would lack columns
        context, options = self.tokens, dict[str, Any]()
        if self.longest is not None:
            context = context[:, -self.longest :]
        if self.real is not None:
            options["padding_mask_BL"] = self.real[:, -context.shape[1] :]
        if isinstance(self.model, Transformer):
            options["last"] = 1
        return self.model(context, **options)[:, -1].float()


def _stacked(parts: list[Tensor], pads: list[int]) -> Tensor:
    """Return the rows of all parts, each padded by 0 on the left by so many columns."""
    padded = [F.pad(part, (pad, 0)) for part, pad in zip(parts, pads, strict=True)]
    return torch.cat(padded)


def _cache_of(
    model: nn.Module, source_BS: Tensor | None, source_mask_BS: Tensor | None
) -> Cache | None:
    """Return the cache of rows of which nothing is read but the source; None: there is none."""
    if not isinstance(model, Transformer):
        if source_BS is not None:
            raise ValueError("only forescale's own model takes a source; give it in the tokens.")
        return None
    if source_BS is None:
        return model.new_cache()
    with torch.inference_mode():
        return model.encode(source_BS, source_mask_BS)
