"""Whole matrices for Muon, of which ranks that divide them have a part each (tensor.py).

Muon orthogonalises a matrix, which no part of it can do alone. So each rank of a group follows the
momentum of its part, all gather what is to be orthogonalised, each orthogonalises the whole, and
keeps its part. Invariant: the ranks of a group update the same matrices in the same order, as they
have the same place among the ranks that divide the states.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

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

    def kept(self, x: Tensor) -> Tensor:
        """Return this rank's part of a whole matrix."""
        return x.chunk(self.whole.parts, self.whole.dim)[self.whole.part].contiguous()


def of_whole_matrices(update: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return DeepSpeed's muon_update, made to orthogonalise the whole matrix of a gradient that has
    the attribute `part`. What it returns, and the momentum, are then of that part."""

    @wraps(update)
    def updated(gradient: Tensor, momentum: Tensor, beta: float = 0.95, **more: Any) -> Tensor:
        part: Part | None = getattr(gradient, "part", None)
        if part is None:
            return update(gradient, momentum, beta, **more)
        # Without iterations it follows the momentum, and leaves in `gradient` what it would
        # orthogonalise. With beta=0 it orthogonalises what it is given.
        update(gradient, momentum, beta, **{**more, "ns_steps": 0, "ns_method": "standard"})
        whole = part.gathered(gradient)
        return part.kept(update(whole, torch.zeros_like(whole), 0.0, **more))

    return updated
