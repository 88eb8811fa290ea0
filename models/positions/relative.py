"""T5's relative positions: each head adds to a score what a table has for the distance (Raffel et
al. 2020, arXiv 1910.10683, section 2.1).

Short distances have an entry each, longer ones share it in buckets that grow as their logarithm.
All layers share the table. Invariant: distances are differences of positions, so padding doesn't
count and a document begins anew; no table limits the length.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.config import ModelConfig
from forescale.models.parametrization import scales
from forescale.models.positions.kinds import Relative


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
        seen_B1LS: Tensor | None,
        dtype: torch.dtype,
        num_queries: int,
        heads: slice,
    ) -> Tensor:
        """Return the biases of visible keys, -inf for the others: (1 or B, H, L, S) in `dtype`.

        Arguments are those of alibi.biased_mask. The mask has a gradient, so that no flash kernel
        takes it: a GPU runs the memory-efficient one, a CPU keeps the scores.
        """
        ahead = positions[..., None, :] - positions[..., -num_queries:, None]
        ahead_BLS = ahead if ahead.dim() == 3 else ahead[None]
        index_BLS = buckets(ahead_BLS, self.count, self.longest, self.causal)
        columns = slice(heads.start - self.first, heads.stop - self.first)
        bias_BHLS = F.embedding(index_BLS, self.weight[:, columns]).permute(0, 3, 1, 2).to(dtype)
        if seen_B1LS is None and self.causal:
            seen_B1LS = (ahead_BLS <= 0)[:, None]
        return bias_BHLS if seen_B1LS is None else bias_BHLS.masked_fill(~seen_B1LS, -torch.inf)
