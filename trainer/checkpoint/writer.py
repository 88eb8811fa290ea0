"""Checkpoints, the engine's side: written by all ranks, published by one rename, loaded into any
engine. When that is done, and what else goes on meanwhile, is saving.py's; what lies on disk, and
which of it counts, is stored.py's; what is kept of it, retention.py's.

Invariant: what bears a checkpoint's name is whole. It is written to a stage directory that carries
the attempt's number, hashed as it is written, fsynced; rank 0 writes the table after every rank's
word, and renames. Nothing here runs code while loading: safetensors and JSON only.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from forescale.checkpoint.reader import (
    FORMAT,
    STATE,
    Checkpoint,
    Position,
    at_step,
    before,
    coverage_faults,
    newest_whole,
    readable,
)
from forescale.checkpoint.retention import is_pinned
from forescale.engine.ranks import Ranks
from forescale.engine.state import Fragment, load_fragments, owned_fragments, scalars, shape_of
from forescale.engine.state import write_fragments as write_rank_file
from forescale.engine.step import Engine
from forescale.errors import UserError
from forescale.run.directory import Run
from forescale.storage import fsync_path, publish, write_json, write_table

__all__ = ["Checkpoint", "Position", "at_step", "before", "load", "newest_whole", "save", "write"]

_SLACK = 1 << 20  # bytes on the disk beside the tensors, and as much again as they are described by
_HEADER = 512  # about as many bytes describe a fragment, in its file and in state.json


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a state, as it was at `position`; facts: more for state.json."""

    position: Position
    fragments: list[Fragment]
    counters: dict[str, Any]
    facts: dict[str, Any]

    @classmethod
    def of(
        cls,
        engine: Engine,
        position: Position,
        facts: dict[str, Any],
        copied: Callable[[Any], list[Fragment]] = list,
    ) -> "Snapshot":
        """Of an engine as it stands; valid until it trains on, unless `copied` copies."""
        return cls(position, copied(owned_fragments(engine)), scalars(engine), facts)

    @property
    def size(self) -> int:
        """Bytes on disk, about."""
        return sum(f.data.nbytes + _HEADER for f in self.fragments)


@dataclass(frozen=True)
class Written:
    """A published checkpoint, and its tensors' bytes over all ranks, as rank 0 knows them."""

    path: Path
    bytes: int | None


def save(run: Run, attempt: int, position: Position, engine: Engine, facts: dict) -> Path:
    """Write and publish a checkpoint at once; every rank calls it. facts: more for state.json.

    Raises UserError on every rank if any rank's storage fails; nothing half-written stays.
    """
    world = engine.world
    ranks = Ranks(world.rank, world.size, world.gather, world.to_main)
    return write(run, attempt, Snapshot.of(engine, position, facts), ranks).path


def write(
    run: Run,
    attempt: int,
    snapshot: Snapshot,
    ranks: Ranks,
    midway: Callable[[int, Path], None] = lambda step, path: None,
) -> Written:
    """Write and publish what all ranks have in their snapshots; every rank calls it.

    midway: told the step and this rank's file when half of the file is written. Raises UserError
    on every rank if any rank's storage fails, if there is no room (before anything is written), or
    if a newer attempt has gone on from before this step; nothing half-written stays.
    """
    position, final = snapshot.position, run.checkpoint_path(snapshot.position.step)
    stage = final.with_name(f".{final.name}.attempt-{attempt:04d}.stage")
    file = f"rank-{ranks.rank:05d}.safetensors"

    def make_stage() -> None:
        _expect_to_count(run, attempt, position.step)
        shutil.rmtree(stage, ignore_errors=True)
        if not run.checkpoints.is_dir():
            run.checkpoints.mkdir(parents=True)
            fsync_path(run.path)
        _expect_room(run, sum(sizes))
        stage.mkdir()

    def write_own() -> tuple:
        path = stage / file
        told = lambda: midway(position.step, path)  # noqa: E731 - what write_rank_file calls
        entry, rows = write_rank_file(path, snapshot.fragments, told)
        shapes = {f.name: list(f.shape) for f in snapshot.fragments}
        return file, entry, rows, shapes, snapshot.counters

    def commit() -> None:
        state = {
            "format": FORMAT,
            "position": asdict(position),
            "attempt": attempt,
            "world_size": ranks.size,
            **snapshot.facts,
            "counters": _merged_counters([w[4] for w in words]),
            "shapes": {k: v for w in words for k, v in w[3].items()},
            "fragments": {w[0]: w[2] for w in words},
        }
        # Ours to guarantee, so an assertion.
        assert not (faults := coverage_faults(state)), faults[0]
        table = {w[0]: w[1] for w in words}
        table[STATE] = write_json(stage / STATE, state, compact=True)
        write_table(stage, table)
        _replace(run, stage, final, attempt)

    sizes = ranks.gather(snapshot.size)
    try:
        ranks.from_main(make_stage, run.checkpoints)
        words = ranks.handed_in(write_own, stage) or []
        ranks.from_main(commit, stage)
    except UserError:
        if ranks.is_main:
            shutil.rmtree(stage, ignore_errors=True)
        raise
    return Written(final, sum(w[1].size for w in words) if ranks.is_main else None)


