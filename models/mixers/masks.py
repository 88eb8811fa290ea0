"""Which tokens a token may attend to, and the masks that attention takes."""

from collections.abc import Callable

import torch
from torch import Tensor

from forescale.models.mixers.context import Columns


def visible_keys(
    padding_mask_BS: Tensor | None,
    starts_BS: Tensor | None,
    num_queries: int | None = None,
    causal: bool = True,
) -> Tensor:
    """Return (B, 1, L, S), True if the query (row) may attend to the key (column).

    A query attends to no padding, to no key of another document and, if causal, to no later key.
    Args, at least one of the first two: padding_mask (B, S), True for a real token; starts (B, S),
    see position.document_starts; num_queries: L, the last of the S columns; None: all of them. A
    padding token still attends to itself: some kernels return NaN for a softmax over no keys, and
    NaN would spread to the gradients of real tokens.
    """
    either = starts_BS if padding_mask_BS is None else padding_mask_BS
    assert either is not None
    columns_S = torch.arange(either.shape[1], device=either.device)
    first = 0 if num_queries is None else len(columns_S) - num_queries
    queries_L1 = columns_S[first:, None]
    visible = columns_S <= queries_L1 if causal else (columns_S >= 0) & (queries_L1 >= 0)
    if starts_BS is not None:
        visible = visible & (starts_BS[:, None, :] == starts_BS[:, first:, None])
    if padding_mask_BS is not None:
        visible = (visible & padding_mask_BS.bool()[:, None, :]) | (columns_S == queries_L1)
    return visible[:, None]


def additive_mask(seen_B1LS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask to add to the scores: 0 for a visible key, else -inf, in the queries' dtype.

    It needs B * L^2 values (L = 2,048 in bf16: 8 MiB per row; 8,192: 128 MiB), once per forward
    pass, until the backward pass ends. Attention would convert a boolean mask to the same, but in
    every layer, and autograd would keep each copy. With any mask, the kernels that skip invisible
    keys (flash) can't be used: every layer scores the whole square, including later tokens and
    other documents. On a GPU a BlockMask takes its place (blocks.blocks_seen).
    """
    return torch.zeros_like(seen_B1LS, dtype=dtype).masked_fill(~seen_B1LS, -torch.inf)


def mask_of(
    read: Columns, causal: bool, biases: Callable[..., Tensor] | None = None
) -> Tensor | None:
    """Return the mask of Context for these columns, or None if kernels need none.

    biases: alibi.biased_mask of a number of heads, or a RelativePosition; None: scores have none.
    """
    positions, length, starts, real = read[:4]
    columns = positions.shape[-1]
    if real is None and starts is None and 1 < length < columns:
        # A causal kernel would take the first query for the first key's.
        real = torch.ones(1, columns, dtype=torch.bool, device=positions.device)
    visible = None
    if real is not None or starts is not None:
        visible = visible_keys(real, starts, length, causal)
    if biases is not None:
        return biases(positions, visible, dtype=read.dtype, num_queries=length)
    return None if visible is None else additive_mask(visible, read.dtype)


def source_mask(real_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a decoder adds to its scores of an encoder's tokens, (B, 1, 1, S): 0, or -inf for
    padding. A source of padding alone is seen: no softmax is over nothing."""
    real_BS = real_BS.bool()
    real_BS = real_BS | ~real_BS.any(-1, keepdim=True)
    return additive_mask(real_BS[:, None, None], dtype)
