"""Where an attempt resumes: from which checkpoint, at which position, and which samples it skips.

Invariant: all ranks load the same checkpoint, which they verify together. Samples that the run has
once skipped stay skipped, even if the checkpoint is older and doesn't know of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from forescale.checkpoint import choice, writer
from forescale.checkpoint.peer import PeerMemory
from forescale.checkpoint.reader import Checkpoint, Position
from forescale.config.train import TrainJob
from forescale.data.mixture import merged_intervals
from forescale.engine.step import Engine
from forescale.ground.storage import FileEntry
from forescale.run.directory import Attempt, Parent, Run
from forescale.run.history import Saved, expect_whole, history_of
from forescale.run.rows import Prefix
from forescale.train.guard import Rollback

Report = Callable[..., None]


@dataclass(frozen=True)
class ResumePoint:
    """The state that the engine holds when an attempt begins.

    checkpoint: where it was loaded from, None at the beginning of a run; guard, watch: the states
    of the guard and of run/band.py there; rolled_back_from: the anomalous step, if a rollback led
    here; history: the rows up to the checkpoint, on rank 0, if it is one of the run itself.
    """

    position: Position
    checkpoint: Checkpoint | None = None
    guard: dict[str, Any] | None = None
    watch: dict[str, Any] | None = None
    rolled_back_from: int | None = None
    history: Prefix | None = None

    @property
    def parent(self) -> Parent:
        """What the attempt's parent.json holds."""
        name = str(self.checkpoint.path) if self.checkpoint else None
        return Parent(self.position.step, name, self.position.skipped, self.rolled_back_from)


def resume(
    run: Run,
    job: TrainJob,
    engine: Engine,
    report: Report,
    attempt: Attempt,
    memory: PeerMemory | None = None,
) -> ResumePoint:
    """Load the newest complete checkpoint of the run, or snapshot in `memory`; without one, that of
    the run that it branches from; else begin at step 0. Every rank calls it.

    report(kind, **facts): receives the checkpoints that are passed over. attempt: the one that is
    starting. Raises UserError if there are checkpoints but none can be used, if what the run has
    saved or logged is missing or damaged, or if a newer attempt was started.
    """
    ranks, origin, weights_only = engine.world, job.run.origin, False
    snapshots = memory.snapshots(attempt.number, report) if memory else {}
    checkpoint = choice.newest_complete(run, report, ranks, snapshots)
    history = _history(run, checkpoint, report, engine, attempt)
    if checkpoint is None and origin.run is not None:
        checkpoint = choice.at_step(Run.existing(origin.run, job.run.root), origin.step, ranks)
        weights_only = origin.load == "weights"
    skipped = (*map(tuple, job.data.skip), *ranks.from_main(run.skipped, run.path))
    if checkpoint is None:
        return ResumePoint(Position(skipped=merged_intervals(skipped)))
    writer.load(checkpoint, engine, weights_only)
    if weights_only:
        return ResumePoint(Position(skipped=merged_intervals(skipped)), checkpoint)
    position = checkpoint.position
    position = replace(position, skipped=merged_intervals((*position.skipped, *skipped)))
    states = checkpoint.state.get("guard"), checkpoint.state.get("watch")
    return ResumePoint(position, checkpoint, *states, history=history)


def _history(
    run: Run,
    checkpoint: Checkpoint | None,
    report: Report,
    engine: Engine,
    starting: Attempt | None = None,
) -> Prefix | None:
    """Return the rows to begin with, on rank 0, verified; raise its UserError on every rank."""
    prefixes: list[Prefix] = []

    def judge() -> None:
        saved = None
        if checkpoint is not None:
            rows = checkpoint.state.get("logged", {}).get("metrics.jsonl")
            entry = FileEntry(**rows) if rows else None
            saved = Saved(checkpoint.position.step, checkpoint.attempt, entry)
        if starting is not None:
            expect_whole(run, starting, saved)
        if saved is not None:
            prefixes.append(history_of(run, saved))
            if (path := prefixes[0].path).parent.name != f"{saved.attempt:04d}":
                report("history_restored", attempt=saved.attempt, file=str(path))

    engine.world.from_main(judge, run.path)
    return prefixes[0] if prefixes else None


def roll_back(rollback: Rollback, run: Run, engine: Engine, report: Report) -> ResumePoint:
    """Load a checkpoint from before an anomalous step, and skip the step's samples from there on.

    If there is none as old as the rule says, a newer one serves, unless the weights themselves are
    not trusted (a rollback without an interval). Every rank calls it. Raises UserError if there is
    no checkpoint to load.
    """
    strictly = rollback.interval is None
    checkpoint = choice.newest_before(run, rollback.newest, strictly, report, engine.world)
    skips = (rollback.interval,) if rollback.interval else ()
    writer.load(checkpoint, engine)
    skipped = merged_intervals((*rollback.position.skipped, *skips))
    position = replace(checkpoint.position, skipped=skipped)
    states = checkpoint.state.get("guard"), checkpoint.state.get("watch")
    history = _history(run, checkpoint, report, engine)
    return ResumePoint(position, checkpoint, *states, rollback.step, history)
