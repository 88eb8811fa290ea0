"""The training loop, on one screen.

Invariant: whatever ranks must agree on is a field of the one word that they share a step. It is
read one step late, so that nothing waits for it, and at once where a part is due (a save, an
evaluation, the end), so that a part always sees the step that the weights are at.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol

from trainer.checkpoint import Position
from trainer.engine.step import Engine, Facts
from trainer.engine.world import Word
from trainer.pulse import Pulse


@dataclass(frozen=True)
class Step:
    """A step that was made. `position` is after it, `g0` its first window, `seconds` by phase since
    the step before; `shares`: its targets by source; `learning_rate` as a fraction of the peak."""

    position: Position
    g0: int
    shares: dict[str, int]
    learning_rate: float
    facts: Facts
    seconds: dict[str, float]

    @property
    def targets(self) -> int:
        return sum(self.shares.values())


class Part(Protocol):
    """Something that looks at every step, in order, on every rank."""

    phase: str

    def is_due(self, step: int) -> bool:
        """Whether it must see `step` before the next one is made."""

    def see(self, step: Step, word: Word) -> None:
        """Look at a step and what all ranks know of it."""


def train(
    engine: Engine,
    batches: Iterable,
    learning_rate: Callable[[int], float],
    parts: list[Part],
    position: Position,
    pulse: Pulse,
    asked_to_stop: Callable[[], bool],
) -> tuple[Position, bool]:
    """Train over `batches` (data.stream.Batch) from `position`; where it ended, and whether because
    some rank was asked to stop."""
    world = engine.world
    made: dict[int, Step] = {}  # that the ranks have not heard of yet

    def tell(behind: int) -> bool:
        stop = False
        for word in world.words(behind):
            step = made.pop(word.step)
            for part in parts:
                with pulse(part.phase):
                    part.see(step, word)
            stop |= word.stop
        return stop

    for batch in pulse.each("data", batches):
        rate = learning_rate(batch.step)
        with pulse("compute"):
            facts = engine.train_step(batch, rate)
        position = replace(
            position,
            step=batch.step + 1,
            g=batch.g1,
            tokens=position.tokens + batch.targets,
            quarantined=tuple(sorted(batch.quarantine)),
        )
        made[position.step] = Step(position, batch.g0, batch.shares, rate, facts, pulse.take())
        first = batch.micro[0].index
        count = len(batch.micro) * world.size
        world.share(position.step, facts.losses, first, count, batch.window_hash, asked_to_stop())
        due = any(part.is_due(position.step) for part in parts)
        if tell(behind=0 if due else 1):
            tell(behind=0)
            return position, True
    tell(behind=0)
    return position, False
