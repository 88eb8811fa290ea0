"""Checkpoints, the engine's side: written by all ranks, published by one rename, loaded into any
engine, kept by number. What lies on disk, and which of them counts, is in stored.py.

Invariant: what bears a checkpoint's name is whole. It is written to a stage directory that carries
the attempt's number, hashed as it is written, fsynced; rank 0 writes the table after every rank's
word, and renames. Nothing here runs code while loading: safetensors and JSON only.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trainer.durable import publish, write_json, write_table
from trainer.engine.state import load_fragments, owned_fragments, scalars
from trainer.engine.state import write_fragments as write_rank_file
from trainer.engine.step import Engine
from trainer.errors import UserError, storage_error
from trainer.run import Run
from trainer.stored import (
    FORMAT,
    STATE,
    Checkpoint,
    Position,
    at_step,
    coverage_faults,
    newest_whole,
)

__all__ = ["Checkpoint", "Position", "at_step", "load", "newest_whole", "retain", "save"]


def save(run: Run, attempt: int, position: Position, engine: Engine, facts: dict) -> Path:
    """Write and publish a checkpoint; every rank calls it. facts: more for state.json.

    Raises UserError on every rank if any rank's storage fails; nothing half-written stays.
    """
    world, final = engine.world, run.checkpoint_path(position.step)
    stage = final.with_name(f".{final.name}.attempt-{attempt:04d}.stage")

    def make_stage() -> None:
        shutil.rmtree(stage, ignore_errors=True)
        stage.mkdir(parents=True)

    _together(world, make_stage, only_main=True, stage=stage)
    name = f"rank-{world.rank:05d}.safetensors"
    fragments = list(owned_fragments(engine))
    entry, rows = _together(world, lambda: write_rank_file(stage / name, fragments), stage=stage)
    shapes = {f.name: list(f.shape) for f in fragments}
    words = world.gather((name, entry, rows, shapes, scalars(engine)))

    def commit() -> None:
        state = {
            "format": FORMAT,
            "position": asdict(position),
            "attempt": attempt,
            "world_size": world.size,
            **facts,
            "counters": _merged_counters([w[4] for w in words]),
            "shapes": {k: v for w in words for k, v in w[3].items()},
            "fragments": {w[0]: w[2] for w in words},
        }
        # Ours to guarantee, so an assertion.
        assert not (faults := coverage_faults(state)), faults[0]
        table = {w[0]: w[1] for w in words}
        table[STATE] = write_json(stage / STATE, state)
        write_table(stage, table)
        _replace(stage, final, attempt)

    _together(world, commit, only_main=True, stage=stage)
    return final


def _replace(stage: Path, final: Path, attempt: int) -> None:
    """Publish; a checkpoint of this step that is there already makes way only now. It was judged
    when this attempt chose its parent: an older one that doesn't count, or one that couldn't be
    read. Raises UserError where it is of a newer attempt: then this one has been left behind."""
    if final.exists():
        if (present := _readable(final)) and present.attempt > attempt:
            what = f"attempt {present.attempt} has saved this step, and this is attempt {attempt}"
            raise UserError(str(final), what, "nothing: the newer attempt goes on")
        aside = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
        publish(stage, final)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        publish(stage, final)


def _readable(path: Path) -> Checkpoint | None:
    """A checkpoint that says what it is; None for one whose state.json is lost or damaged."""
    try:
        return Checkpoint(path)
    except UserError:
        return None


def _together(world, work: Callable, *, stage: Path, only_main: bool = False) -> Any:
    """Do `work` on every rank (or rank 0); if it fails anywhere, it fails everywhere, at once and
    with the same words, instead of leaving the others in a collective."""
    result, fault = None, None
    try:
        if world.is_main or not only_main:
            result = work()
    except UserError as e:
        fault = e
    except OSError as e:
        fault = storage_error(e) or UserError(str(stage), f"can't be written ({e})", "check it")
    faults = [f for f in world.gather(fault) if f]
    if faults:
        if world.is_main:
            shutil.rmtree(stage, ignore_errors=True)
        raise faults[0]
    return result


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
    from trainer.engine.state import shape_of

    shapes = {name: shape_of(param) for param, name in engine.names.items()}
    kept = engine.module.state_dict(keep_vars=True)
    shapes |= {n: tuple(b.shape) for n, b in engine.module.named_buffers() if n in kept}
    return shapes


def retain(run: Run, attempt: int, keep: int) -> list[int]:
    """Delete all but the newest `keep` eligible checkpoints; the steps deleted. Rank 0 calls it.

    Does nothing unless `attempt` is the newest: an old one that woke up has no say. What can't be
    read is left for `check` to name.
    """
    if run.attempts()[-1].number != attempt:
        return []
    readable = {step: _readable(run.checkpoint_path(step)) for step in run.checkpoint_steps()}
    steps = [s for s, found in readable.items() if found and run.is_eligible(found.attempt, s)]
    old = steps[:-keep]
    for step in old:
        path = run.checkpoint_path(step)
        doomed = path.with_name(f".{path.name}.deleted")
        path.rename(doomed)  # first the name, so that a kill here leaves nothing half-deleted
        shutil.rmtree(doomed)
    return old
