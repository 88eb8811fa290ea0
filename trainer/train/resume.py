"""Where an attempt resumes: from which checkpoint, at which position, and which samples it skips.

Invariant: all ranks load the same checkpoint, which they verify together. Samples that the run has
once skipped stay skipped, even if the checkpoint is older and doesn't know of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from forescale.checkpoint import reader, writer
from forescale.checkpoint.reader import Checkpoint, Position
from forescale.config.train import TrainJob
from forescale.data.mixture import merged_intervals
from forescale.engine.step import Engine
from forescale.run.directory import Parent, Run
from forescale.train.guard import Rollback

Report = Callable[..., None]


@dataclass(frozen=True)
class ResumePoint:
    """The state that the engine holds when an attempt begins.

    checkpoint: where it was loaded from, None at the beginning of a run; guard: the guard's state
    there; rolled_back_from: the anomalous step, if a rollback led here.
    """

    position: Position
    checkpoint: Checkpoint | None = None
    guard: dict[str, Any] | None = None
    rolled_back_from: int | None = None

    @property
    def parent(self) -> Parent:
        """What the attempt's parent.json holds."""
        name = str(self.checkpoint.path) if self.checkpoint else None
        return Parent(self.position.step, name, self.position.skipped, self.rolled_back_from)


def resume(run: Run, job: TrainJob, engine: Engine, report: Report) -> ResumePoint:
    """Load the newest complete checkpoint of the run; without one, that of the run that it branches
    from; else begin at step 0. Every rank calls it.

    report(kind, **facts): receives the checkpoints that are passed over. Raises UserError if there
    are checkpoints but none can be used.
    """
    ranks, origin, weights_only = engine.world, job.run.origin, False
    found = reader.newest_complete(run, report, ranks)
    if found is None and origin.run is not None:
        found = reader.at_step(Run.existing(origin.run, job.run.root), origin.step, ranks)
        weights_only = origin.what == "weights"
    skipped = (*map(tuple, job.data.skip), *ranks.from_main(run.skipped, run.path))
    if found is None:
        return ResumePoint(Position(skipped=merged_intervals(skipped)))
    writer.load(found, engine, weights_only)
    if weights_only:
        return ResumePoint(Position(skipped=merged_intervals(skipped)), found)
    position = found.position
    position = replace(position, skipped=merged_intervals((*position.skipped, *skipped)))
    return ResumePoint(position, found, found.state.get("guard"))


def roll_back(rollback: Rollback, run: Run, engine: Engine, report: Report) -> ResumePoint:
    """Load a checkpoint from before an anomalous step, and skip the step's samples from there on.

    If there is none as old as the rule says, a newer one serves, unless the weights themselves are
    not trusted (a rollback without an interval). Every rank calls it. Raises UserError if there is
    no checkpoint to load.
    """
    strictly = rollback.interval is None
    found = reader.newest_before(run, rollback.newest, strictly, report, engine.world)
    more = (rollback.interval,) if rollback.interval else ()
    writer.load(found, engine)
    skipped = merged_intervals((*rollback.position.skipped, *more))
    position = replace(found.position, skipped=skipped)
    return ResumePoint(position, found, found.state.get("guard"), rollback.step)
