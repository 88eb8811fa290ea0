"""Sampling, one token at a time, of several rows at once.

With a cache the model reads each token once. Once the rows are longer than the context that the
model may see, the oldest tokens leave it and the positions of all others change, so from there on
each step runs the model on the whole context. Models of a user's own have no cache. An
encoder-decoder reads a source once, and its decoder continues the rows.

Invariant: a row of a batch, padded on the left, is continued as it would be alone.
"""

from collections.abc import Generator, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from forescale.models.decoding.cache import Cache
from forescale.models.decoding.sampler import Sampler
from forescale.models.transformer import Transformer

Draw = torch.Generator | Sequence[torch.Generator] | None


def generate(model: nn.Module, tokens_BL: Tensor, num_tokens: int, **how: Any) -> Tensor:
    """Continue each row by num_tokens sampled tokens: (B, L) int64 -> (B, L + num_tokens).

    Arguments and errors: see `stream`.
    """
    with closing(stream(model, tokens_BL, num_tokens=num_tokens, **how)) as following:
        return torch.cat([tokens_BL, *islice(following, num_tokens)], 1)


@torch.no_grad()
def stream(
    model: nn.Module,
    tokens_BL: Tensor,
    sampler: Sampler = Sampler(),  # noqa: B008 - it is frozen
    generator: Draw = None,
    max_context: int | None = None,
    padding_mask_BL: Tensor | None = None,
    source_BS: Tensor | None = None,
    source_mask_BS: Tensor | None = None,
    num_tokens: int = 0,
) -> Generator[Tensor, Tensor | None]:
    """Yield the next token of each row, (B, 1) int64, without end; of an encoder-decoder, until it
    has read max_context tokens. A caller may send the indices of the rows that go on, (R,) int64:
    the others are dropped, and later tokens are of those rows in this order.

    Args: `model` maps tokens (B, L) to logits (B, L, V); `generator` makes it repeatable: one for
    all rows, or one for each; `max_context`: maximum number of tokens that the model sees (default:
    the model's max_sequence_length, if any); padding_mask (B, L): False at padding, on the left;
    source (B, S): what the encoder of an encoder-decoder reads, and source_mask (B, S), False at
    its padding, on either side; num_tokens: for so many a cache makes room at once. The model runs
    in eval mode; its mode is restored at the end.
    Raises ValueError for an empty prompt, or a mask or source that is missing or that the model
    doesn't take, and FloatingPointError if no probabilities follow from the logits, such as of NaN.
    """
    if tokens_BL.shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one token.")
    if max_context is None:
        max_context = getattr(getattr(model, "config", None), "max_sequence_length", None)
    was_training = model.training
    model.eval()
    try:
        rows = _Rows(model, tokens_BL, padding_mask_BL, max_context)
        cache = _cache_of(model, source_BS, source_mask_BS)
        if cache is not None:
            columns = tokens_BL.shape[1] + num_tokens
            cache.reserve(columns if max_context is None else min(columns, max_context))
        held_BV = None
        while True:
            logits_BV = rows.logits(cache)
            if logits_BV is None:
                return
            # A model may rule out single tokens by -inf; NaN anywhere is the largest.
            if not logits_BV.amax(-1).isfinite().all():
                raise FloatingPointError("the logits are not finite")
            if sampler.reads_row:
                held_BV = _held(rows, logits_BV.shape[1]) if held_BV is None else held_BV
            drawn_B1 = _drawn(generator, logits_BV) if sampler.draws else None
            next_B1 = sampler.choose(logits_BV, drawn_B1, held_BV)
            if held_BV is not None:
                held_BV.scatter_(1, next_B1, True)
            rows.append(next_B1)
            going = yield next_B1
            if going is not None:
                rows.keep(going)
                cache = cache and cache.keep(going)
                held_BV = None if held_BV is None else held_BV[going]
                if isinstance(generator, Sequence):
                    generator = [generator[i] for i in going.tolist()]
    finally:
        model.train(was_training)


class _Rows:
    """The tokens of all rows, and which of them the model hasn't read."""

    def __init__(
        self, model: nn.Module, tokens_BL: Tensor, real_BL: Tensor | None, longest: int | None
    ):
        if real_BL is not None and not isinstance(model, Transformer):
            raise ValueError("only forescale's own model takes padding; give rows of one length.")
        self.model, self.longest = model, longest
        self.tokens, self.real = tokens_BL, None if real_BL is None else real_BL.bool()
        self.unread, self.unread_real = self.tokens, self.real

    def logits(self, cache: Cache | None) -> Tensor | None:
        """Return the logits of the next token, (B, V) fp32; None if the model can read no more."""
        fits = self.longest is None or self.tokens.shape[1] <= self.longest
        if cache is not None and fits:
            given = dict(cache=cache, padding_mask_BL=self.unread_real, last=1)
            logits_B1V: Tensor = self.model(self.unread, **given)
            return logits_B1V[:, -1].float()
        if cache is not None and cache.source is not None:
            return None  # a target is learned as a whole: without its start it has no meaning
        context, more = self.tokens, dict[str, Any]()
        if self.longest is not None:
            context = context[:, -self.longest :]
        if self.real is not None:
            more["padding_mask_BL"] = self.real[:, -context.shape[1] :]
        if isinstance(self.model, Transformer):
            more["last"] = 1
        return self.model(context, **more)[:, -1].float()

    def append(self, next_B1: Tensor) -> None:
        """Add a token to each row."""
        self.tokens, self.unread = torch.cat((self.tokens, next_B1), 1), next_B1
        self.unread_real = None
        if self.real is not None:
            self.real = torch.cat((self.real, self.real.new_ones(len(next_B1), 1)), 1)

    def keep(self, going: Tensor) -> None:
        """Drop all other rows."""
        self.tokens, self.unread = self.tokens[going], self.unread[going]
        self.real = None if self.real is None else self.real[going]


def _held(rows: _Rows, size: int) -> Tensor:
    """Return (B, V): True for each token that a row holds."""
    real = torch.ones_like(rows.tokens) if rows.real is None else rows.real.long()
    found = torch.zeros(len(real), size, dtype=torch.long, device=real.device)
    return found.scatter_add_(1, rows.tokens, real) > 0


def _drawn(generator: Draw, logits_BV: Tensor) -> Tensor:
    """Return a number of each row from 0 to below 1, (B, 1) fp64 where the logits are."""
    if isinstance(generator, Sequence):
        parts = [
            torch.rand(1, dtype=torch.float64, generator=g, device=g.device) for g in generator
        ]
        return torch.stack(parts).to(logits_BV.device)
    where = logits_BV.device if generator is None else generator.device
    size = (len(logits_BV), 1)
    drawn = torch.rand(size, dtype=torch.float64, generator=generator, device=where)
    return drawn.to(logits_BV.device)


def _cache_of(
    model: nn.Module, source_BS: Tensor | None, source_mask_BS: Tensor | None
) -> Cache | None:
    """Return the cache of rows of which nothing is read but the source; None: there is none."""
    if not isinstance(model, Transformer):
        if source_BS is not None:
            raise ValueError("only forescale's own model takes a source; give it in the tokens.")
        return None
    return model.new_cache() if source_BS is None else model.encode(source_BS, source_mask_BS)
