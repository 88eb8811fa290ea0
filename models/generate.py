"""Sampling, one token at a time.

With a cache the model reads each token once. Once the rows are longer than the context that the
model may see, the oldest tokens leave it and the positions of all others change, so from there on
each step runs the model on the whole context. Models of a user's own have no cache.
"""

from collections.abc import Generator
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

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
) -> Generator[Tensor]:
    """Yield the next token of each row, (B, 1) int64, without end.

    Args: `model` maps tokens (B, L) to logits (B, L, V); `temperature` 0 takes the most likely
    token; `top_k` samples among the k most likely; `generator` makes it repeatable; `max_context`:
    maximum number of tokens that the model sees (default: the model's max_sequence_length, if any).
    The model runs in eval mode; its mode is restored at the end.
    Raises ValueError for an empty prompt, a negative temperature or a top_k below 1, and
    FloatingPointError if no probabilities follow from the logits, such as of NaN.
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
        cache = model.new_cache() if isinstance(model, Transformer) else None
        unread_BL = tokens_BL
        while True:
            if cache is not None and (max_context is None or tokens_BL.shape[1] <= max_context):
                logits_BV = model(unread_BL, cache=cache)[:, -1].float()
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
