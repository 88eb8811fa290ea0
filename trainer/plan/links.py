"""The time of collectives on the links of a machine, and how long a step waits for them.

The time of a collective is latency + bytes / speed, as NCCL's own model has it (ncclTopoTuneModel
in src/graph/tuning.cc of NCCL 2.30). For S bytes over n ranks of m nodes:
- A ring takes n-1 steps for an all-gather or a reduce-scatter, m-1 of them between nodes, and twice
  as many for an all-reduce. Each rank sends (n-1)/n S, or twice that (Patarasu and Yuan 2009,
  "Bandwidth optimal all-reduce algorithms"). A ring over several nodes enters and leaves each node
  once, so a node sends as much as one GPU, through all its network cards together.
- An all-reduce over several nodes may be a tree instead: its latency is that of 2 (n/m - 1) steps
  in a node and 2 log2(m) between nodes, at 0.92 of the speed. NCCL takes what is faster.
NCCL has no tree for all-gathers and reduce-scatters over several GPUs of each node, so their
latency grows with the number of ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from forescale.plan.config import MachineConfig

Kind = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]

_TREE = 0.92  # speed of NCCL's tree, as a fraction of the ring's
_START = 14e-6  # seconds: NCCL's base latency of a collective (its protocol LL128)


@dataclass(frozen=True)
class Collective:
    """All collectives of one kind in a step.

    payload: bytes of the whole tensors, of an all-to-all those of one rank, on average; of Muon's
    matrices those of the first, which has the most. ranks: number of ranks that take part. calls:
    number of collectives. beside: the fraction of the step's computation that they can overlap
    with, on a machine that overlaps. stride: from each of the ranks to the next; between them are
    those of as many other groups that do the same at the same time. is_direct: all that a rank
    sends goes to the next one, as all of kind "send" does; as an all-to-all in a ring. is_inner:
    micro-batches wait for it, and so does a pipeline that fills or empties.
    """

    label: str
    kind: Kind
    payload: int
    ranks: int
    calls: int = 1
    beside: float = 0.0
    stride: int = 1
    is_direct: bool = False
    is_inner: bool = False

    @property
    def sent(self) -> int:
        """Bytes that each rank sends per step."""
        if self.is_direct:
            return self.payload
        return self._rounds * (self.ranks - 1) * self.payload // self.ranks

    @property
    def _rounds(self) -> int:
        return 2 if self.kind == "all_reduce" else 1

    def between(self, per_node: int) -> int:
        """Return the bytes that a node of `per_node` ranks sends to other nodes."""
        same = self._on_one_node(per_node)
        if self.ranks <= same:
            return 0
        if self.kind == "all_to_all" and not self.is_direct:  # each rank sends to each
            return per_node * (self.ranks - same) * self.payload // self.ranks
        return min(self.stride, per_node) * self.sent

    def _on_one_node(self, per_node: int) -> int:
        """Return how many of the ranks are on one node."""
        return max(1, per_node // self.stride)

    def inside_seconds(self, machine: MachineConfig, per_node: int) -> float:
        """Return the seconds on the links inside a node, without latency."""
        inside = self.sent if self._on_one_node(per_node) > 1 else 0
        return inside / (machine.intra_node * machine.link_efficiency)

    def between_seconds(self, machine: MachineConfig, per_node: int) -> float:
        """Return the seconds on the links between nodes, without latency."""
        return self.between(per_node) / (machine.inter_node * machine.link_efficiency)

    def latency_seconds(self, machine: MachineConfig, per_node: int) -> float:
        """Return the seconds of all steps from rank to rank, however few bytes are sent."""
        return self._fastest(machine, per_node)[0]

    def seconds(self, machine: MachineConfig, per_node: int) -> float:
        """Return the seconds of all calls: their latency, and the bytes on the slowest link."""
        return sum(self._fastest(machine, per_node))

    def _fastest(self, machine: MachineConfig, per_node: int) -> tuple[float, float]:
        """Return (seconds of latency, seconds of bytes) of the faster algorithm."""
        inside, between = machine.intra_latency, machine.inter_latency
        nodes = -(-self.ranks // self._on_one_node(per_node))
        crossed = self._rounds * (nodes - 1)
        steps = self._rounds * (self.ranks - 1) - crossed
        moving = max(
            self.inside_seconds(machine, per_node), self.between_seconds(machine, per_node)
        )
        ring = self.calls * (_START + steps * inside + crossed * between), moving
        if self.kind in ("all_to_all", "send"):
            return self.calls * (_START + (between if nodes > 1 else inside)), moving
        if self.kind != "all_reduce" or nodes == 1:
            return ring
        deep = 2 * ((self._on_one_node(per_node) - 1) * inside + math.log2(nodes) * between)
        return min(ring, (self.calls * (_START + deep), moving / _TREE), key=sum)


def exposed(
    traffic: Sequence[Collective], machine: MachineConfig, per_node: int, computing: float
) -> float:
    """Return the seconds of a step in which ranks wait for communication.

    A collective that cannot overlap with the computation costs its whole time. Another one costs
    the longer of two times: the part that exceeds the computation it overlaps with, or what it
    takes from the computation: its copies and sums occupy a GPU and its memory for as long as its
    bytes take on the links of a node, and its latency is waited for. Only the extra time on slower
    links is hidden (measured on 8 to 512 GPUs: README.md). Overlapping collectives share the links,
    so their times add up. computing: seconds of forward and backward per step.
    """
    hidden = waiting = room = taken = 0.0
    for c in traffic:
        seconds = c.seconds(machine, per_node)
        if machine.overlap and c.beside:
            hidden += seconds
            taken += c.latency_seconds(machine, per_node) + c.inside_seconds(machine, per_node)
            room = max(room, c.beside * computing)
        else:
            waiting += seconds
    return waiting + max(taken, hidden - room)
