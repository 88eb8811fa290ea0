"""Whole matrices for Muon, of which ranks that divide them have a part each (tensor.py).

Muon orthogonalises a matrix, which no part of it can do alone. So each rank of a group follows the
momentum of its part, all gather what is to be orthogonalised, each orthogonalises the whole, and
keeps its part. Invariant: the ranks of a group update the same matrices in the same order, as they
have the same place among the ranks that divide the states.
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from forescale.engine.ranks import Ranks
from forescale.models.parallel.whole import Whole


class Part(NamedTuple):
    """Of which matrix a gradient is a part, and the ranks that have all parts. An attribute `part`
    of the gradient."""

    whole: Whole
    ranks: Ranks

    def gathered(self, x: Tensor) -> Tensor:
        """Return the whole matrix, of which x is this rank's part."""
        every = [torch.empty_like(x) for _ in range(self.ranks.size)]
        dist.all_gather(every, x.contiguous(), group=self.ranks.group)
        return torch.cat(every, self.whole.dim)

    def cut_from(self, x: Tensor) -> Tensor:
        """Return this rank's part of a whole matrix."""
        return x.chunk(self.whole.parts, self.whole.dim)[self.whole.part].contiguous()
