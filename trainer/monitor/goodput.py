"""Where a run's wall clock went, from its first start to its last end.

    attempts    launch.json (begun, ended), seconds by phase in the rows, `ended` events, the last
                heartbeats
    launches    from a start of the ranks to their end: an attempt and those after its rollbacks;
                the same command on a run that was complete changes nothing, so it isn't counted
    buckets     BUCKETS; every second of every launch, and between launches, falls in one of them
    sizes       the ranks and nodes of each launch; seconds of ranks are those of its clock times
                its ranks, so that they are right of a run whose size changes

Invariant: the buckets add up to the wall clock. Time that no row covers, before the first and after
the last row of a launch, is measured by the clocks of its launcher and of rank 0.
"""

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from forescale.ground.errors import DONE, INTERRUPTED, USER
from forescale.monitor.follow import Memory, Steps
from forescale.resilience.heartbeat import read_nodes
from forescale.resilience.outcome import launch_of
from forescale.resilience.phases import training_seconds
from forescale.run.directory import Attempt, Run
from forescale.run.rows import select

BUCKETS = {
    "compute": "forward, backward and update of steps that were kept",
    "data": "waiting for batches",
    "evaluation": "held-out losses",
    "checkpoint": "time that training waits for saves",
    "outer": "exchanging weights with other clusters, and waiting for them",
    "logging": "writing rows, lines and trackers",
    "startup": "the first launch until its first step, and the end of processes",
    "recovery": "start-up of every later launch, and rollbacks",
    "lost": "steps made but not kept, and the time of a failed launch after its last row",
    "waiting": "between launches",
    "queue": "in the queue: could start, and had not started",
}
_START = ("startup", "recovery")


@dataclass
class Launch:
    """One start of the ranks, until their end. Times in seconds since the epoch. steps: of each of
    its attempts; lost: the steps that were discarded; after: seconds by phase after the last row,
    if it ended well; eligible: when the queue could have started it; seconds: of its launcher;
    start: the boot of its machine, and when it began by a clock that nobody sets; limit: why it had
    no more ranks."""

    attempts: list[Attempt]
    begun: float
    rank_began: float | None
    ended: float
    code: int | None  # None: no launcher recorded the end
    how: str = ""
    eligible: float | None = None
    seconds: float | None = None
    start: tuple[str, float] | None = None
    ranks: int = 1
    nodes: int = 1
    limit: str = ""
    steps: list[Steps] = field(default_factory=list)
    lost: list[Steps] = field(default_factory=list)
    after: dict[str, float] = field(default_factory=dict)

    @property
    def recorded(self) -> float:
        """Seconds that its rows and its end account for."""
        return sum(steps.total for steps in self.steps) + sum(self.after.values())

    @property
    def length(self) -> float:
        """Seconds that it lived; those of its launcher hold whatever is done to the clock."""
        length = self.ended - self.begun if self.seconds is None else self.seconds
        return max(length, self.recorded)

    @property
    def head(self) -> float:
        """Seconds until the clock of rank 0 began, of those that nothing else accounts for."""
        head = (self.rank_began or self.begun) - self.begun
        return max(0.0, min(head, self.length - self.recorded))

    def waited(self, before: "Launch") -> float:
        """Return the seconds since `before` ended; by the clock only across machines and boots."""
        if self.start and before.start and self.start[0] == before.start[0]:
            return max(0.0, self.start[1] - before.start[1] - before.length)
        return max(0.0, self.begun - before.ended)

    def queued(self, before: "Launch | None") -> float:
        """Return the seconds in the queue. before: the previous launch."""
        if self.eligible is None:
            return 0.0
        seconds = max(0.0, self.begun - self.eligible)
        return min(seconds, self.waited(before)) if before else seconds

    @property
    def failed(self) -> bool:
        """True unless it was done or interrupted."""
        return self.code not in (DONE, INTERRUPTED)


@dataclass
class SizeSpan:
    """Consecutive kept steps, `first` to `last`, that one number of ranks on one number of nodes
    made. attempts: their numbers; why: there were no more ranks, or what ended more; seconds: of
    the steps without evaluations and saves."""

    first: int
    last: int
    ranks: int
    nodes: int
    attempts: list[int]
    why: str
    seconds: float


@dataclass(frozen=True)
class SaveInterval:
    """A proposal for `checkpoint.every`. stall: seconds per save; restart: seconds until a launch
    trains; mtbf: mean seconds between failures of launches that trained; waste: the expected share
    of time lost."""

    seconds: float
    steps: int
    stall: float
    restart: float
    mtbf: float
    waste: float


