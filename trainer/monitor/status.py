"""What runs have reached, from the files that they leave; for `status`, which must start at once.

Invariant: derived, never stored; and no more is said than the files show. Whether a run is running
can't be seen from its files, only when they last grew: `running` means lately, by its own pace.
Imports neither torch nor deepspeed.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from forescale.checkpoint.reader import Checkpoint
from forescale.checkpoint.retention import is_pinned
from forescale.config.frozen import thaw
from forescale.config.train import TrainJob
from forescale.errors import INTERRUPTED, UserError
from forescale.monitor.goodput import Goodput
from forescale.resilience.diagnosis import Hang, verdict
from forescale.resilience.heartbeat import Seen, shared
from forescale.resilience.outcome import launch_of
from forescale.run.directory import Attempt, Run, read_rows

State = Literal["new", "running", "interrupted", "crashed", "complete"]
_PATIENCE = 60.0  # seconds beyond twice the longest step, evaluation and saving included


@dataclass(frozen=True)
class Lost:
    """Steps that were made and not kept, since an attempt went on from before them."""

    steps: int
    seconds: float


class Status:
    """One run. Rows are those of the newest attempt: one a step, from the first to the last."""

    def __init__(self, run: Run, now: float | None = None):
        self.run, self.now = run, time.time() if now is None else now

    @cached_property
    def job(self) -> TrainJob:
        return thaw(TrainJob, self.run.config, trust=True)

    @cached_property
    def attempts(self) -> list[Attempt]:
        return self.run.attempts()

    @cached_property
    def _rows(self) -> list[dict[str, Any]]:
        return read_rows(self.run.metrics)

    @cached_property
    def train(self) -> list[dict[str, Any]]:
        return [row for row in self._rows if row["kind"] == "train"]

    @property
    def step(self) -> int:
        return self.train[-1]["step"] if self.train else 0

    @property
    def tokens(self) -> int:
        return self.train[-1]["tokens"] if self.train else 0

    @property
    def validation(self) -> dict[str, Any] | None:
        """The last row of the kind."""
        return next((row for row in reversed(self._rows) if row["kind"] == "validation"), None)

    @cached_property
    def checkpoints(self) -> list[Checkpoint]:
        """Those that say what they are; `check` names the faults of the others."""
        found = []
        for step in self.run.checkpoint_steps():
            try:
                found.append(Checkpoint(self.run.checkpoint_path(step)))
            except UserError:
                continue
        return found

    @property
    def saved(self) -> float | None:
        """When the newest checkpoint was published: seconds since the epoch."""
        return max((c.path.stat().st_mtime for c in self.checkpoints), default=None)

    def is_eligible(self, checkpoint: Checkpoint) -> bool:
        return self.run.is_eligible(checkpoint.attempt, checkpoint.position.step)

    def is_pinned(self, checkpoint: Checkpoint) -> bool:
        return is_pinned(self.run, checkpoint.position.step)

    @property
    def last_seen(self) -> float:
        """When the newest attempt last wrote, or the run was made: seconds since the epoch."""
        if not self.attempts:
            return self.run.config.stat().st_mtime
        newest = self.attempts[-1]
        return max(p.stat().st_mtime for p in (newest.path, *newest.path.glob("*")))

    @property
    def age(self) -> float:
        """Seconds since `last_seen`."""
        return max(0.0, self.now - self.last_seen)

    @property
    def state(self) -> State:
        """complete: the last step is saved. interrupted: its newest attempt said that it ended, or
        saved its last step. running: its files grew lately, by its own pace. crashed: neither, and
        steps are lost.
        """
        saved = max((c.position.step for c in self.checkpoints if self.is_eligible(c)), default=0)
        if saved >= self.job.total_steps:
            return "complete"
        if self._ended(self.attempts[-1:]):
            return "interrupted"
        if ended := self._launch_that_ended():
            kept = saved and saved == self.step
            return "interrupted" if kept or ended.get("code") == INTERRUPTED else "crashed"
        longest = max((sum(row["seconds"].values()) for row in self.train), default=0.0)
        if self.attempts and self.age < _PATIENCE + 2 * longest:
            return "running"
        if not self.attempts:
            return "new"
        return "interrupted" if saved and saved == self.step else "crashed"

    def _launch_that_ended(self) -> dict[str, Any] | None:
        """What our launcher says of the newest attempt, if it saw its ranks end."""
        for attempt in reversed(self.attempts):
            if told := launch_of(attempt.path):
                return told if "ended" in told else None
            if attempt.parent is None or attempt.parent.ill is None:
                return None  # somebody else launched it; after a rollback it is the same launch
        return None

    @cached_property
    def goodput(self) -> Goodput:
        return Goodput(self.run, running=self.state == "running")

    def hangs(self) -> dict[int, Hang]:
        """By attempt: what it hung in."""
        found = ((a.number, verdict(a.path)) for a in self.attempts)
        return {number: hang for number, hang in found if hang}

    def faults(self) -> list[str]:
        """The faults that were injected, in the order of time."""
        files = (p for a in self.attempts for p in a.path.glob("faults-rank-*.jsonl"))
        rows = [row for f in files for row in read_rows(f)]
        return [row["fault"] for row in sorted(rows, key=lambda row: row["time"])]

    def ranks(self) -> list[Seen]:
        """What the ranks of the newest attempt last said of themselves, while they are there."""
        seen = shared(self.attempts[-1].path, every=60.0) if self.state == "running" else []
        return [s for s in seen if not s.beat.has_ended]

    def _ended(self, attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
        """The events by which attempts said that they ended well."""
        rows = (row for a in attempts for row in read_rows(a.events.path))
        return [row for row in rows if row["kind"] == "ended"]

    def lost(self) -> Lost:
        """What earlier attempts made beyond the step that a later one went on from."""
        kept = {(row["attempt"], row["step"]) for row in self.train}
        rows = [
            row
            for attempt in self.attempts
            for row in read_rows(attempt.metrics.path)
            if row["kind"] == "train"
            and row["attempt"] == attempt.number
            and (attempt.number, row["step"]) not in kept
        ]
        return Lost(len(rows), sum(sum(row["seconds"].values()) for row in rows))

    def events(self) -> Counter[str]:
        """How often each kind happened, over all attempts."""
        rows = (row for a in self.attempts for row in read_rows(a.events.path))
        return Counter(row["kind"] for row in rows)


def runs_under(root: Path) -> list[Run]:
    """The runs in a directory, by name."""
    return [Run(path.parent) for path in sorted(root.glob("*/config.yaml"))]
