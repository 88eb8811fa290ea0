"""What Muon sends where ranks have parts of matrices.

At stage 3 whole matrices are spread over the ranks (engine/optimizers/spread.py), and among those
that divide matrices at each stage (in_turns). With an offloaded
optimizer DeepSpeed 0.19.8 gathers gradients and momenta, and each rank orthogonalises all matrices
itself: at stage 3 those of a group at once, at stages 1 and 2 in batches. Invariant: imports no
torch.
"""

import math
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from forescale.engine.optim import Group, waves
from forescale.plan.bytes.parameters import Parameter
from forescale.plan.bytes.zero import ZeroSettings

_MOST_CACHED = 256 << 20  # bytes of buffers that stay, of _muon_allgather_max_cached_bytes
_MOST_AT_ONCE = 64 << 20  # bytes of a batch, of _muon_allgather_max_buffer_bytes


class Gathers(NamedTuple):
    """The all-gathers, or exchanges, of a group of matrices in a step. payload: bytes, of exchanges
    those of the first rank, which has the most; stays: bytes of buffers that are there after it;
    most: bytes beside them while matrices are orthogonalised."""

    kind: Literal["all_gather", "all_to_all"] = "all_gather"
    payload: int = 0
    calls: int = 0
    stays: int = 0
    most: int = 0


def gathers(s: ZeroSettings, group: Group, ranks: int, part: int = 0, divided: int = 1) -> Gathers:
    """Return the gathers of a group that `ranks` divide. part: elements of a rank's partition, at
    stages 1 and 2. divided: the number of ranks that have parts of its matrices."""
    offloads = s.offloads("offload_optimizer")
    if not group.update.is_by_matrix or ranks == 1 or (s.stage < 3 and not offloads):
        return Gathers()
    if s.stage < 3:
        return _in_batches(group, ranks, part)
    if offloads:
        share = sum(-(-p.numel // ranks) for p in group.params)
        size = 2 * s.gradient * ranks * share
        stays, transient = _buffers([size + size // ranks])
        return Gathers("all_gather", size, 1, stays, size + 8 * share + transient)
    payload, calls, most = 0, 0, 0
    for wave in waves(group.params, ranks, s.sent, divided):
        parts = [[-(-group.params[i].numel // ranks) for i in of_rank] for of_rank in wave]
        share, rows = sum(map(sum, parts)), ranks * sum(parts[0])
        payload, calls = payload + s.sent * (rows + share), calls + 2
        most = max(most, s.sent * (share + 3 * rows))
    return Gathers("all_to_all", payload, calls, 0, most)


def in_turns(
    taken: Sequence[Parameter], cut: Collection[str], tensor: int, size: int, updated: int
) -> Gathers:
    """Return the exchanges of parts of matrices that `tensor` ranks divide, which one of them
    orthogonalises each (engine/parallel/matrices.py), on the first, which has the most.

    taken: of which these ranks have parts; cut: the names of those divided. size, updated: bytes of
    an element before and after.
    """
    parts = [p for p in taken if p.name in cut]
    payload, calls = 0, 0
    for wave in waves(parts, tensor, tensor * size):
        whole = tensor * sum(parts[i].numel for i in wave[0])
        every = sum(parts[i].numel for of_rank in wave for i in of_rank)
        payload, calls = payload + size * whole + updated * every, calls + 2
    return Gathers("all_to_all", payload, calls)


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
    return Gathers(
        "all_gather", payload, calls, _buffers([*buffers])[0], 8 * max(n for _, n in batches)
    )


def _buffers(sizes: Sequence[int]) -> tuple[int, int]:
    """Return the bytes of buffers that stay, and those of the largest that doesn't."""
    small = {size for size in sizes if size <= _MOST_CACHED}
    large = max((size for size in sizes if size > _MOST_CACHED), default=0)
    return min(sum(small), _MOST_CACHED), large
