"""The progress of runs, read from their files; for `forescale status`, which must start at once.

Invariant: derived, never stored; only what the files show. They show when they last grew, not
whether a process lives: `running` means that they grew lately, by the run's own pace. Imports
neither torch nor deepspeed.
"""

import time
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from forescale.checkpoint.reader import Checkpoint
from forescale.checkpoint.retention import is_pinned
from forescale.config.frozen import thaw
from forescale.config.train import TrainJob
from forescale.ground.errors import INTERRUPTED, USER, UserError
from forescale.monitor.curve import losses_of
from forescale.monitor.follow import Mark, Memory, Tail, marks_of
from forescale.monitor.goodput import Goodput
from forescale.resilience.diagnosis import Hang, read_hang
from forescale.resilience.heartbeat import RankStatus, read_nodes
from forescale.resilience.injector import records
from forescale.resilience.outcome import LAUNCH, LaunchRecord, launch_of
from forescale.resilience.phases import training_seconds
from forescale.run.directory import Attempt, Run
from forescale.run.rows import Row, read_rows, select

State = Literal[
    "new", "imported", "averaged", "running", "interrupted", "halted", "refused", "crashed",
    "complete",
]  # fmt: skip
_PATIENCE = 60.0  # seconds, besides twice the longest step with its evaluation and save
_AHEAD = 3600.0  # most seconds that the clock of a file server may be ahead of ours
_SAVED = ("checkpoint_saved", "snapshot_saved", "forecast_anew")  # events of every run


@dataclass(frozen=True)
class Lost:
    """Steps that were discarded, because a later attempt started before them."""

    steps: int
    seconds: float


