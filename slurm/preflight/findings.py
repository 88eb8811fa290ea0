"""What a node must have, the faults of nodes, and their judgement: no sockets, no clock.

Invariant: a fault that all nodes share is the user's to fix, any other is a fault of its node. Only
the best pair of a node counts for its speed, so a slow neighbour can't make it look slow.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median_high
from typing import Any

ALL = "all nodes"


@dataclass(frozen=True)
class Requirements:
    """What a node must have. Sizes in bytes.

    run: the run's directory, absolute; data: datasets (URLs are skipped); tasks: ranks per node;
    gpus: visible to each task, 0 for none; memory: host memory for all ranks of a node; scratch: a
    directory on the local disk, with scratch_bytes free; skew: largest difference of its clock from
    the supervisor's, in seconds; reduce: measure the network, with messages of reduce_bytes; slow:
    a node is slow if its best pair is this many times slower than the median; min_gb_per_second: of
    a pair; cuda: measure with NCCL on the first GPU, else with gloo.
    """

    run: str
    data: list[str]
    tasks: int
    gpus: int
    memory: int | None
    scratch: str | None
    scratch_bytes: int
    skew: float = 2.0
    reduce: bool = True
    reduce_bytes: int = 1 << 24
    slow: float = 3.0
    min_gb_per_second: float | None = None
    cuda: bool = False


@dataclass(frozen=True)
class NodeFault:
    """A fault of a node. kind: faults of one kind on several nodes count as one, even if their
    numbers differ; note: True if training is still possible."""

    host: str
    problem: str
    todo: str
    kind: str = ""
    note: bool = False

    @property
    def sentence(self) -> str:
        return f"{self.host}: {self.problem}; {self.todo}"


@dataclass(frozen=True)
class PreflightReport:
    """The result of a preflight. nodes: the facts of each host (address, seconds of its checks,
    skew_seconds, memory, cpus, gpus, gb_per_second of its best pair in each direction, ...); {} if
    it sent nothing. gb_per_second: of an all-reduce over all nodes, as bytes of the message per
    second of the slowest node; None if it was not measured."""

    faults: list[NodeFault]
    notes: list[str]
    nodes: dict[str, dict[str, Any]]
    gb_per_second: float | None
    seconds: float

    @property
    def common(self) -> list[NodeFault]:
        """Faults of all nodes, each once, for the user to fix. Of a single node: all its faults."""
        return merged(self.faults, self.nodes)[0]

    @property
    def of_nodes(self) -> dict[str, str]:
        """By host: the faults that not all nodes have, as a sentence without the host."""
        sentences: dict[str, str] = {}
        for f in merged(self.faults, self.nodes)[1]:
            before = sentences.get(f.host)
            sentences[f.host] = (
                f"{before}; also {f.problem}" if before else f"{f.problem}; {f.todo}"
            )
        return sentences


def merged(
    faults: list[NodeFault], hosts: Iterable[str]
) -> tuple[list[NodeFault], list[NodeFault]]:
    """Return the faults of all hosts, each once, and the faults of only some."""
    groups: dict[tuple[str, bool], list[NodeFault]] = {}
    for fault in faults:
        groups.setdefault((fault.kind or fault.problem, fault.note), []).append(fault)
    common: list[NodeFault] = []
    of_nodes: list[NodeFault] = []
    for group in groups.values():
        first, among = group[0], {f.host for f in group}
        if not among.issuperset(hosts):
            of_nodes += group
        elif len(among) == 1:
            common += group
        elif len({f.problem for f in group}) == 1:
            common.append(replace(first, host=ALL))
        else:
            problem = f"{first.problem} (on {first.host}; similar on the others)"
            common.append(replace(first, host=ALL, problem=problem))
    return common, of_nodes


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Return rounds of pairs of neighbours in a ring; each node is in two pairs, so a slow node
    can't make its neighbour look slow. An odd ring needs a third round to close."""
    first = [(i, i + 1) for i in range(0, nodes - 1, 2)]
    if nodes < 3:
        return [first] if first else []
    second = [(i, i + 1) for i in range(1, nodes - 1, 2)]
    closing = (nodes - 1, 0)
    return [first, [*second, closing]] if nodes % 2 == 0 else [first, second, [closing]]


def best_pairs(pairs: dict[tuple[str, str], float]) -> dict[str, float]:
    """Return the rate of each host's best pair."""
    best: dict[str, float] = {}
    for pair, rate in pairs.items():
        for host in pair:
            best[host] = max(rate, best.get(host, 0.0))
    return best


def slow_nodes(pairs: dict[tuple[str, str], float], slow: float) -> dict[str, float]:
    """Return the rates of hosts whose best pair is more than `slow` times slower than the median;
    empty for two nodes, whose only pair doesn't show which of them is slow."""
    best = best_pairs(pairs)
    if len(best) < 3:
        return {}
    middle = median_high(best.values())
    return {host: rate for host, rate in best.items() if rate * slow < middle}


def skew_of(sent: float, answered: float, received: float) -> float:
    """Return the smallest possible difference of a node's clock from ours, in seconds. By its clock
    it sent a message at `sent` and received our answer at `received`; by ours we answered at
    `answered`. Network delays don't count as a difference."""
    return max(sent - answered, min(received - answered, 0.0))
