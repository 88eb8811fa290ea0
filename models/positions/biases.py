"""Biases of attention's scores by the distance of query and key.

ALiBi (Press et al. 2022, arXiv 2108.12409): each head subtracts its slope times the distance, after
the scores are scaled. T5's relative positions (Raffel et al. 2020, arXiv 1910.10683, section 2.1):
each head adds what a table of all layers has for the distance; short distances have an entry each,
longer ones share it in buckets that grow as their logarithm.

Invariant: distances are differences of positions, so padding doesn't count and a document begins
anew; no table limits the length.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.config import ModelConfig
from forescale.models.parametrization import scales
from forescale.models.positions.kinds import Relative


def slopes(num_heads: int) -> list[float]:
    """Return the slope of each head: 2^(-8 i / n), i = 1 to n, if n is a power of two.

    Otherwise the slopes of the power of two below n, then every other slope of the one above, as in
    the authors' code (get_slopes of attention_with_linear_biases).
    """
    below = 2 ** math.floor(math.log2(num_heads))
    powers = [2 ** (-8 * i / below) for i in range(1, below + 1)]
    between = [2 ** (-4 * i / below) for i in range(1, 2 * below, 2)]
    return powers + between[: num_heads - below]


def slopes_on(like: Tensor, num_heads: int, heads: slice) -> Tensor:
    """Return the slopes of some of the heads, fp32, on the device of a tensor."""
    # Made on a GPU, they would let the host wait for all that it has to do before.
    return torch.tensor(slopes(num_heads)[heads]).to(like.device, non_blocking=True)


def biased_mask(
    positions: Tensor,
    visible_B1LS: Tensor | None,
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
    slopes_H11 = slopes_on(positions, num_heads, heads)[:, None, None]
    bias_BHLS = (-slopes_H11 * distance_B1LS).to(dtype)
    visible = distance_B1LS >= 0 if visible_B1LS is None else visible_B1LS
    return bias_BHLS.masked_fill(~visible, -torch.inf)


def buckets(ahead: Tensor, count: int, longest: int, causal: bool) -> Tensor:
    """Return the bucket of each key, int64 below `count`, as T5Attention of transformers computes
    it.

    ahead: position of the key - position of the query, integers; longest: the distance from which
    on all share the last bucket. Causal: keys ahead, which nobody sees, have bucket 0; otherwise
    the second half of the buckets is theirs.
    """
    first = torch.zeros_like(ahead)
    if not causal:
        count //= 2
        first = (ahead > 0).long() * count
    distance = (-ahead).clamp(min=0) if causal else ahead.abs()
    single = count // 2
    share = (distance.clamp(min=1).float() / single).log() / math.log(longest / single)
    far = (single + (share * (count - single)).long()).clamp(max=count - 1)
    return first + torch.where(distance < single, distance, far)


class RelativePosition(nn.Module):
    """The table (buckets, H), as what is added to the scores of H heads.

    first: the number of the first column's head, where ranks divide the heads.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        position = config.position
        assert isinstance(position, Relative)
        self.count, self.longest = position.buckets, position.distance
        self.causal, self.first = config.causal, 0
        self.weight = nn.Parameter(torch.empty(self.count, config.sizes.num_heads))
        nn.init.normal_(self.weight, 0, scales(config).table_std)

    def forward(
        self,
        positions: Tensor,
        visible_B1LS: Tensor | None,
        dtype: torch.dtype,
        num_queries: int,
        heads: slice,
    ) -> Tensor:
        """Return the biases of visible keys, -inf for the others: (1 or B, H, L, S) in `dtype`.

        Arguments are those of biased_mask. The mask has a gradient, so that no flash kernel
        takes it: a GPU runs the memory-efficient one, a CPU keeps the scores.
        """
        ahead = positions[..., None, :] - positions[..., -num_queries:, None]
        ahead_BLS = ahead if ahead.dim() == 3 else ahead[None]
        index_BLS = buckets(ahead_BLS, self.count, self.longest, self.causal)
        columns = slice(heads.start - self.first, heads.stop - self.first)
        bias_BHLS = F.embedding(index_BLS, self.weight[:, columns]).permute(0, 3, 1, 2).to(dtype)
        if visible_B1LS is None and self.causal:
            visible_B1LS = (ahead_BLS <= 0)[:, None]
        return (
            bias_BHLS if visible_B1LS is None else bias_BHLS.masked_fill(~visible_B1LS, -torch.inf)
        )