class Goodput:
    """The wall clock of one run by bucket. running: its newest launch is alive, so that its last
    steps are not lost yet. memory: the cache of earlier views."""

    def __init__(self, run: Run, running: bool = False, memory: Memory | None = None):
        self.run, self.running, self._memory = run, running, memory or Memory()

    @cached_property
    def launches(self) -> list[Launch]:
        """All launches, oldest first."""
        launches: list[Launch] = []
        for attempt in self.run.attempts():
            parent = attempt.parent
            if launches and parent is not None and parent.rolled_back_from is not None:
                self._prolong(launches[-1], attempt)
            elif launch := self._launch(attempt):
                launches.append(launch)
        for launch in launches:
            if launch.seconds is None:
                launch.ended = max(launch.ended, launch.begun + launch.recorded)
        if launches and self.running and launches[-1].code is None:
            launches[-1].code = DONE  # so far
        return launches

    def _launch(self, attempt: Attempt) -> Launch | None:
        """Return the launch that an attempt began; None if its directory was never used."""
        record = launch_of(attempt.path)
        main = [s.heartbeat for s in read_nodes(attempt.path) if s.heartbeat.rank == 0]
        began = main[0].began if main else None
        begun = record.get("begun", began)
        ended, code = record.get("ended"), record.get("code")
        launch = Launch([], begun or 0.0, began, ended or 0.0, code, record.get("how", ""))
        launch.eligible = record.get("slurm", {}).get("eligible")
        launch.seconds = record.get("seconds")
        launch.ranks = record.get("processes") or len(read_nodes(attempt.path)) or 1
        launch.nodes = len(record.get("slurm", {}).get("nodes", ())) or 1
        launch.limit = record.get("limit", "")
        if (boot := record.get("process")) and (monotonic := record.get("monotonic")) is not None:
            launch.start = boot.partition(":")[0], monotonic
        self._prolong(launch, attempt)
        if begun is None:  # neither launcher nor heartbeats: count back from the last row
            path = attempt.metrics.path
            if not launch.steps or not path.exists():
                return None
            launch.begun = path.stat().st_mtime - launch.recorded
        return launch

    def _prolong(self, launch: Launch, attempt: Attempt) -> None:
        """Add an attempt to its launch."""
        launch.attempts.append(attempt)
        # The seconds of an attempt that ended by a rollback went on counting into the next rows.
        events = self._memory.events(attempt)
        for event in select(events, kind="ended"):
            for phase, seconds in event.get("seconds", {}).items():
                launch.after[phase] = launch.after.get(phase, 0.0) + seconds
            if launch.code is None and event.get("reason") in ("complete", "interrupted"):
                launch.code = DONE if event.get("reason") == "complete" else INTERRUPTED
        if (steps := self._memory.steps_of(attempt, self.run)).count:
            launch.steps.append(steps)
            launch.lost.append(self._memory.lost(attempt, self.run))
        if not launch_of(launch.attempts[0].path).get("ended"):  # when was it last alive?
            beats = [s.heartbeat.time for s in read_nodes(attempt.path)]
            signs = [launch.ended, *(beats or (event.get("time", 0.0) for event in events))]
            if began := launch.rank_began or launch.begun:
                signs.append(began + launch.recorded)  # by the seconds in its rows
            launch.ended = max(signs)

    @cached_property
    def counted(self) -> list[Launch]:
        """The launches without those that found the run complete, and did nothing."""
        launches: list[Launch] = []
        for launch in self.launches:
            was_done = any(earlier.code == DONE for earlier in launches)
            did_nothing = not launch.recorded and launch.code in (None, DONE, INTERRUPTED, USER)
            if not (was_done and did_nothing):
                launches.append(launch)
        return launches

    @cached_property
    def buckets(self) -> dict[str, float]:
        """Seconds by bucket; they add up to `wall`."""
        sums: dict[str, float] = defaultdict(float)
        pairs = zip([None, *self.counted], self.counted, strict=False)
        for i, (before, launch) in enumerate(pairs):
            queued = launch.queued(before)
            sums["queue"] += queued
            sums["waiting"] += launch.waited(before) - queued if before else 0.0
            for bucket, seconds in self._spent(launch, "recovery" if i else "startup"):
                sums[bucket] += seconds
        return {k: sums[k] for k in (*BUCKETS, *sorted(sums.keys() - BUCKETS)) if sums[k]}

    @cached_property
    def rank_seconds(self) -> dict[str, float]:
        """Seconds of ranks by bucket: those of each launch times its ranks, without waits."""
        sums = dict.fromkeys(BUCKETS, 0.0)
        for i, launch in enumerate(self.counted):
            for bucket, seconds in self._spent(launch, "recovery" if i else "startup"):
                sums[bucket] = sums.get(bucket, 0.0) + launch.ranks * seconds
        return {bucket: seconds for bucket, seconds in sums.items() if seconds}

    @cached_property
    def sizes(self) -> list[SizeSpan]:
        """The history of sizes, over the kept steps."""
        steps_of, spans = self._memory.ledger(self.run.metrics).by_attempt, list[SizeSpan]()
        for before, launch in zip([None, *self.launches], self.launches, strict=False):
            why = launch.limit
            if before and before.failed and launch.ranks < before.ranks and not why:
                why = before.how
            for number in (attempt.number for attempt in launch.attempts):
                if not (steps := steps_of.get(number, Steps())).count:
                    continue
                spent, size = training_seconds(steps.seconds), (launch.ranks, launch.nodes)
                if not spans or (spans[-1].ranks, spans[-1].nodes) != size:
                    first = steps.last - steps.count + 1
                    spans.append(SizeSpan(first, steps.last, *size, [number], why, spent))
                else:
                    spans[-1].last = steps.last
                    spans[-1].attempts.append(number)
                    spans[-1].seconds += spent
        return spans

    def _spent(self, launch: Launch, start: str) -> Iterable[tuple[str, float]]:
        for done, lost in zip(launch.steps, launch.lost, strict=True):
            for phase, seconds in done.seconds.items():
                bucket = start if phase == "startup" else phase
                gone = 0.0 if bucket in _START else lost.seconds.get(phase, 0.0)
                yield bucket, seconds - gone
                yield "lost", gone
        for phase, seconds in launch.after.items():
            yield (start if phase == "startup" else phase), seconds
        rest = launch.length - launch.recorded
        # Its last row was written when all the recorded time had passed on rank 0.
        tail = (rest - launch.head if launch.steps else rest) if launch.failed else 0.0
        yield start, rest - tail
        yield "lost", tail

    @property
    def wall(self) -> float:
        """Seconds from the first start (or from when the queue could have started it) to the last
        end. Time in which two launches were alive counts twice."""
        waits = (b.waited(a) for a, b in pairwise(self.counted))
        first = self.counted[0].queued(None) if self.counted else 0.0
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
        """Number of launches that failed, except by an error in the config or the input."""
        return sum(launch.failed and launch.code != USER for launch in self.counted)

    @property
    def alive(self) -> float:
        """Seconds in which a launch was alive."""
        return sum(launch.length for launch in self.counted)

    @property
    def mtbf(self) -> float | None:
        """Mean seconds between failures without waiting times; None without a failure."""
        return self.alive / self.failures if self.failures else None

    @property
    def lost_steps(self) -> int:
        """Number of steps made but not kept."""
        return sum(steps.count for launch in self.launches for steps in launch.lost)

    def interval(self) -> SaveInterval | None:
        """Return the best checkpoint interval by this run's own times; None without a save or a
        failure. See `optimal_interval`. A launch that failed before its first step does not count
        as a failure of training."""
        trained = [launch for launch in self.counted if launch.steps]
        failures = sum(launch.failed and launch.code != USER for launch in trained)
        steps_of = [steps for launch in self.launches for steps in launch.steps]
        by_phase: dict[str, float] = defaultdict(float)
        for seconds in (*(steps.seconds for steps in steps_of), *(x.after for x in self.launches)):
            for phase, spent in seconds.items():
                by_phase[phase] += spent
        saves = len(self.run.read_events(kind="checkpoint_saved"))
        stall = by_phase["checkpoint"] / max(1, saves)
        if not stall or not failures:
            return None
        mtbf = sum(launch.length for launch in trained) / failures
        step = (by_phase["compute"] + by_phase["data"]) / sum(steps.count for steps in steps_of)
        restart = trained[-1].head + trained[-1].steps[0].first.get("startup", 0.0)
        best = optimal_interval(stall, mtbf)
        num_steps = max(1, round(best / step)) if step else 1
        waste = wasted(best, stall, restart, mtbf)
        return SaveInterval(best, num_steps, stall, restart, mtbf, waste)


def optimal_interval(stall: float, mtbf: float) -> float:
    """Return the seconds of training between two saves that lose the least time.

    Young 1974, "A first order approximation to the optimum checkpoint interval": the root of
    2 stall mtbf. Here with the higher terms of Daly 2006, "A higher order estimate of the optimum
    checkpoint interval for restart dumps"; mtbf where the stall is twice that or more. The
    time of a restart doesn't change the optimum.
    """
    if stall >= 2 * mtbf:
        return mtbf
    x = stall / (2 * mtbf)
    return math.sqrt(2 * stall * mtbf) * (1 + math.sqrt(x) / 3 + x / 9) - stall


def wasted(interval: float, stall: float, restart: float, mtbf: float) -> float:
    """Return the share of time spent on saving and, after a failure, on a restart and on repeating
    half an interval; first order, at most 1."""
    if not interval:
        return 0.0
    return min(1.0, stall / (interval + stall) + (restart + interval / 2) / mtbf)
