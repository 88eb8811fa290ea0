"""Whole matrices for Muon, of which ranks that divide them have a part each (tensor.py).

Muon orthogonalises a matrix, which no part of it can do alone. So each rank of a group follows the
momentum of its part; then the ranks exchange parts, so that each has other matrices whole,
orthogonalises them, and sends the parts of the updates back. Invariant: the ranks of a group update
the same matrices in the same order, as they have the same place among the ranks that divide the
states.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from forescale.engine.optim import waves
from forescale.engine.ranks import Ranks
from forescale.models.parallel.whole import Whole


class Part(NamedTuple):
    """Of which matrix a gradient is a part, and the ranks that have all parts. An attribute `part`
    of the gradient."""

    whole: Whole
    ranks: Ranks


def update_in_turns(
    divided: Sequence[tuple[Tensor, Part]],
    update: Callable[[Sequence[Tensor]], Iterable[Tensor]],
    dtype: torch.dtype,
) -> None:
    """Make of each part of a matrix that of its update, in place.

    divided: parts of one number format; update: makes the updates of whole matrices, of `dtype`.
    """
    blends, parts = zip(*divided, strict=True)
    ranks = parts[0].ranks
    t, rank, group = ranks.size, ranks.rank, ranks.group
    for wave in waves(blends, t, t * blends[0].element_size()):
        order = [i for of_rank in wave for i in of_rank]
        of_ranks = [sum(blends[i].numel() for i in of_rank) for of_rank in wave]
        elements, sizes = [of_ranks[rank]] * t, [blends[i].numel() for i in wave[rank]]
        local = torch.cat([blends[i].reshape(-1) for i in order])
        rows_TN = local.new_empty(t, of_ranks[rank])
        dist.all_to_all_single(rows_TN.view(-1), local, elements, of_ranks, group=group)
        del local
        wholes = [
            torch.cat([*column_TN.reshape(t, *blends[i].shape)], parts[i].whole.dim)
            for i, column_TN in zip(wave[rank], rows_TN.split(sizes, 1), strict=True)
        ]
        rows_TN = torch.empty_like(rows_TN, dtype=dtype)
        columns = zip(wave[rank], rows_TN.split(sizes, 1), update(wholes), strict=True)
        for i, column_TN, updated in columns:
            column_TN.copy_(torch.stack(updated.chunk(t, parts[i].whole.dim)).view(t, -1))
        del wholes
        local = rows_TN.new_empty(sum(of_ranks))
        dist.all_to_all_single(local, rows_TN.view(-1), of_ranks, elements, group=group)
        for i, values in zip(order, local.split([blends[i].numel() for i in order]), strict=True):
            blends[i].copy_(values.view_as(blends[i]))
