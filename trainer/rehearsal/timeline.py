"""What a rank computes while a collective is under way, by the order in which it launches both.

A GPU runs what is launched on a stream in that order. A collective runs beside all of them, from
where it is launched to where the stream of the computation waits for it: itself, or for a stream
that waited for it before. If another of as many ranks is under way, it starts when that has ended.
The computation stands still for as long as it waits.

Invariant: what was computed between launch and wait counts for each collective that was under way;
kernels on other streams than that of the computation count for none.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from forescale.plan.links import Collective
from forescale.rehearsal.device import Stream


@dataclass
class _Travel:
    """A collective under way. flops: computed before it; needed: its seconds; end: when it ends;
    stream: that waits for it; work: its handle, which lives as long, so that no other has its
    number."""

    collective: Collective
    flops: float
    needed: float
    end: float
    stream: Stream | None
    work: Any


class Timeline:
    """The collectives of a step, in the order of launches. `seconds_of` is set where a machine is
    known."""

    def __init__(self) -> None:
        self.seconds_of: Callable[[Collective], float] = lambda _: 0.0
        Stream.joined = self._joined
        self.reset()

    def reset(self) -> None:
        self._flops = self._now = 0.0
        self._free: dict[int, float] = {}  # when the last collective of so many ranks ends
        self._under_way: dict[int, _Travel] = {}
        self.rows: dict[tuple[str, int], dict[str, Any]] = {}

    def compute(self, flops: float, seconds: float) -> None:
        """Count what is launched on the current stream."""
        if Stream.current is Stream.main:
            self._flops, self._now = self._flops + flops, self._now + seconds

    def begin(self, work: Any, key: int, collective: Collective) -> None:
        """Count a collective. key: by which its wait will name it."""
        needed, ranks = self.seconds_of(collective), collective.ranks
        end = self._free[ranks] = max(self._now, self._free.get(ranks, 0.0)) + needed
        self._under_way[key] = _Travel(collective, self._flops, needed, end, None, work)

    def wait(self, key: int) -> None:
        """Let the current stream wait for a collective."""
        if key in self._under_way:
            self._under_way[key].stream = Stream.current
            if Stream.current is Stream.main:
                self._end(key)

    def end(self) -> None:
        """End what is still under way."""
        for key in [*self._under_way]:
            self._end(key)

    def _joined(self, stream: Stream, other: Stream) -> None:
        """Let a stream wait for what another has waited for."""
        for key, travel in [*self._under_way.items()]:
            if travel.stream is other:
                travel.stream = stream
                if stream is Stream.main:
                    self._end(key)

    def _end(self, key: int) -> None:
        travel = self._under_way.pop(key)
        c, still = travel.collective, max(0.0, travel.end - self._now)
        self._now += still
        row = self.rows.setdefault((c.kind, c.ranks), {"calls": 0, "flops": 0.0, "exposed": 0.0})
        row["calls"] += 1
        row["flops"] += self._flops - travel.flops
        row["exposed"] += c.payload * min(1.0, still / travel.needed) if travel.needed else 0.0
