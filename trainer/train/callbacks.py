"""The parts of a training loop: evaluation and checkpoints (metrics.py has the third).

Invariant: a part decides from the step and the shared word alone, so every rank decides alike.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from forescale.checkpoint.retention import Keep
from forescale.checkpoint.saver import Saver
from forescale.checkpoint.writer import Position
from forescale.config.duration import Duration
from forescale.engine.step import Engine
from forescale.engine.world import Word
from forescale.run.directory import Attempt, Run
from forescale.train.evaluate import Score
from forescale.train.loop import Step


class Every:
    """True at every so many steps (or so much of rank 0's time), at those of `at`, and at the last
    step."""

    def __init__(self, length: Duration, steps: int | None, last: int, at: Collection[int] = ()):
        self.steps, self.seconds, self.last = steps, length.seconds, last
        self._at = frozenset(at)
        self._since = 0.0
        self._ahead: int | None = None

    def __call__(self, step: int) -> bool:
        if step in (self.last, self._ahead) or step in self._at:
            return True
        return self.steps is not None and step % self.steps == 0

    def hear(self, step: int, word: Word) -> bool:
        """Whether `step`, with its word, is due; and look ahead by rank 0's clock."""
        due = self(step)
        if due:
            self._since, self._ahead = word.seconds, None
        elif self.seconds is not None and word.seconds - self._since >= self.seconds:
            # Words come a step late: the weights are at step + 1, which was not due.
            self._ahead = self._ahead or step + 2
        return due


class Validation:
    """Scores held-out splits; `tell` gets the step and the scores by the splits' names."""

    phase = "evaluation"
    failed = False

    def __init__(
        self,
        due: Every,
        score: Callable[[bool], dict[str, Score]],
        tell: Callable[[Step, dict[str, Score]], None],
    ):
        self.is_due, self._score, self._tell = due, score, tell

    def see(self, step: Step, word: Word) -> None:
        if self.is_due.hear(step.position.step, word):
            whole = step.position.step == self.is_due.last
            self._tell(step, self._score(whole))


class Checkpoints:
    """Saves, behind the training, and deletes what is no longer kept. The last of the parts, so
    that whatever is said about a step is said before it is saved.

    keep, keep_every, at (steps), keep_best: see retention.Keep; facts, background, midway: see
    saving.Saver. `saved`: the step that was saved last, or is being saved.
    """

    phase = "checkpoint"

    def __init__(
        self,
        due: Every,
        keep: int,
        run: Run,
        attempt: Attempt,
        engine: Engine,
        facts: Callable[[], dict[str, Any]],
        *,
        keep_every: int | None = None,
        at: Collection[int] = (),
        keep_best: bool = False,
        background: bool = True,
        midway: Callable[[int, Path], None] = lambda step, path: None,
    ):
        self.is_due = due
        rules = Keep(keep, keep_every, keep_best, frozenset(at))
        self._saver = Saver(run, attempt, engine, facts, rules, background, midway)
        self._saved: Position | None = None

    @property
    def failed(self) -> bool:
        return self._saver.failed

    @property
    def saved(self) -> int | None:
        return None if self._saved is None else self._saved.step

    def see(self, step: Step, word: Word) -> None:
        if word.failed:
            self.finish()
        if self.is_due.hear(step.position.step, word):
            self._begin(step.position)

    def save(self, position: Position) -> None:
        """Save now, unless it is saved or being saved; wait until it is published. Every rank
        calls it together."""
        self._begin(position)
        self.finish()

    def finish(self) -> None:
        """Wait until what is being saved is published; raises what made it fail."""
        self._saver.finish()

    def _begin(self, position: Position) -> None:
        if self._saved != position:
            self._saver.begin(position)
            self._saved = position
