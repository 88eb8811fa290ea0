"""ALiBi: attention with linear biases instead of position vectors (Press et al. 2022, arXiv
2108.12409).

Each head subtracts its slope times the distance from the scores, after they are scaled. Invariant:
distances are differences of positions, so padding doesn't count and a document begins anew.
"""

import math

import torch
from torch import Tensor


def slopes(num_heads: int) -> list[float]:
    """Return the slope of each head: 2^(-8 i / n), i = 1 to n, if n is a power of two.

    Otherwise the slopes of the power of two below n, then every other slope of the one above, as in
    the authors' code (get_slopes of attention_with_linear_biases).
    """
    below = 2 ** math.floor(math.log2(num_heads))
    powers = [2 ** (-8 * i / below) for i in range(1, below + 1)]
    between = [2 ** (-4 * i / below) for i in range(1, 2 * below, 2)]
    return powers + between[: num_heads - below]


def biased_mask(
    positions: Tensor,
    seen_B1LS: Tensor | None,
    num_heads: int,
    dtype: torch.dtype,
    num_queries: int | None = None,
    heads: slice = slice(None),
) -> Tensor:
    """Return what is added to the scores: -slope * distance for a visible key, else -inf.

    Args: positions (S,) or (B, S); visible (B, 1, L, S), True for a visible key, with positions
    (B, S); None: all keys up to the query; num_queries: L, the last of the S columns; None: all of
    them; heads: those wanted, H of num_heads. Returns (1, H, L, S) or (B, H, L, S) in `dtype`,
    which is kept until the backward pass ends: H times as much as masks.additive_mask, and without
    documents too. Products are made in fp32 and rounded once: a bias is relatively exact, and zero
    for the query's own position. The kernels that skip invisible keys (flash) can't be used.
    """
    queries = positions if num_queries is None else positions[..., -num_queries:]
    distance_B1LS = (queries[..., :, None] - positions[..., None, :]).view(
        -1, 1, queries.shape[-1], positions.shape[-1]
    )
    slopes_H11 = torch.tensor(slopes(num_heads)[heads], device=positions.device)[:, None, None]
    bias_BHLS = (-slopes_H11 * distance_B1LS).to(dtype)
    visible = distance_B1LS >= 0 if seen_B1LS is None else seen_B1LS
    return bias_BHLS.masked_fill(~visible, -torch.inf)
