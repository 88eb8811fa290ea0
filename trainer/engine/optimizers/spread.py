"""Muon at stage 3, where each rank has a part of every matrix: whole ones are spread over ranks.

Momentum and its blend with the gradient are computed by element, of each rank's part. Then the
ranks exchange parts, so that each has other matrices whole, orthogonalises them, and sends their
parts back. DeepSpeed 0.19.8 gathers all gradients and momenta on all ranks instead, in buffers that
grow with the ranks. Invariant: a rank has whole matrices of optim.py's WHOLE bytes at once, or one;
where ranks divide matrices, one for each of these.
"""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from forescale.engine.gathers import joined, rows_of
from forescale.engine.optim import shape_of, waves
from forescale.engine.optimizers.orthogonal import orthogonalise


class Slice(NamedTuple):
    """A rank's part of a matrix: as many elements as any rank has, of which the first `size` are
    of the matrix. gradient: becomes the update."""

    param: Any
    gradient: Tensor
    momentum: Tensor
    size: int


def update_parts(
    parts: Sequence[Slice],
    group: Any,
    beta: float,
    method: str,
    dtype: torch.dtype,
    mark: Callable[[Any, Tensor], None],
    divided: int = 1,
) -> None:
    """Follow the momenta, and make updates of the gradients.

    group: the ranks, which all have the same matrices in the same order. dtype: of the momenta, and
    of what is sent. mark: receives each parameter with its whole matrix before it is
    orthogonalised. divided: the number of ranks that have parts of what is whole here, and take
    turns then (matrices.py).
    """
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    params = [part.param for part in parts]
    for wave in waves(params, ranks, dtype.itemsize, divided):
        order = [parts[i] for of_rank in wave for i in of_rank]
        blends = [part.gradient.to(dtype) for part in order]
        values = [blend[: part.size] for blend, part in zip(blends, order, strict=True)]
        momenta = [part.momentum[: part.size] for part in order]
        torch._foreach_lerp_(momenta, values, 1 - beta)
        torch._foreach_lerp_(values, momenta, beta)  # Nesterov's momentum
        sizes = [len(blend) for blend in blends]
        of_ranks = [sum(len(parts[i].gradient) for i in of_rank) for of_rank in wave]
        local, elements = torch.cat(blends), of_ranks[rank]
        rows_WN = local.new_empty(ranks, elements)
        _exchange(rows_WN.view(-1), local, [elements] * ranks, of_ranks, group)
        columns = rows_WN.split([len(parts[i].gradient) for i in wave[rank]], dim=1)
        wholes = []
        for i, parts_WN in zip(wave[rank], columns, strict=True):
            shape = shape_of(params[i])
            wholes.append(joined(parts_WN, prod(shape)).view(shape))
            mark(params[i], wholes[-1])
        orthogonalise(wholes, method)
        if wholes:
            rows_WN = torch.cat([rows_of(whole, ranks) for whole in wholes], dim=1)
        _exchange(local, rows_WN.view(-1), of_ranks, [elements] * ranks, group)
        torch._foreach_copy_([part.gradient for part in order], [*local.split(sizes)])


def _exchange(
    output: Tensor, local: Tensor, receives: list[int], sends: list[int], group: Any
) -> None:
    if len(sends) == 1:
        output.copy_(local)
    else:
        dist.all_to_all_single(output, local, receives, sends, group=group)
