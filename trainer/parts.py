"""The parts of a training loop: evaluation and checkpoints (metrics.py has the third).

Invariant: a part decides from the step and the shared word alone, so every rank decides alike.
"""

from collections.abc import Callable
from typing import Any

from trainer import checkpoint
from trainer.duration import Duration
from trainer.engine.step import Engine
from trainer.engine.world import Word
from trainer.evaluate import Score
from trainer.loop import Step
from trainer.run import Attempt, Run


class Every:
    """True at every so many steps (or so much of rank 0's time), and at the last step."""

    def __init__(self, length: Duration, steps: int | None, last: int):
        self.steps, self.seconds, self.last = steps, length.seconds, last
        self._since = 0.0
        self._ahead: int | None = None

    def __call__(self, step: int) -> bool:
        if step in (self.last, self._ahead):
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
    """Saves, and deletes what is no longer kept. The last of the parts, so that whatever is said
    about a step is said before it is saved."""

    phase = "checkpoint"

    def __init__(
        self,
        due: Every,
        keep: int,
        run: Run,
        attempt: Attempt,
        engine: Engine,
        facts: dict[str, Any],
    ):
        self.is_due, self.keep = due, keep
        self.run, self.attempt, self.engine, self.facts = run, attempt, engine, facts
        self.saved: int | None = None

    def see(self, step: Step, word: Word) -> None:
        if self.is_due.hear(step.position.step, word):
            self.save(step.position)

    def save(self, position: checkpoint.Position) -> None:
        """Save now, unless this step is saved. Every rank calls it together."""
        if self.saved == position.step:
            return
        self.attempt.metrics.sync()  # no checkpoint may know of a step that the rows don't
        checkpoint.save(self.run, self.attempt.number, position, self.engine, self.facts)
        self.saved = position.step
        if self.engine.world.is_main:
            self.attempt.event("checkpoint_saved", step=position.step)
            for step in checkpoint.retain(self.run, self.attempt.number, self.keep):
                self.attempt.event("checkpoint_deleted", step=step)
