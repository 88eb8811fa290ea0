"""What a node must have, what is wrong with which, and how that is judged: no sockets, no clock.

Invariant: a fault that all nodes share is the user's, any other is a node's; a node is called slow
by its best pair alone, so that its neighbour can't make it look slow.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median_high
from typing import Any

ALL = "all nodes"


@dataclass(frozen=True)
class Wanted:
    """What a node must have. Sizes in bytes.

    run: the run's directory, absolute; data: datasets (URLs are passed over); tasks: ranks a node;
    gpus: that a task must see, 0 for none; memory: of the host, for all ranks of a node; scratch: a
    directory on the node's own disk, with scratch_bytes free; skew: seconds that its clock may
    differ from the supervisor's; reduce: measure the network, with messages of reduce_bytes; slow:
    a node is slow whose best pair is so many times slower than the median; min_gb_per_second:
    of a pair; cuda: measure with NCCL on the first GPU, else with gloo.
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
class Fault:
    """kind: faults of one kind are the same fault, though numbers in `what` differ; note: it keeps
    nobody from training."""

    host: str
    what: str
    todo: str
    kind: str = ""
    note: bool = False

    @property
    def sentence(self) -> str:
        return f"{self.host}: {self.what}; {self.todo}"

    @property
    def identity(self) -> tuple[str, bool]:
        return self.kind or self.what, self.note


@dataclass(frozen=True)
class Report:
    """nodes: of each host its facts (address, seconds until it had looked around, skew_seconds,
    memory, cpus, gpus, gb_per_second of its best pair, each way, ...), {} of a host that said
    nothing. gb_per_second: of the all-reduce over all nodes, algorithm bandwidth: bytes of the
    message over seconds, of the slowest node; None where it was not measured."""

    faults: list[Fault]
    notes: list[str]
    nodes: dict[str, dict[str, Any]]
    gb_per_second: float | None
    seconds: float

    @property
    def common(self) -> list[Fault]:
        """What every node has, as one fault each: the user's to mend. Of a single node all."""
        return merged(self.faults, self.nodes)[0]

    @property
    def of_nodes(self) -> dict[str, str]:
        """By host, in a sentence without its name, what other nodes don't have: its own fault."""
        said: dict[str, str] = {}
        for f in merged(self.faults, self.nodes)[1]:
            rest = f"; also {f.what}"
            said[f.host] = said[f.host] + rest if f.host in said else f"{f.what}; {f.todo}"
        return said


def merged(faults: list[Fault], hosts: Iterable[str]) -> tuple[list[Fault], list[Fault]]:
    """What all hosts have, once; and what only some have."""
    groups: dict[tuple[str, bool], list[Fault]] = {}
    for fault in faults:
        groups.setdefault(fault.identity, []).append(fault)
    common: list[Fault] = []
    own: list[Fault] = []
    for group in groups.values():
        first, among = group[0], {f.host for f in group}
        if not among.issuperset(hosts):
            own += group
        elif len(among) == 1:
            common += group
        elif len({f.what for f in group}) == 1:
            common.append(replace(first, host=ALL))
        else:
            what = f"{first.what} (so {first.host}; the others alike)"
            common.append(replace(first, host=ALL, what=what))
    return common, own


def rounds(nodes: int) -> list[list[tuple[int, int]]]:
    """Rounds of pairs of neighbours in a ring, so that each node has two pairs, and a slow one
    can't make its neighbour look slow. An odd ring needs a third round to close."""
    first = [(i, i + 1) for i in range(0, nodes - 1, 2)]
    if nodes < 3:
        return [first] if first else []
    second = [(i, i + 1) for i in range(1, nodes - 1, 2)]
    closing = (nodes - 1, 0)
    return [first, [*second, closing]] if nodes % 2 == 0 else [first, second, [closing]]


def best_pairs(pairs: dict[tuple[str, str], float]) -> dict[str, float]:
    """Of each host the rate of its best pair."""
    best: dict[str, float] = {}
    for pair, rate in pairs.items():
        for host in pair:
            best[host] = max(rate, best.get(host, 0.0))
    return best


def slow_nodes(pairs: dict[tuple[str, str], float], slow: float) -> dict[str, float]:
    """Hosts whose best pair is more than `slow` times slower than the median host's, with its rate.
    Of two nodes nobody: both ends of the only pair are the same to us."""
    best = best_pairs(pairs)
    if len(best) < 3:
        return {}
    middle = median_high(best.values())
    return {host: rate for host, rate in best.items() if rate * slow < middle}


def skew_of(sent: float, answered: float, received: float) -> float:
    """The least by which a node's clock can differ from ours: it spoke at `sent` and heard our
    answer at `received`, by its clock; we answered at `answered`. Delays don't count as skew."""
    return max(sent - answered, min(received - answered, 0.0))
