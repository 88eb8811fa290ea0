"""The training loop, on one screen.

Invariant: whatever ranks must agree on is a field of the one word that they share a step. It is
read one step late, so that nothing waits for it, and at once where a part is due (a save, an
evaluation, the end), so that a part always sees the step that the weights are at.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from forescale.checkpoint.writer import Position
from forescale.data.stream import Batch
from forescale.engine.step import Engine, Facts
from forescale.engine.world import Word
from forescale.resilience.phases import Pulse
from forescale.train.guard import HEALTHY, Ill, Verdict


@dataclass(frozen=True)
class Step:
    """A step that was made. `position` is after it, `g0` its first window, `seconds` by phase since
    the step before; `shares`: its targets by source; `learning_rate` as a fraction of the peak;
    `verdict`: what the guard said of it."""

    position: Position
    g0: int
    shares: dict[str, int]
    learning_rate: float
    facts: Facts
    seconds: dict[str, float]
    verdict: Verdict = HEALTHY

    @property
    def targets(self) -> int:
        return sum(self.shares.values())


class Part(Protocol):
    """Something that looks at every step, in order, on every rank."""

    phase: str
    failed: bool  # something of it that goes on behind the training has failed on this rank

    def is_due(self, step: int) -> bool:
        """Whether it must see `step` before the next one is made."""

    def see(self, step: Step, word: Word) -> None:
        """Look at a step and what all ranks know of it."""


class Watch(Protocol):
    """Looks at a step between gradient and update, on every rank alike."""

    verdict: Verdict  # of the last step

    def begin(self, batch: Batch) -> None:
        """Hear of the step that is made next."""

    def may_apply(self, loss: float, norm: float) -> bool:
        """Whether the weights are updated, from the step's mean loss and gradient norm."""

    def before_update(self, batch: Batch, losses: Tensor) -> None:
        """Look at the state that the gradient was computed with."""

    def end(self) -> None:
        """Raise guard.Rollback or guard.Halt where the step's verdict says so, on all ranks."""


def train(
    engine: Engine,
    batches: Iterable[Batch],
    learning_rate: Callable[[int], float],
    parts: list[Part],
    position: Position,
    pulse: Pulse,
    asked_to_stop: Callable[[], bool],
    watch: Watch,
) -> tuple[Position, bool]:
    """Train over `batches` from `position`; where it ended, and whether because some rank was asked
    to stop. Where `watch` raises, all steps before are told, and Ill.position is after them."""
    world = engine.world
    pulse.enter("compute")  # what is between the other phases
    made: dict[int, Step] = {}  # that the ranks have not heard of yet

    def tell(behind: int) -> bool:
        stop = False
        pulse.mark("word")
        for word in world.words(behind):
            step = made.pop(word.step)
            for part in parts:
                with pulse(part.phase):
                    part.see(step, word)
            stop |= word.stop
        return stop

    for batch in pulse.each("data", batches):
        rate = learning_rate(batch.step)
        pulse.step = batch.step + 1
        watch.begin(batch)
        with pulse("compute"):
            facts = engine.train_step(batch, rate, watch.may_apply, watch.before_update)
        try:
            watch.end()
        except Ill as ill:
            tell(behind=0)
            ill.position = position
            raise
        position = _after(position, batch)
        made[position.step] = Step(
            position, batch.g0, batch.shares, rate, facts, pulse.take(), watch.verdict
        )
        failed = any(part.failed for part in parts)
        first, count = batch.micro[0].index, len(batch.micro) * world.size
        world.share(
            position.step, facts.losses, first, count, batch.window_hash, asked_to_stop(), failed
        )
        due = any(part.is_due(position.step) for part in parts)
        if tell(behind=0 if due else 1):
            tell(behind=0)
            return position, True
    tell(behind=0)
    return position, False


def _after(position: Position, batch: Batch) -> Position:
    return replace(
        position,
        step=batch.step + 1,
        g=batch.g1,
        tokens=position.tokens + batch.targets,
        quarantined=tuple(sorted(batch.quarantine)),
    )
