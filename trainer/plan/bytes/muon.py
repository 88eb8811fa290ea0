"""What DeepSpeed 0.19.8's Muon gathers where ranks have parts of matrices.

At stage 3 it gathers the gradients and momenta of a bucket of matrices, each rank orthogonalises
one of a round, and all gather the results. In a round of unequal shapes, or of fewer matrices than
ranks, each rank has buffers for all ranks, of the largest matrix: bytes that grow with the ranks.
With an offloaded optimizer each rank orthogonalises all matrices itself: at stage 3 those of a
group at once, at stages 1 and 2 in batches. Invariant: imports no torch.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from forescale.engine.optim import Group
from forescale.plan.bytes.zero import ZeroSettings

_MOST_CACHED = 256 << 20  # bytes of buffers that stay, of _muon_allgather_max_cached_bytes
_MOST_AT_ONCE = 64 << 20  # bytes of a batch, of _muon_allgather_max_buffer_bytes


class Gathers(NamedTuple):
    """The all-gathers of a group of matrices in a step. payload: bytes; stays: bytes of buffers
    that are there after it; most: bytes beside them while matrices are orthogonalised."""

    payload: int = 0
    calls: int = 0
    stays: int = 0
    most: int = 0


def rounds(params: Sequence, ranks: int, bucket: int) -> Iterator[list[Sequence]]:
    """Yield the rounds of each bucket of matrices, whose gradients and momenta stage 3 gathers: in
    a round each rank orthogonalises at most one. bucket: elements."""
    start = 0
    while start < len(params):
        end, numel = start, 0
        while end < len(params) and (end == start or numel + params[end].numel <= bucket):
            numel += params[end].numel
            end += 1
        yield [params[first : min(first + ranks, end)] for first in range(start, end, ranks)]
        start = end


def gathers(s: ZeroSettings, group: Group, ranks: int, part: int = 0) -> Gathers:
    """Return the gathers of a group that `ranks` divide. part: elements of a rank's partition, at
    stages 1 and 2."""
    offloads = s.offloads("offload_optimizer")
    if not group.update.is_by_matrix or ranks == 1 or (s.stage < 3 and not offloads):
        return Gathers()
    if s.stage < 3:
        return _in_batches(group, ranks, part)
    if offloads:
        share = sum(-(-p.numel // ranks) for p in group.params)
        size = 2 * s.gradient * ranks * share
        stays, transient = _buffers([size + size // ranks])
        return Gathers(size, 1, stays, size + 8 * share + transient)
    payload, calls, most = 0, 0, 0
    for bucket in rounds(group.params, ranks, s.bucket):
        share = sum(-(-p.numel // ranks) for one in bucket for p in one)
        largest = [max(p.numel for p in one) for one in bucket]
        payload += 2 * s.sent * ranks * (share + sum(largest))
        calls += 2 + 2 * len(bucket)
        padded = [n for n, one in zip(largest, bucket, strict=True) if _is_padded(one, ranks)]
        beside = s.sent * (ranks + 1) * max(share, 2 * max(padded, default=0))
        most = max(most, s.sent * (2 * ranks + 1) * share + beside)
    return Gathers(payload, calls, 0, most)


def _is_padded(one: Sequence, ranks: int) -> bool:
    return len(one) < ranks or len({p.shape for p in one}) > 1


def _in_batches(group: Group, ranks: int, part: int) -> Gathers:
    """Return the gathers of stages 1 and 2 with an offloaded optimizer, in fp32."""
    batches: list[list[int]] = []  # first element of the group, and elements
    start = 0
    for p in group.params:
        if not batches or 8 * (batches[-1][1] + p.numel) > _MOST_AT_ONCE:
            batches.append([start, 0])
        batches[-1][1] += p.numel
        start += p.numel
    payload, calls, buffers = 0, 0, set[int]()
    for first, numel in batches:
        borders = [first, *range((first // part + 1) * part, first + numel, part), first + numel]
        share = max(end - begin for begin, end in pairwise(borders))
        # The first step has no momenta to gather; its buffers stay too.
        for tensors in (1, 2):
            chunk = min(share, max(1, _MOST_AT_ONCE // (4 * tensors * (ranks + 1))))
            buffers.add(4 * tensors * (ranks + 1) * chunk)
        times = math.ceil(share / chunk)
        payload, calls = payload + 8 * ranks * chunk * times, calls + times
    return Gathers(payload, calls, _buffers([*buffers])[0], 8 * max(n for _, n in batches))


def _buffers(sizes: Sequence[int]) -> tuple[int, int]:
    """Return the bytes of buffers that stay, and those of the largest that doesn't."""
    small = {size for size in sizes if size <= _MOST_CACHED}
    large = max((size for size in sizes if size > _MOST_CACHED), default=0)
    return min(sum(small), _MOST_CACHED), large
