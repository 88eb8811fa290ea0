"""Where a run's wall clock went, from its first start to its last end.

    attempts    launch.json (begun, ended), the rows' seconds by phase, `ended` events, last beats
    launches    one life of the ranks: an attempt, and those that it rolled back into
    buckets     BUCKETS; every second of every launch, and between launches, falls in one of them

Invariant: the buckets add up to the wall clock. What no row tells of, before the first and after
the last row of a launch, is measured by the clocks of its launcher and of rank 0.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

from forescale.errors import DONE, INTERRUPTED, USER
from forescale.resilience.heartbeat import shared
from forescale.resilience.outcome import launch_of
from forescale.run.directory import Attempt, Run, read_rows

BUCKETS = {
    "compute": "forward, backward and update of steps that were kept",
    "data": "waiting for batches",
    "evaluation": "held-out losses",
    "checkpoint": "the stall of saving",
    "logging": "rows, lines, trackers",
    "startup": "the first launch until its first step, and the end of processes",
    "recovery": "start-up of every later launch, and rollbacks",
    "lost": "steps made and not kept, and what a dead launch did after its last row",
    "waiting": "between launches",
    "queue": "eligible, and not yet started",
}
_START = ("startup", "recovery")


@dataclass
class Launch:
    """One life of the ranks. Times in seconds since the epoch; rows: those that it made itself, in
    their order; after: seconds by phase after the last row, where it ended well."""

    attempts: list[Attempt]
    begun: float
    rank_began: float | None
    ended: float
    code: int | None  # None: nobody saw it end
    how: str = ""
    eligible: float | None = None  # since when it could have begun, where a queue had it
    rows: list[dict[str, Any]] = field(default_factory=list)
    after: dict[str, float] = field(default_factory=dict)

    @property
    def told(self) -> float:
        """Seconds that its rows tell of."""
        return sum(sum(r["seconds"].values()) for r in self.rows) + sum(self.after.values())

    @property
    def head(self) -> float:
        """Seconds until rank 0 counted its own."""
        return (self.rank_began or self.begun) - self.begun

    def queued(self, before: float | None) -> float:
        """Seconds that it could have begun, and hadn't. before: when the launch before it ended."""
        if self.eligible is None:
            return 0.0
        since = self.eligible if before is None else max(self.eligible, before)
        return max(0.0, self.begun - since)

    @property
    def failed(self) -> bool:
        return self.code not in (DONE, INTERRUPTED)


@dataclass(frozen=True)
class Interval:
    """A proposal for `checkpoint.every`. stall: seconds a save; restart: seconds until a launch
    trains; mtbf: mean seconds between failures, `assumed` where there was none; waste: the share of
    time that is lost at this interval."""

    seconds: float
    steps: int
    stall: float
    restart: float
    mtbf: float
    assumed: bool
    waste: float


class Goodput:
    """Of one run. running: its newest launch is alive, so that what it does is not lost yet."""

    def __init__(self, run: Run, running: bool = False):
        self.run, self.running = run, running

    @cached_property
    def launches(self) -> list[Launch]:
        found: list[Launch] = []
        for attempt in self.run.attempts():
            parent = attempt.parent
            if found and parent is not None and parent.ill is not None:
                _prolong(found[-1], attempt)
            elif launch := _launch(attempt):
                found.append(launch)
        for launch in found:
            launch.ended = max(launch.ended, launch.begun + launch.told)
        if found and self.running and found[-1].code is None:
            found[-1].code = DONE  # so far
        return found

    @cached_property
    def _kept(self) -> set[tuple[int, int]]:
        rows = read_rows(self.run.metrics)
        return {(r["attempt"], r["step"]) for r in rows if r["kind"] == "train"}

    @cached_property
    def buckets(self) -> dict[str, float]:
        """Seconds by bucket; they add up to `wall`."""
        sums: dict[str, float] = defaultdict(float)
        before = None
        for i, launch in enumerate(self.launches):
            queued = launch.queued(before)
            sums["queue"] += queued
            if before is not None:
                sums["waiting"] += max(0.0, launch.begun - before) - queued
            for bucket, seconds in self._spent(launch, "recovery" if i else "startup"):
                sums[bucket] += seconds
            before = launch.ended
        return {k: sums[k] for k in (*BUCKETS, *sorted(sums.keys() - BUCKETS)) if sums[k]}

    def _spent(self, launch: Launch, start: str) -> Iterable[tuple[str, float]]:
        for row in launch.rows:
            kept = (row["attempt"], row["step"]) in self._kept
            for phase, seconds in row["seconds"].items():
                bucket = start if phase == "startup" else phase
                yield (bucket if kept or bucket in _START else "lost"), seconds
        for phase, seconds in launch.after.items():
            yield (start if phase == "startup" else phase), seconds
        rest = launch.ended - launch.begun - launch.told
        # Its last row was written when rank 0 had lived through all that the rows tell.
        tail = (rest - min(launch.head, rest) if launch.rows else rest) if launch.failed else 0.0
        yield start, rest - tail
        yield "lost", tail

    @property
    def wall(self) -> float:
        """Seconds from the first start, or since the queue could have begun it, to the last end;
        where an old launch was still alive when the next one began, that time counts twice."""
        waits = (max(0.0, b.begun - a.ended) for a, b in pairwise(self.launches))
        first = self.launches[0].queued(None) if self.launches else 0.0
        return first + self.alive + sum(waits)

    @property
    def ettr(self) -> float:
        """Effective training time ratio: seconds of compute of the steps that count, over the wall
        clock, waits between launches included. The term is of Kokolis et al. 2024, "Revisiting
        Reliability in Large-Scale Machine Learning Research Clusters" (arXiv 2410.21680), where all
        kept time counts as productive; here only compute does."""
        return self.buckets.get("compute", 0.0) / self.wall if self.wall else 0.0

    @property
    def failures(self) -> int:
        """Launches that ended badly, through no fault of the config or the input."""
        return sum(launch.failed and launch.code != USER for launch in self.launches)

    @property
    def alive(self) -> float:
        """Seconds in which some launch was alive."""
        return sum(launch.ended - launch.begun for launch in self.launches)

    @property
    def mtbf(self) -> float | None:
        """Mean seconds between failures, waits not counted; None where there was none."""
        return self.alive / self.failures if self.failures else None

    @property
    def lost_steps(self) -> int:
        rows = (row for launch in self.launches for row in launch.rows)
        return sum((row["attempt"], row["step"]) not in self._kept for row in rows)

    def interval(self) -> Interval | None:
        """The checkpoint interval that this run's own numbers ask for; None where nothing was saved
        yet. See `optimal_interval`; without a failure the mean time between them is taken as a
        third of the time seen, which it exceeds with 95 % confidence (the rule of three: Hanley and
        Lippman-Hand 1983)."""
        rows = [row for launch in self.launches for row in launch.rows]
        by_phase: Counter[str] = Counter()
        for told in [*(row["seconds"] for row in rows), *(x.after for x in self.launches)]:
            by_phase.update(told)
        stall = by_phase["checkpoint"] / max(1, self._saves())
        if not rows or not stall:
            return None
        step = (by_phase["compute"] + by_phase["data"]) / len(rows)
        last = next(launch for launch in reversed(self.launches) if launch.rows)
        restart = last.head + last.rows[0]["seconds"].get("startup", 0.0)
        mtbf = self.mtbf or self.alive / 3
        seconds = optimal_interval(stall, mtbf)
        return Interval(
            seconds=seconds,
            steps=max(1, round(seconds / step)) if step else 1,
            stall=stall,
            restart=restart,
            mtbf=mtbf,
            assumed=not self.failures,
            waste=wasted(seconds, stall, restart, mtbf),
        )

    def _saves(self) -> int:
        rows = (r for a in self.run.attempts() for r in read_rows(a.events.path))
        return sum(r["kind"] == "checkpoint_saved" for r in rows)


