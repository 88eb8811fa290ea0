"""Sampling, one token at a time.

With a cache the model reads each token once. Once the rows are longer than the context that the
model may see, the oldest tokens leave it and the positions of all others change, so from there on
each step runs the model on the whole context. Models of a user's own have no cache. An
encoder-decoder reads a source once, and its decoder continues the rows.
"""

from collections.abc import Generator
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from forescale.models.cache import Cache
from forescale.models.transformer import Transformer


def generate(model: nn.Module, tokens_BL: Tensor, num_tokens: int, **how: Any) -> Tensor:
    """Continue each row by num_tokens sampled tokens: (B, L) int64 -> (B, L + num_tokens).

    Arguments and errors: see `stream`.
    """
    with closing(stream(model, tokens_BL, **how)) as following:
        return torch.cat([tokens_BL, *islice(following, num_tokens)], 1)


@torch.no_grad()
def stream(
    model: nn.Module,
    tokens_BL: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    generator: torch.Generator | None = None,
    max_context: int | None = None,
    source_BS: Tensor | None = None,
    source_mask_BS: Tensor | None = None,
) -> Generator[Tensor]:
    """Yield the next token of each row, (B, 1) int64, without end; of an encoder-decoder, until it
    has read max_context tokens.

    Args: `model` maps tokens (B, L) to logits (B, L, V); `temperature` 0 takes the most likely
    token; `top_k` samples among the k most likely; `generator` makes it repeatable; `max_context`:
    maximum number of tokens that the model sees (default: the model's max_sequence_length, if any);
    source (B, S): what the encoder of an encoder-decoder reads, and source_mask (B, S), False at
    its padding, on either side. The model runs in eval mode; its mode is restored at the end.
    Raises ValueError for an empty prompt, a negative temperature, a top_k below 1, or a source that
    is missing or that the model doesn't take, and FloatingPointError if no probabilities follow
    from the logits, such as of NaN.
    """
    if tokens_BL.shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one token.")
    if temperature < 0:
        raise ValueError(f"temperature {temperature} is negative; give 0 or more.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k {top_k} leaves no token; give at least 1.")
    if max_context is None:
        max_context = getattr(getattr(model, "config", None), "max_sequence_length", None)
    was_training = model.training
    model.eval()
    try:
        cache = _cache_of(model, source_BS, source_mask_BS)
        unread_BL = tokens_BL
        while True:
            if cache is not None and (max_context is None or tokens_BL.shape[1] <= max_context):
                logits_BV = model(unread_BL, cache=cache)[:, -1].float()
            elif source_BS is not None:
                return  # a target is learned as a whole: without its start it has no meaning
            else:
                context = tokens_BL if max_context is None else tokens_BL[:, -max_context:]
                logits_BV = model(context)[:, -1].float()
            # A model may rule out single tokens by -inf.
            if not logits_BV.logsumexp(-1).isfinite().all():
                raise FloatingPointError("the logits are not finite")
            unread_BL = _sample(logits_BV, temperature, top_k, generator)
            tokens_BL = torch.cat((tokens_BL, unread_BL), dim=1)
            yield unread_BL
    finally:
        model.train(was_training)


def _cache_of(
    model: nn.Module, source_BS: Tensor | None, source_mask_BS: Tensor | None
) -> Cache | None:
    """Return the cache of rows of which nothing is read but the source; None: there is none."""
    if not isinstance(model, Transformer):
        if source_BS is not None:
            raise ValueError("only forescale's own model takes a source; give it in the tokens.")
        return None
    return model.new_cache() if source_BS is None else model.encode(source_BS, source_mask_BS)


def _sample(
    logits_BV: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """Sample one token per row: (B, V) -> (B, 1)."""
    if temperature == 0:
        return logits_BV.argmax(-1, keepdim=True)
    if top_k is not None and top_k < logits_BV.shape[1]:
        logits_Bk, index_Bk = logits_BV.topk(top_k)
        chosen_B1 = _sample(logits_Bk, temperature, None, generator)
        return index_Bk.gather(1, chosen_B1)
    return torch.multinomial((logits_BV / temperature).softmax(-1), 1, generator=generator)
