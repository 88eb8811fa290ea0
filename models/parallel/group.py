"""A group of ranks that compute one model together, as the model's own code sees it."""

from dataclasses import dataclass

import torch.distributed._functional_collectives as collectives
from torch import Tensor


@dataclass(frozen=True)
class Group:
    """The ranks of a group, and this one's place `rank` among the `size` of them.

    name: of their process group, as torch.distributed knows it.
    """

    rank: int
    size: int
    name: str

    def heads(self, of: slice) -> slice:
        """Return which of the query heads `of` this rank has, where the group divides them."""
        each = (of.stop - of.start) // self.size
        return slice(of.start + self.rank * each, of.start + (self.rank + 1) * each)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over the group, the same bits on all its ranks. Has no gradient."""
        # A functional collective, because a compiler can follow it.
        total = collectives.all_reduce(x.contiguous(), "sum", self.name)  # type: ignore[arg-type]
        return collectives.wait_tensor(total)
