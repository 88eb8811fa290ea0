"""What the ranks send each other in a step, and how long that takes.

The collectives are those that DeepSpeed 0.19.8 makes under our engine, found by counting them on
real ranks (tests/distributed/test_real_costs.py holds these formulas to them, byte for byte):
- Stages 0 and 1 all-reduce the gradients once a step; stage 2 at each micro-batch. Both stages 1
  and 2 all-reduce where a reduce-scatter would do (use_multi_rank_bucket_allreduce), and gather the
  weights after the update.
- Stage 3 gathers weights in forward and backward of each micro-batch and reduce-scatters the
  gradients; with Muon it all-reduces them, and gathers gradients, momenta and updates besides.
  What it gathers again depends on stage3_max_reuse_distance, see zero3.py. With a hierarchical
  partition only the first gather of a step goes over all ranks.
A few scalars a step (norm, overflow, the shared word) are left out: latency, not bandwidth.

Times are those of rings at the stated speeds, without latency: of S bytes over n ranks each sends
2 (n-1)/n S for an all-reduce, (n-1)/n S for a gather or a scatter (Patarasu and Yuan 2009,
"Bandwidth optimal all-reduce algorithms"). Across nodes a ring leaves and enters each node once, so
a node sends as much as a GPU does, through all its cards together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from forescale.config.train import TrainJob
from forescale.plan.config import MachineConfig
from forescale.plan.memory import Settings, partition, recomputes
from forescale.plan.parameters import Inventory
from forescale.plan.zero3 import walk

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]


@dataclass(frozen=True)
class Collective:
    """All of one kind in a step. payload: bytes of the whole tensors; ranks: that take part;
    beside: the share of a step's computing that it can run beside, where the machine overlaps."""

    what: str
    kind: Kind
    payload: int
    ranks: int
    beside: float = 0.0

    @property
    def sent(self) -> int:
        """Bytes that each rank sends."""
        factor = 2 if self.kind == "all_reduce" else 1
        return factor * (self.ranks - 1) * self.payload // self.ranks

    def between(self, per_node: int) -> int:
        """Bytes that a node sends to other nodes."""
        return self.sent if self.ranks > per_node else 0

    def inside_seconds(self, machine: MachineConfig, per_node: int) -> float:
        """Of the links inside a node."""
        inside = self.sent if per_node > 1 else 0
        return inside / (machine.intra_node * machine.link_efficiency)

    def between_seconds(self, machine: MachineConfig, per_node: int) -> float:
        """Of the links between nodes."""
        return self.between(per_node) / (machine.inter_node * machine.link_efficiency)

    def seconds(self, machine: MachineConfig, per_node: int) -> float:
        """A ring is as fast as its slowest link."""
        return max(self.inside_seconds(machine, per_node), self.between_seconds(machine, per_node))


def collectives(job: TrainJob, held: Inventory, world: int) -> list[Collective]:
    """Of one optimizer step; those that send nothing are left out."""
    s = Settings.of(job, world)
    found = _partitioned(s, job, held) if s.stage == 3 else _replicated(s, held)
    return [c for c in found if c.payload and c.ranks > 1]


def _replicated(s: Settings, held: Inventory) -> list[Collective]:
    times = s.accumulation if s.stage == 2 else 1
    # The backward is two thirds of a micro-batch's time; below stage 2 only the last one reduces.
    beside = (2 / 3 if s.stage == 2 else 2 / 3 / s.accumulation) if s.stage and s.overlap else 0.0
    gradients = s.size * held.numel * times
    found = [Collective("gradients", "all_reduce", gradients, s.world, beside)]
    if s.stage:
        weights = s.size * s.world * sum(partition(g, s.world) for g in held.groups)
        found.append(Collective("weights after the update", "all_gather", weights, s.world))
    return found


def _partitioned(s: Settings, job: TrainJob, held: Inventory) -> list[Collective]:
    every = held.parameters
    small = {p.name for p in every if p.numel <= s.persistence}

    def padded(names: set[str] | None = None) -> int:
        chosen = (p.numel for p in every if names is None or p.name in names)
        return s.size * s.world * sum(-(-n // s.world) for n in chosen)

    trace = walk(every, small, s.reuse, recomputes(job), s.world)
    forward, backward = s.size * trace.forward, s.size * trace.backward
    beside = 1.0 if s.overlap else 0.0
    muon = [p for g in held.groups if g.use_muon for p in g.params]
    near, n = s.near, s.accumulation
    far = forward if near > 1 else n * (forward + backward)
    found = [
        Collective("weights in forward and backward", "all_gather", far, s.world, beside),
        Collective("small weights after the update", "all_gather", padded(small), s.world),
    ]
    if near > 1:
        close = n * (forward + backward) - forward
        found.append(Collective("weights, near", "all_gather", close, near, beside))
    if not s.zero.get("reduce_scatter", True):
        payload = n * s.size * held.numel
        found.append(Collective("gradients", "all_reduce", payload, s.world, beside))
    else:
        found.append(Collective("gradients", "reduce_scatter", n * padded(), s.world, beside))
    if muon:
        gathers = 2 * padded({p.name for p in muon}) + 2 * s.size * _rounds(s, muon)
        found.append(Collective("Muon's gradients and momenta", "all_gather", gathers, s.world))
    return found


def _rounds(s: Settings, params: Sequence) -> int:
    """Elements that an all-gather of Muon's updates moves: as many matrices at once as there are
    ranks, each padded to the largest, in chunks of a bucket."""
    total, start = 0, 0
    while start < len(params):
        end, numel = start, 0
        while end < len(params) and (end == start or numel + params[end].numel <= s.bucket):
            numel += params[end].numel
            end += 1
        for first in range(start, end, s.world):
            total += s.world * max(p.numel for p in params[first : min(first + s.world, end)])
        start = end
    return total


def exposed(
    found: Sequence[Collective], machine: MachineConfig, per_node: int, computing: float
) -> float:
    """Seconds of a step in which ranks wait for each other: what can't run beside the computing
    (seconds a step), and what doesn't fit beside it. What runs beside it shares the links."""
    hidden = 0.0
    waiting = 0.0
    room = 0.0
    for c in found:
        seconds = c.seconds(machine, per_node)
        if machine.overlap and c.beside:
            hidden += seconds
            room = max(room, c.beside * computing)
        else:
            waiting += seconds
    return waiting + max(0.0, hidden - room)
