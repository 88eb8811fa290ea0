"""Sampling, one token at a time, of several rows at once; see batch.py."""

from collections.abc import Generator
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from forescale.models.decoding.batch import Batch
from forescale.models.decoding.choice import Choice, Draw
from forescale.models.decoding.sampler import Sampler


def generate(model: nn.Module, tokens_BL: Tensor, num_tokens: int, **how: Any) -> Tensor:
    """Continue each row by num_tokens sampled tokens: (B, L) int64 -> (B, L + num_tokens).

    Arguments and errors: see `stream`.
    """
    with closing(stream(model, tokens_BL, num_tokens=num_tokens, **how)) as following:
        return torch.cat([tokens_BL, *islice(following, num_tokens)], 1)


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
    was_training = model.training
    model.eval()
    try:
        choice = Choice([sampler] * len(tokens_BL), generator)
        given = padding_mask_BL, source_BS, source_mask_BS, num_tokens
        batch = Batch(model, tokens_BL, choice, max_context, *given)
        while (next_B1 := batch.step()) is not None:
            going = yield next_B1
            if going is not None:
                batch.keep(going)
    finally:
        model.train(was_training)
