"""The callbacks of the training loop, which see each step (metrics.py holds one more).

A callback of the user's own is any class with one method, named in the config by
`callbacks=[{_target_: mypackage.Mine, ...}]`:

    __init__(**kwargs): the other keys of the mapping; `engine` (engine.step.Engine) and `folder`
        (pathlib.Path, the attempt's directory) are added if the signature has them.
    see(step, summary): called on every rank for every step, in order. `step` (Step) is what this
        rank knows of the step, `summary` (engine.world.StepSummary) what all ranks know. It is
        called one step late, so the weights may already be those of the next step. It may raise
        train.guard.Rollback or train.guard.Halt, on all ranks alike: decide from `summary` alone.

Invariant: a callback decides from the step and its summary alone, so every rank decides alike.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from forescale.checkpoint.reader import Position
from forescale.checkpoint.saver import Saver
from forescale.config.sections.batch import Cadence
from forescale.engine.step import Facts
from forescale.engine.world import StepSummary
from forescale.train.evaluate import Scored
from forescale.train.guard import HEALTHY, Anomaly, Decision, Halt, Rollback


@dataclass(frozen=True)
class Step:
    """A finished step, as this rank knows it.

    position: after the step; g0: its first window; shares: its targets by source; learning_rate: as
    a fraction of the peak; seconds: by phase, since the step before; decision: the guard's.
    """

    position: Position
    g0: int
    shares: dict[str, int]
    learning_rate: float
    facts: Facts
    seconds: dict[str, float]
    decision: Decision = HEALTHY

    @property
    def targets(self) -> int:
        """Targets of the step, over all ranks."""
        return sum(self.shares.values())


class Callback:
    """Looks at every step, in order, on every rank. phase: the phase to which its time is counted.
    failed: work in the background has failed on this rank."""

    phase = "logging"
    failed = False

    def is_due(self, step: int) -> bool:
        """True if it must see `step` before the next one is made."""
        return False

    def see(self, step: Step, summary: StepSummary) -> None:
        """Look at a step. May raise guard.Rollback or guard.Halt, on all ranks alike."""
        raise NotImplementedError


class UserCallback(Callback):
    """A callback of the user's own, which has only `see`.

    event: records the end of the attempt, as the guard's events do. rollbacks_left: with 0, a
    rollback becomes a halt, as guard.most_rollbacks says.
    """

    def __init__(self, callback: Any, event: Callable[..., None], rollbacks_left: int):
        self._callback, self._event, self._left = callback, event, rollbacks_left

    def see(self, step: Step, summary: StepSummary) -> None:
        try:
            self._callback.see(step, summary)
        except Anomaly as raised:
            anomaly = raised
            if isinstance(raised, Rollback) and self._left <= 0:
                problem = f"{raised.reason}, and the run may not roll back any more"
                anomaly = Halt(raised.step, problem)
            self._event(anomaly.kind, step=anomaly.step, reason=anomaly.reason)
            raise anomaly from None


class Every:
    """True at the steps of a cadence (or each time an interval of `seconds` of rank 0's clock has
    passed), at the steps `at`, and at the last step."""

    def __init__(
        self,
        cadence: Cadence | None,
        last: int,
        at: Collection[int] = (),
        seconds: float | None = None,
    ):
        self.cadence, self.seconds, self.last = cadence, seconds, last
        self._at = frozenset(at)
        self._since = 0.0
        self._next: int | None = None

    def __call__(self, step: int) -> bool:
        if step in (self.last, self._next) or step in self._at:
            return True
        return self.cadence is not None and step in self.cadence

    def update(self, step: int, summary: StepSummary) -> bool:
        """True if `step` is due. With a time interval, also schedules the next due step from rank
        0's clock."""
        due = self(step)
        if due:
            self._since, self._next = summary.seconds, None
        elif self.seconds is not None and summary.seconds - self._since >= self.seconds:
            # Summaries are read one step late: step + 1 is already made, and was not due.
            self._next = self._next or step + 2
        return due


class Validation(Callback):
    """Scores the held-out splits when due.

    log: receives the position after the step, the scores by the splits' names, and the columns that
    `abilities` returns (None: abilities are not measured). write: receives the position last, where
    texts are written.
    """

    phase = "evaluation"

    def __init__(
        self,
        due: Every,
        score: Callable[[bool], Mapping[str, Scored]],
        log: Callable[[Position, Mapping[str, Scored], Mapping[str, float]], None],
        abilities: Callable[[], Mapping[str, float]] | None = None,
        write: Callable[[Position], None] | None = None,
    ):
        self._due, self._score, self._log, self._abilities = due, score, log, abilities
        self._write = write

    def is_due(self, step: int) -> bool:
        return self._due(step)

    def see(self, step: Step, summary: StepSummary) -> None:
        """Score if due; at the last step the complete splits."""
        if self._due.update(step.position.step, summary):
            self.score(step.position)

    def score(self, position: Position) -> None:
        """Score now. Every rank calls it together."""
        scores = self._score(position.step == self._due.last)
        self._log(position, scores, self._abilities() if self._abilities else {})
        if self._write:
            self._write(position)


class Checkpoints(Callback):
    """Saves in the background, and deletes what is no longer kept. A step has its row and all own
    callbacks have seen it before it is saved. Only its evaluation comes later: a run that is killed
    there resumes from this save, and evaluates first."""

    phase = "checkpoint"

    def __init__(self, due: Every, saver: Saver):
        self._due, self._saver = due, saver
        self._saved: Position | None = None

    @property
    def failed(self) -> bool:  # type: ignore[override]
        """True if a save in the background has failed on this rank."""
        return self._saver.failed

    @property
    def saved(self) -> int | None:
        """The step that was saved last, or is being saved; None before the first save."""
        return None if self._saved is None else self._saved.step

    def is_due(self, step: int) -> bool:
        return self._due(step)

    def see(self, step: Step, summary: StepSummary) -> None:
        """Save if due; raise the error of a save that has failed on some rank."""
        if summary.failed:
            self._saver.finish()
        if self._due.update(step.position.step, summary):
            self._begin(step.position)

    def save(self, position: Position) -> None:
        """Save now, unless this position is already saved or being saved; wait until it is
        published. Every rank calls it together."""
        self._begin(position)
        self._saver.finish()

    def finish(self) -> None:
        """Wait until the save in progress is published; raise the error if it has failed."""
        self._saver.finish()

    def _begin(self, position: Position) -> None:
        if self._saved != position:
            self._saver.begin(position)
            self._saved = position