class Status:
    """The status of one run at one moment: nothing is read twice. Its rows are those of the newest
    attempt, from the first step on. memory: the cache of earlier views."""

    def __init__(self, run: Run, now: float | None = None, memory: Memory | None = None):
        self.run, self.now = run, time.time() if now is None else now
        self.began = self.now  # no file was read before
        self._memory = memory or Memory()
        self.job_runs = False  # SLURM says that a job of it runs, whatever the files show
        self._goodput: dict[bool, Goodput] = {}  # by whether its newest launch is alive
        self._state: tuple[float, State] | None = None

    @cached_property
    def job(self) -> TrainJob:
        """The run's frozen job."""
        read = lambda path: thaw(TrainJob, path, trust=True)  # noqa: E731
        return self._memory.once(self.run.config, read)

    @cached_property
    def attempts(self) -> list[Attempt]:
        """All attempts, oldest first."""
        return self.run.attempts()

    @cached_property
    def train(self) -> list[Row]:
        """The train rows, one per step. A long run has many, so they are read on demand."""
        return read_rows(self.run.metrics, kind="train")

    @cached_property
    def _tail(self) -> Tail:
        return self._memory.tail(self.run.metrics)

    @cached_property
    def recent(self) -> list[Row]:
        """The last train rows, from which the speed is computed: those with the ranks of the last.
        (An attempt that a rollback began has no launch record.)"""
        folder, rows = self.run.path / "attempts", self._tail.steps
        ranks_of = lambda path: launch_of(path.parent).get("processes")  # noqa: E731
        numbers = [row.get("attempt", 0) for row in rows]
        paths = {number: folder / f"{number:04d}" / LAUNCH for number in numbers}
        ranks = {number: self._memory.once(path, ranks_of) for number, path in paths.items()}
        last = ranks[numbers[-1]] if rows else None
        pairs = zip(rows, numbers, strict=True)
        return [row for row, n in pairs if ranks[n] in (last, None) or last is None]

    @cached_property
    def losses(self) -> list[tuple[int, float]]:
        """Steps and losses: all, or of a long run some; enough for a small curve."""
        return losses_of(self.run.metrics)

    @property
    def last(self) -> Row:
        """The last train row; empty before the first step."""
        return self.recent[-1] if self.recent else {}

    @property
    def step(self) -> int:
        """Steps made so far."""
        return self.last.get("step", 0)

    @property
    def tokens(self) -> int:
        """Tokens trained on so far."""
        return self.last.get("tokens", 0)

    @property
    def step_seconds(self) -> float | None:
        """Seconds of a step, over the last steps, without evaluation and saving; None before the
        first step."""
        recent = [training_seconds(row.get("seconds", {})) for row in self.recent]
        return (sum(recent) / len(recent) or None) if recent else None

    @property
    def tokens_per_second(self) -> float | None:
        seconds = self._window_seconds
        return None if seconds is None else self.job.tokens_per_window / seconds

    @property
    def _window_seconds(self) -> float | None:
        """Seconds that these steps took for a window, of which the first steps may have fewer."""
        ramp, steps = self.job.batch_ramp, [row["step"] for row in self.recent]
        if self.step_seconds is None:
            return None
        return self.step_seconds * len(steps) / sum(ramp.windows(step - 1) for step in steps)

    @property
    def seconds_left(self) -> float | None:
        """Seconds of the steps that are left, without evaluations and saves; None after the last
        step and before the first, and of a run that doesn't run."""
        if not (self.job_runs or self.state == "running"):
            return None
        left, seconds = self.job.windows_after(self.step), self._window_seconds
        return seconds * left if seconds and left > 0 else None

    def sizes(self) -> list[dict[str, Any]]:
        """Return the history of sizes, with the tokens per second of each and of a rank of it."""
        sizes, ramp = [], self.job.batch_ramp
        for size in self.goodput.sizes:
            windows = ramp.samples(size.last) - ramp.samples(size.first - 1)
            rate = windows * self.job.tokens_per_window / size.seconds if size.seconds else None
            rates = {"tokens_per_second": rate, "of_a_rank": rate and rate / size.ranks}
            sizes.append({**vars(size), **rates})
        return sizes

    @property
    def last_event(self) -> str | None:
        """The kind of the last event that isn't a save."""
        rows = [row for a in self.attempts[-2:] for row in self._memory.events(a)]
        kinds = [row.get("kind", "-") for row in rows if row.get("kind") not in _SAVED]
        return kinds[-1] if kinds else None

    @property
    def forecast_anew(self) -> Row | None:
        """The last forecast of the end that the run made itself; None before one."""
        return self._newest("forecast_anew")

    @property
    def forecast_left(self) -> Row | None:
        """Since when the loss is outside the band of its forecast; None while it is inside."""
        alarm = self._newest("forecast_left", "forecast_back")
        return alarm if alarm and alarm["kind"] == "forecast_left" else None

    def _newest(self, *kinds: str) -> Row | None:
        """Return the last event of these kinds, of the steps that are kept."""
        rows = (row for a in reversed(self.attempts) for row in reversed(self._memory.events(a)))
        return next((r for r in rows if r.get("kind") in kinds and r["step"] <= self.step), None)

    @property
    def validation(self) -> Row | None:
        return next(reversed(self._tail.scores), None)

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The readable checkpoints, oldest first."""
        return [opened for opened in self._opened.values() if isinstance(opened, Checkpoint)]

    @property
    def damaged(self) -> dict[int, UserError]:
        """Why the other checkpoints can't be read, by step. (`check` finds all their faults.)"""
        return {step: e for step, e in self._opened.items() if isinstance(e, UserError)}

    @cached_property
    def _opened(self) -> dict[int, Checkpoint | UserError]:
        def read(path: Path) -> Checkpoint | UserError:
            try:
                return Checkpoint(path.parent)
            except UserError as e:
                return e

        paths = {step: self.run.checkpoint_path(step) for step in self.run.checkpoint_steps()}
        return {step: self._memory.once(p / "state.json", read) for step, p in paths.items()}

    @property
    def saved(self) -> float | None:
        """When the newest checkpoint was published: seconds since the epoch."""
        return max((c.path.stat().st_mtime for c in self.checkpoints), default=None)

    def is_eligible(self, checkpoint: Checkpoint) -> bool:
        return self.run.is_eligible(checkpoint.attempt, checkpoint.position.step)

    def is_pinned(self, checkpoint: Checkpoint) -> bool:
        return is_pinned(self.run, checkpoint.position.step)

    @cached_property
    def last_seen(self) -> float:
        """When the newest attempt last wrote, or the run was made: seconds since the epoch."""
        if not self.attempts:
            return self.run.config.stat().st_mtime
        newest = self.attempts[-1]
        times = [p.stat().st_mtime for p in (newest.path, *newest.path.glob("*"))]
        # A clock that has been put back has left times that are still to come: no signs of life.
        return max((t for t in times if t < self.now + _AHEAD), default=min(times))

    @property
    def age(self) -> float:
        """Seconds since `last_seen`, or until then if that is far ahead, which is wrong."""
        age = self.now - self.last_seen
        return -age if age < -_AHEAD else max(0.0, age)

    @property
    def state(self) -> State:
        """The state by the files, as it is at `now`: see `_judge`."""
        if self._state is None or self._state[0] != self.now:
            self._state = self.now, self._judge()
        return self._state[1]

    def _judge(self) -> State:
        """new: no attempt yet. imported, averaged: it holds such weights, for others to begin with.
        complete: the last step is saved and evaluated. halted: the guard or a callback has ended
        it. refused: its launcher saw an error in the config or the input. interrupted: the newest
        attempt recorded its end, or saved its last step. running: its files grew lately, by its own
        pace. crashed: none of these, and steps are lost.
        """
        if how := self.run.weights_alone:
            return how
        saved = max((c.position.step for c in self.checkpoints if self.is_eligible(c)), default=0)
        total = self.job.total_steps
        if saved >= total and (
            select(self._tail.scores, step=total, dataset="validation")
            or self.run.is_evaluated(total)
        ):
            return "complete"
        if self._ended:
            return "halted" if self._ended.get("reason") == "halted" else "interrupted"
        if ended := self._launch_that_ended():
            if ended.get("code") == USER:
                return "refused"
            is_saved = saved and saved == self.step
            return "interrupted" if is_saved or ended.get("code") == INTERRUPTED else "crashed"
        if self.attempts and self._may_live:
            return "running"
        if not self.attempts:
            return "new"
        return "interrupted" if saved and saved == self.step else "crashed"

    @property
    def _ended(self) -> Row | None:
        """The end that the newest attempt recorded, if it did."""
        ends = [e for a in self.attempts[-1:] for e in select(self.rows_of_events(a), kind="ended")]
        return next(reversed(ends), None)

    @property
    def reason(self) -> str | None:
        """Why a run was halted or refused, as a sentence; None for every other state."""
        if self.state not in ("halted", "refused"):
            return None
        halts = select(self.rows_of_events(self.attempts[-1]), kind="halt")
        if self.state == "halted" and halts:
            step, why = halts[-1].get("step") or 0, str(halts[-1].get("reason", "")).rstrip(".")
            return f"The guard halted it at step {step:,}: {why}."
        how = (self._launch_that_ended() or LaunchRecord()).get("how", "").rstrip(".")
        if self.state == "halted":
            return f"It was halted: {how}." if how else "It was halted, see its events."
        return f"It was refused: {how}." if how else "It was refused, see its log."

    @property
    def _may_live(self) -> bool:
        """True if the files grew within twice the longest step and some patience. All rows are read
        for it only if nothing else shows it."""
        beyond = (self.age - _PATIENCE) / 2
        if beyond < 0:
            return True
        first = self.attempts[0].path
        paths = (self.run.config, self.run.identity, first / "parent.json", first)
        created = min(p.stat().st_mtime for p in paths if p.exists())
        if beyond > self.last_seen - created:  # no step was longer than the run's whole life
            return False
        return beyond < self._memory.ledger(self.run.metrics).longest

    def _launch_that_ended(self) -> LaunchRecord | None:
        """Return the launch record of the newest attempt, if our launcher saw its ranks end."""
        for attempt in reversed(self.attempts):
            if record := launch_of(attempt.path):
                return record if "ended" in record else None
            if attempt.parent is None or attempt.parent.rolled_back_from is None:
                return None  # another launcher started it; after a rollback it is the same launch
        return None

    @property
    def goodput(self) -> Goodput:
        """Where the run's wall clock went."""
        running = self.job_runs or self.state == "running"
        if running not in self._goodput:
            self._goodput[running] = Goodput(self.run, running, self._memory)
        return self._goodput[running]

    def hangs(self) -> dict[int, Hang]:
        """Return the hangs, by the number of the attempt."""
        hangs = ((a.number, read_hang(a.path)) for a in self.attempts)
        return {number: hang for number, hang in hangs if hang}

    def faults(self) -> list[str]:
        """Return the injected faults, in the order of time."""
        return [row["fault"] for row in records(self.run)]

    def ranks(self) -> list[RankStatus]:
        """Return the running ranks of the newest attempt, while the run is running."""
        nodes = read_nodes(self.attempts[-1].path, every=60.0) if self.state == "running" else []
        return [s for s in nodes if not s.heartbeat.has_ended]

    def lost(self) -> Lost:
        """Return the steps that attempts made beyond the step from which a later one started."""
        lost = [self._memory.lost(attempt, self.run) for attempt in self.attempts]
        return Lost(sum(steps.count for steps in lost), sum(steps.total for steps in lost))

    def rows_of_events(self, attempt: Attempt) -> list[Row]:
        return self._memory.events(attempt)

    def events(self) -> Counter[str]:
        """Return the number of events of each kind, over all attempts."""
        return Counter(row.get("kind", "-") for row in self.run.read_events())


class Statuses:
    """The statuses of runs for a page that is redrawn: only runs with changed files are read
    again."""

    def __init__(self) -> None:
        self._memory = Memory()
        self._seen: dict[Path, tuple[list[Mark], Status]] = {}

    def of(self, run: Run, marks: list[Mark] | None = None) -> Status:
        """Return the status of a run as it is now. marks: of its files, just read."""
        now = marks_of(run) if marks is None else marks
        before = self._seen.get(run.path)
        if before is None or before[0] != now:
            self._seen[run.path] = now, Status(run, memory=self._memory)
        status = self._seen[run.path][1]
        status.now = time.time()
        return status


def runs_under(root: Path) -> list[Run]:
    """Return the runs in a directory, sorted by name."""
    return [Run(path.parent) for path in sorted(root.glob("*/config.yaml"))]