def _launch(attempt: Attempt) -> Launch | None:
    """None for a directory that nobody began to use."""
    told = launch_of(attempt.path)
    beats = {s.beat.rank: s.beat for s in shared(attempt.path)}
    began = beats[0].began if 0 in beats else None
    begun = told.get("begun", began)
    ended, code = told.get("ended"), told.get("code")
    made = Launch([], begun or 0.0, began, ended or 0.0, code, told.get("how", ""))
    made.eligible = told.get("slurm", {}).get("eligible")
    _prolong(made, attempt)
    if begun is None:  # from before there were beats: back from when its last row was written
        path = attempt.metrics.path
        if not made.rows or not path.exists():
            return None
        made.begun = path.stat().st_mtime - made.told
    return made


def _prolong(launch: Launch, attempt: Attempt) -> None:
    """Add what an attempt of the launch tells."""
    launch.attempts.append(attempt)
    rows = read_rows(attempt.metrics.path)
    own = [r for r in rows if r["kind"] == "train" and r["attempt"] == attempt.number]
    # The seconds of an attempt that ended by a rollback went on counting into the next one's rows.
    events = read_rows(attempt.events.path)
    for event in events:
        if event["kind"] == "ended":
            for phase, seconds in event["seconds"].items():
                launch.after[phase] = launch.after.get(phase, 0.0) + seconds
            if launch.code is None and event["reason"] in ("complete", "interrupted"):
                launch.code = DONE if event["reason"] == "complete" else INTERRUPTED
    launch.rows += own
    if not launch_of(launch.attempts[0].path).get("ended"):
        launch.ended = max([launch.ended, *_signs(launch, attempt, events)])


def _signs(launch: Launch, attempt: Attempt, events: list[dict[str, Any]]) -> Iterable[float]:
    """When it was alive: beats, events, and the time that the rows tell since it began."""
    yield from (s.beat.time for s in shared(attempt.path))
    yield from (event["time"] for event in events)
    if began := launch.rank_began or launch.begun:
        yield began + launch.told


def optimal_interval(stall: float, mtbf: float) -> float:
    """Seconds of training between two saves that lose least in all.

    Young 1974, "A first order approximation to the optimum checkpoint interval": the root of
    2 stall mtbf. Here with the higher terms of Daly 2006, "A higher order estimate of the optimum
    checkpoint interval for restart dumps"; mtbf where the stall is twice that or more. The
    time of a restart doesn't move the optimum.
    """
    if stall >= 2 * mtbf:
        return mtbf
    x = stall / (2 * mtbf)
    return math.sqrt(2 * stall * mtbf) * (1 + math.sqrt(x) / 3 + x / 9) - stall


def wasted(interval: float, stall: float, restart: float, mtbf: float) -> float:
    """The share of time that goes into saving, and, at a failure, into a restart and half of an
    interval done again; first order, at most 1."""
    if not interval:
        return 0.0
    return min(1.0, stall / (interval + stall) + (restart + interval / 2) / mtbf)
