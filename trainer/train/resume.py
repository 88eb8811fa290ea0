"""Where an attempt sets out: from which checkpoint, at which position, and what it passes over.

Invariant: all ranks load the same checkpoint, verified by them together; and samples that the run
has once passed over stay so, also where the checkpoint is from before and doesn't know of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from forescale.checkpoint import writer
from forescale.checkpoint.writer import Checkpoint, Position
from forescale.config.train import TrainJob
from forescale.data.mixture import united
from forescale.engine.ranks import Ranks
from forescale.engine.step import Engine
from forescale.run.directory import Parent, Run
from forescale.train.guard import Rollback

Tell = Callable[..., None]


@dataclass(frozen=True)
class Departure:
    """A state that is loaded. `found`: the checkpoint that it comes from, None at the beginning of
    a run; guard: the guard's state there; ill: the step that a rollback came from."""

    position: Position
    found: Checkpoint | None = None
    guard: dict[str, Any] | None = None
    ill: int | None = None

    @property
    def parent(self) -> Parent:
        name = str(self.found.path) if self.found else None
        return Parent(self.position.step, name, self.position.skipped, self.ill)


def set_out(run: Run, job: TrainJob, engine: Engine, ranks: Ranks, tell: Tell) -> Departure:
    """Load the newest whole checkpoint, or the origin's, or begin. Every rank calls it.

    tell(kind, **facts): hears of checkpoints that are passed over. Raises UserError where there are
    checkpoints and none can be used.
    """
    found = writer.newest_whole(run, tell, ranks)
    origin, weights_only = job.run.origin, False
    if found is None and origin.run is not None:
        found = writer.at_step(Run.existing(origin.run, job.run.root), origin.step, ranks)
        weights_only = origin.what == "weights"
    skipped = (*map(tuple, job.data.skip), *ranks.from_main(run.skipped, run.path))
    if found is None:
        return Departure(Position(skipped=united(skipped)))
    writer.load(found, engine, weights_only)
    if weights_only:
        return Departure(Position(skipped=united(skipped)), found)
    position = found.position
    position = replace(position, skipped=united((*position.skipped, *skipped)))
    return Departure(position, found, found.state.get("guard"))


def go_back(rollback: Rollback, run: Run, engine: Engine, ranks: Ranks, tell: Tell) -> Departure:
    """Load a checkpoint from before an ill step, whose samples are passed over from here on. One
    that is nearer than the rule says is better than none, but where the weights can't be trusted.
    """
    strictly = rollback.interval is None
    found = writer.before(run, rollback.newest, strictly, tell, ranks)
    more = (rollback.interval,) if rollback.interval else ()
    writer.load(found, engine)
    skipped = united((*rollback.position.skipped, *more))
    position = replace(found.position, skipped=skipped)
    return Departure(position, found, found.state.get("guard"), rollback.step)
