"""Communication of an optimizer step: bytes of each collective, and its time.

The collectives are those that DeepSpeed 0.19.8 runs under our engine. They were counted on real
ranks; tests/distributed/test_real_costs.py compares these formulas with them, byte for byte:
- Stages 0 and 1 all-reduce the gradients once per step, stage 2 once per micro-batch. Stages 1 and
  2 use an all-reduce where a reduce-scatter would be enough (use_multi_rank_bucket_allreduce), and
  all-gather the weights after the update.
- Stage 3 all-gathers the weights in the forward and backward pass of each micro-batch and
  reduce-scatters the gradients. With Muon it all-reduces the gradients, and also all-gathers
  gradients, momenta and updates. stage3_max_reuse_distance decides which weights are gathered a
  second time, see zero3.py. With a hierarchical partition only the first gather of a step uses all
  ranks.
A few scalars per step (norm, overflow, the StepSummary) are left out: they cost latency, not
bandwidth.

Times are those of ring algorithms at the configured speeds, without latency. For S bytes over n
ranks, each rank sends 2 (n-1)/n S for an all-reduce and (n-1)/n S for an all-gather or a
reduce-scatter (Patarasu and Yuan 2009, "Bandwidth optimal all-reduce algorithms"). A ring over
several nodes enters and leaves each node once, so a node sends as much as one GPU, through all its
network cards together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from forescale.config.train import TrainJob
from forescale.plan.config import MachineConfig
from forescale.plan.memory import ZeroSettings, partition, recomputes
from forescale.plan.parameters import Inventory
from forescale.plan.zero3 import trace_gathers

Kind = Literal["all_reduce", "all_gather", "reduce_scatter"]


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a step.

    payload: bytes of the whole tensors. ranks: number of ranks that take part. beside: the fraction
    of the step's computation that it can overlap with, on a machine that overlaps.
    """

    what: str
    kind: Kind
    payload: int
    ranks: int
    beside: float = 0.0

    @property
    def sent(self) -> int:
        """Bytes that each rank sends per step."""
        factor = 2 if self.kind == "all_reduce" else 1
        return factor * (self.ranks - 1) * self.payload // self.ranks

    def between(self, per_node: int) -> int:
        """Return the bytes that a node of `per_node` ranks sends to other nodes."""
        return self.sent if self.ranks > per_node else 0

    def inside_seconds(self, machine: MachineConfig, per_node: int) -> float:
        """Return the seconds on the links inside a node."""
        inside = self.sent if per_node > 1 else 0
        return inside / (machine.intra_node * machine.link_efficiency)

    def between_seconds(self, machine: MachineConfig, per_node: int) -> float:
        """Return the seconds on the links between nodes."""
        return self.between(per_node) / (machine.inter_node * machine.link_efficiency)

    def seconds(self, machine: MachineConfig, per_node: int) -> float:
        """Return the seconds on the slowest link, which sets the speed of a ring."""
        return max(self.inside_seconds(machine, per_node), self.between_seconds(machine, per_node))


def collectives(job: TrainJob, trained: Inventory, world: int) -> list[Collective]:
    """Return the collectives of one optimizer step, without those that send nothing."""
    s = ZeroSettings.of(job, world)
    found = _partitioned(s, job, trained) if s.stage == 3 else _replicated(s, trained)
    return [c for c in found if c.payload and c.ranks > 1]


def _replicated(s: ZeroSettings, trained: Inventory) -> list[Collective]:
    times = s.accumulation if s.stage == 2 else 1
    # The backward pass takes two thirds of a micro-batch's time. Stages 0 and 1 reduce gradients
    # only in the backward pass of the last micro-batch.
    beside = (2 / 3 if s.stage == 2 else 2 / 3 / s.accumulation) if s.stage and s.overlap else 0.0
    gradients = s.size * trained.numel * times
    found = [Collective("gradients", "all_reduce", gradients, s.world, beside)]
    if s.stage:
        weights = s.size * s.world * sum(partition(g, s.world) for g in trained.groups)
        found.append(Collective("weights after the update", "all_gather", weights, s.world))
    return found


def _partitioned(s: ZeroSettings, job: TrainJob, trained: Inventory) -> list[Collective]:
    every = trained.parameters
    small = {p.name for p in every if p.numel <= s.persistence}

    def padded(names: set[str] | None = None) -> int:
        chosen = (p.numel for p in every if names is None or p.name in names)
        return s.size * s.world * sum(-(-n // s.world) for n in chosen)

    trace = trace_gathers(every, small, s.reuse, recomputes(job), s.world)
    forward, backward = s.size * trace.forward, s.size * trace.backward
    beside = 1.0 if s.overlap else 0.0
    muon = [p for g in trained.groups if g.update.is_by_matrix for p in g.params]
    near, n = s.near, s.accumulation
    far = forward if near > 1 else n * (forward + backward)
    found = [
        Collective("weights in forward and backward", "all_gather", far, s.world, beside),
        Collective("small weights after the update", "all_gather", padded(small), s.world),
    ]
    if near > 1:
        close = n * (forward + backward) - forward
        found.append(
            Collective("weights from the nearer partition", "all_gather", close, near, beside)
        )
    if not s.zero.get("reduce_scatter", True):
        payload = n * s.size * trained.numel
        found.append(Collective("gradients", "all_reduce", payload, s.world, beside))
    else:
        found.append(Collective("gradients", "reduce_scatter", n * padded(), s.world, beside))
    if muon:
        gathers = 2 * padded({p.name for p in muon}) + 2 * s.size * _rounds(s, muon)
        found.append(Collective("Muon's gradients and momenta", "all_gather", gathers, s.world))
    return found


def _rounds(s: ZeroSettings, params: Sequence) -> int:
    """Return the elements that the all-gathers of Muon's updates move.

    The matrices are split into buckets. In a bucket each all-gather takes one matrix per rank, and
    pads each to the largest of them.
    """
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
    """Return the seconds of a step in which ranks wait for communication.

    This is the time of collectives that can't overlap with the computation, and the part of the
    others that takes longer than the computation they overlap with. Overlapping collectives share
    the links, so their times add up. computing: seconds of computation per step.
    """
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
