"""Which ranks are slow: those that need far longer for their own work than the others do.

Invariant: only places where ranks do the same work, each alone, are compared. Where they wait for
each other the slow one waits least, and all the others would look slow; rank 0 alone writes rows.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import median_low

from forescale.resilience.heartbeat import Beat

ALONE = ("data", "forward")
FEWEST_STEPS = 10  # that a pace is taken of
_WORTH = 0.05  # of a step's time: less is noise


@dataclass(frozen=True)
class Straggler:
    """seconds, median: a step at the place, of this rank and of all."""

    rank: int
    host: str
    at: str
    seconds: float
    median: float
    steps: int

    @property
    def sentence(self) -> str:
        times = f" ({self.seconds / self.median:.1f} times)" if self.median else ""
        return (
            f"rank {self.rank} on host {self.host} is slow: {self.seconds * 1e3:.1f} ms a step in "
            f"{self.at} where the median of all is {self.median * 1e3:.1f} ms{times}, over "
            f"{self.steps} steps"
        )


def stragglers(
    beats: Sequence[Beat], factor: float, waits: Collection[str] = ()
) -> list[Straggler]:
    """The ranks that need more than `factor` times the median of all at some place, one that costs
    at least a twentieth of a step; the slowest first.

    Of two ranks the faster one is the median: a mean of both would hide the slower for ever.
    """
    beats = [b for b in beats if b.steps >= FEWEST_STEPS and not b.has_ended]
    if len(beats) < 2:
        return []
    whole = median_low([sum(b.pace.values()) for b in beats])
    found = []
    for at in ALONE:
        if at in waits:
            continue
        middle = median_low([b.pace.get(at, 0.0) for b in beats])
        for b in beats:
            mine = b.pace.get(at, 0.0)
            if mine > factor * middle and mine - middle > _WORTH * whole:
                found.append(Straggler(b.rank, b.host, at, mine, middle, b.steps))
    return sorted(found, key=lambda s: s.median - s.seconds)
