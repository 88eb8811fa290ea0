"""Hybrid sharding: groups of ranks that have a copy of the states each (Zhang et al. 2022, MiCS,
arXiv 2205.00119; torch's HYBRID_SHARD).

With `engine.shard_group` DeepSpeed divides states and reduces gradients among the ranks of a group.
Then each rank sums its part of the gradient with those that have the same part, one of each group:
between groups goes 1/size of a gradient a rank. Stage 3 does it beside the last backward pass
(Layout.add_beside).

Invariant: afterwards these ranks have the same bits, and so make the same update.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from forescale.engine.ranks import Ranks


@torch.no_grad()
def add_replicas(parts: Iterable[Tensor], replicas: Ranks, size: int) -> None:
    """Sum contiguous tensors over ranks, in place. size: the number of elements of a bucket, of
    which one travels while the next is filled; a larger tensor travels alone, as it is."""
    pending: deque[tuple[Any, Tensor, list[Tensor]]] = deque()
    for tensors in _buckets(parts, size):
        flat = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        pending.append((dist.all_reduce(flat, group=replicas.group, async_op=True), flat, tensors))
        if len(pending) > 1:
            _finish(*pending.popleft())
    for each in pending:
        _finish(*each)


def _finish(work: Any, flat: Tensor, tensors: list[Tensor]) -> None:
    work.wait()
    if len(tensors) > 1:
        torch._foreach_copy_(tensors, [*flat.split([len(t) for t in tensors])])


def _buckets(parts: Iterable[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Yield tensors of one type, flat, together as many elements as a bucket has, or one tensor."""
    bucket: list[Tensor] = []
    elements = 0
    for part in parts:
        tensor = part.view(-1)
        if bucket and (elements + len(tensor) > size or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, elements = [], 0
        bucket.append(tensor)
        elements += len(tensor)
    if bucket:
        yield bucket