def _expect_to_count(run: Run, attempt: int, step: int) -> None:
    """Raises UserError for an attempt that was left behind: stopped for a while, say, or cut off
    from the others, until a newer one went on from before this step. Nothing of it can count."""
    if not run.is_eligible(attempt, step):
        newest = run.attempts()[-1].number
        what = f"attempt {newest} has gone on from before step {step:,}, and this is {attempt}"
        raise UserError(str(run.path), what, "nothing: the newer attempt goes on")


def _expect_room(run: Run, size: int) -> None:
    """Raises UserError where the disk has no room; a quota can't be seen from here."""
    needed, free = size + _SLACK, shutil.disk_usage(run.path).free
    if free < needed:
        what = f"the disk is full: a checkpoint needs {needed:,} bytes, {free:,} are free"
        todo = "free some space and give the same command again"
        raise UserError(str(run.checkpoints), what, todo)


def _replace(run: Run, stage: Path, final: Path, attempt: int) -> None:
    """Publish. A checkpoint of this step that is there already makes way only now: it is of an
    older attempt and doesn't count, or couldn't be read when this one chose its parent. One that
    somebody has pinned stays on the disk, out of the way."""
    step = int(final.name.rpartition("-")[2])
    _expect_to_count(run, attempt, step)
    if not final.exists():
        return publish(stage, final)
    present = readable(final)
    if present and present.attempt > attempt:
        what = f"attempt {present.attempt} has saved this step, and this is attempt {attempt}"
        raise UserError(str(final), what, "nothing: the newer attempt goes on")
    pinned = present is not None and is_pinned(run, step)
    kind = f"attempt-{present.attempt:04d}.pinned" if present and pinned else "replaced"
    aside = final.with_name(f".{final.name}.{kind}")
    shutil.rmtree(aside, ignore_errors=True)
    final.rename(aside)
    publish(stage, final)
    if not pinned:
        shutil.rmtree(aside, ignore_errors=True)


def _merged_counters(parts: list[dict]) -> dict:
    """Counters of all ranks: a rank that holds no piece of a group doesn't know its step."""
    steps = {k: v for part in parts for k, v in part["optimizer_steps"].items()}
    return {**parts[0], "optimizer_steps": steps}


def load(checkpoint: Checkpoint, engine: Engine, weights_only: bool = False) -> None:
    """Set every rank's part of the engine; any world size, stage and precision.

    Raises UserError where the checkpoint is of another model.
    """
    model = {name: list(shape) for name, shape in _model_shapes(engine).items()}
    for name in sorted(model.keys() | checkpoint.shapes.keys()):
        ours, stored = model.get(name), checkpoint.shapes.get(name)
        if ours != stored:
            what = f"parameter {name} is {stored} there and {ours} in this model"
            raise UserError(str(checkpoint.path), what, "use the model of the run that saved it")
    counters = None if weights_only else checkpoint.state["counters"]
    load_fragments(engine, checkpoint.reader, counters)


def _model_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    shapes = {name: shape_of(param) for param, name in engine.names.items()}
    kept = engine.module.state_dict(keep_vars=True)
    shapes |= {n: tuple(b.shape) for n, b in engine.module.named_buffers() if n in kept}
    return shapes
