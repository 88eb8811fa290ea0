"""Writes checkpoints from all ranks, publishes them by one rename, and loads them into any engine;
and writes weights that no engine holds as a checkpoint of step 0, which runs begin with.

saver.py decides when and in which thread; reader.py reads what is on disk; retention.py deletes.

Invariant: a directory with a checkpoint's name is complete. It is written to a stage directory
named after the attempt, hashed while written, fsynced; when all ranks have finished, rank 0 writes
the table and renames. Loading runs no code from the checkpoint: safetensors and JSON only.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from forescale.checkpoint.choice import open_readable
from forescale.checkpoint.reader import FORMAT, STATE, Checkpoint, Position, coverage_faults
from forescale.checkpoint.retention import is_pinned
from forescale.engine.portable.fragments import WEIGHT, Fragment
from forescale.engine.portable.fragments import write_fragments as write_rank_file
from forescale.engine.portable.strips import Series, rank_file, strip_of, united
from forescale.engine.ranks import ALONE, Ranks
from forescale.engine.state import load_fragments, owned_fragments, scalars
from forescale.engine.step import Engine
from forescale.ground.errors import UserError
from forescale.ground.storage import FileEntry, fsync_path, publish, write_json, write_table
from forescale.models.adapters import adapter_of, is_adapter
from forescale.run.directory import Run

Midway = Callable[[int, Path], None]
_SLACK = 1 << 20  # bytes that must be free on the disk besides the tensors and their descriptions
_NO_ATTEMPT = 0  # has saved weights that no engine holds
_HEADER = 512  # about this many bytes describe a fragment, in its file and in state.json


@dataclass(frozen=True)
class Snapshot:
    """One rank's part of a state at `position`; facts: further content of state.json."""

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
        """Return a snapshot of an engine. Unless `copied` copies, it is valid only until the engine
        trains on."""
        return cls(position, copied(owned_fragments(engine)), scalars(engine), facts)

    @property
    def size(self) -> int:
        """Approximate bytes on disk."""
        return sum(f.data.nbytes + _HEADER for f in self.fragments)


def write(
    run: Run,
    attempt: int,
    snapshot: Snapshot,
    ranks: Ranks,
    midway: Midway = lambda step, path: None,
) -> int | None:
    """Write and publish the snapshots of all ranks; every rank calls it. Return the bytes of the
    tensors of all ranks, on rank 0.

    midway: called with the step and this rank's file when half of the file is written. Raises
    UserError on every rank if any rank's storage fails, if there is no room (before anything is
    written), or if a newer attempt started before this step; no partial checkpoint stays.
    """
    step, size = snapshot.position.step, ranks.merged(snapshot.size, sum)
    stage = stage_of(run, attempt, step)
    try:
        ranks.from_main(partial(make_stage, run, attempt, step, size), run.checkpoints)
        total = write_files(stage, attempt, snapshot, ranks, midway)
        ranks.from_main(partial(publish_stage, run, attempt, step), stage)
        return total
    except UserError:
        if ranks.is_main:
            shutil.rmtree(stage, ignore_errors=True)
        raise


def stage_of(run: Run, attempt: int, step: int) -> Path:
    """Return where `attempt` writes the checkpoint of `step` before it is published."""
    final = run.checkpoint_path(step)
    return final.with_name(f".{final.name}.attempt-{attempt:04d}.stage")


def make_stage(run: Run, attempt: int, step: int, size: int) -> None:
    """Make `stage_of` the arguments, empty. Raises UserError if there are not `size` bytes free on
    the disk, or if a newer attempt started before this step."""
    _expect_eligible(run, attempt, step)
    stage = stage_of(run, attempt, step)
    shutil.rmtree(stage, ignore_errors=True)
    if not run.checkpoints.is_dir():
        run.checkpoints.mkdir(parents=True)
        fsync_path(run.path)
    needed, free = size + _SLACK, shutil.disk_usage(run.path).free  # a quota isn't seen
    if free < needed:
        problem = f"the disk is full: a checkpoint needs {needed:,} bytes, {free:,} are free"
        todo = "free some space, then give the same command again"
        raise UserError(str(run.checkpoints), problem, todo)
    stage.mkdir()


def write_files(
    stage: Path, attempt: int, snapshot: Snapshot, ranks: Ranks, midway: Midway
) -> int | None:
    """Write the files of a checkpoint into `stage`: each rank its own, rank 0 also state.json and
    the table. Otherwise as `write`."""
    position, file = snapshot.position, rank_file(ranks.rank)

    def write_own() -> dict[str, Any]:
        path = stage / file
        entry, rows = write_rank_file(path, snapshot.fragments, lambda: midway(position.step, path))
        return {
            "table": {file: vars(entry)},
            "fragments": [s.row for s in united(Series.of(ranks.rank, row) for row in rows)],
            "shapes": {f.name: list(f.shape) for f in snapshot.fragments},
            "counters": snapshot.counters,
        }

    def commit() -> None:
        state = {
            "format": FORMAT,
            "position": asdict(position),
            "attempt": attempt,
            "world_size": ranks.size,
            **snapshot.facts,
            **{key: whole[key] for key in ("counters", "shapes", "fragments")},
        }
        # A fault here is a bug of ours, so an assertion.
        fragments = map(Series.from_row, whole["fragments"])
        assert not (faults := coverage_faults(whole["shapes"], fragments)), faults[0]
        table = {name: FileEntry(**entry) for name, entry in whole["table"].items()}
        table[STATE] = write_json(stage / STATE, state, compact=True)
        write_table(stage, table)

    whole = ranks.together_for_main(write_own, stage, _merged)
    ranks.from_main(commit, stage)
    return sum(entry["size"] for entry in whole["table"].values()) if ranks.is_main else None


def _merged(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what several ranks have written as one description, no longer than that of one but for
    the table of files."""
    merged = {
        key: {k: v for part in parts for k, v in part[key].items()} for key in ("table", "shapes")
    }
    series = united(Series.from_row(row) for part in parts for row in part["fragments"])
    counters = [part["counters"] for part in parts]
    # A rank without a part of a group has no step for it.
    steps = {k: v for each in counters for k, v in each["optimizer_steps"].items()}
    return {
        **merged,
        "fragments": [each.row for each in series],
        "counters": {**counters[0], "optimizer_steps": steps},
    }


def _expect_eligible(run: Run, attempt: int, step: int) -> None:
    """Raises UserError if a newer attempt started before this step, so that the checkpoint could
    never be loaded. (This one was suspended, or cut off from the others.)"""
    if not run.is_eligible(attempt, step):
        newest = run.attempts()[-1].number
        problem = f"attempt {newest} started before step {step:,}, and this is attempt {attempt}"
        raise UserError(str(run.path), problem, "do nothing: the newer attempt goes on")


def publish_stage(run: Run, attempt: int, step: int) -> None:
    """Publish `stage_of` the arguments. An existing checkpoint of this step is replaced only now:
    it is of an older attempt and not eligible, or could not be read when this attempt chose its
    parent. A pinned one stays on the disk under another name.

    This attempt may be suspended anywhere here and overtaken. So the old checkpoint is judged when
    no other attempt can reach it any more, and goes back if it is a newer attempt's.
    """
    stage, final = stage_of(run, attempt, step), run.checkpoint_path(step)
    _expect_eligible(run, attempt, step)
    if not final.exists():
        return publish(stage, final)
    _expect_older(open_readable(final), attempt)
    pinned = is_pinned(run, step)
    kind = "pinned" if pinned else "replaced"  # what is called pinned, nothing sweeps away
    aside = final.with_name(f".{final.name}.attempt-{attempt:04d}.{kind}")
    shutil.rmtree(aside, ignore_errors=True)
    final.rename(aside)
    try:
        present = open_readable(aside)
        _expect_older(present, attempt)
        _expect_eligible(run, attempt, step)
    except UserError:
        if not final.exists():
            aside.rename(final)
        raise
    if present is not None and pinned:
        pinned_path = final.with_name(f".{final.name}.attempt-{present.attempt:04d}.pinned")
        shutil.rmtree(pinned_path, ignore_errors=True)
        aside.rename(pinned_path)
    publish(stage, final)
    if present is None or not pinned:
        shutil.rmtree(aside, ignore_errors=True)


def _expect_older(present: Checkpoint | None, attempt: int) -> None:
    """Raise UserError if a newer attempt has saved the checkpoint that is to be replaced."""
    if present and present.attempt > attempt:
        problem = f"attempt {present.attempt} has saved this step, and this is attempt {attempt}"
        raise UserError(str(present.path), problem, "do nothing: the newer attempt goes on")


def load(checkpoint: Checkpoint, engine: Engine, weights_only: bool = False) -> None:
    """Load a checkpoint into every rank's part of an engine of any world size, stage and precision.

    weights_only: its weights, adapters merged; those of the engine stay as they were drawn. Raises
    UserError if the checkpoint is of another model.
    """
    shapes = engine.shapes | engine.buffer_shapes
    if not weights_only:
        checkpoint.expect_shapes(shapes)
        load_fragments(engine, checkpoint.reader, checkpoint.state["counters"])
        return
    plain = {name: shape for name, shape in shapes.items() if not is_adapter(name)}
    checkpoint.expect_shapes(plain, merged=True)
    load_fragments(engine, MergedReader(checkpoint), None)


class MergedReader:
    """Fills fragments of weights as a FragmentReader does, adapters merged: any range is that range
    of W + scale B A, added in fp32. The engine's own adapters stay as they are."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._last: tuple[str, Tensor] | None = None  # ranges of a matrix are read in turn

    def states(self, name: str) -> list[str]:
        return self._checkpoint.reader.states(name)

    def fill(self, fragment: Fragment) -> None:
        """Fill the data of a fragment, of any division, unless it is of an adapter."""
        f = fragment
        if is_adapter(f.name):
            return
        if adapter_of(f.name)[0] not in self._checkpoint.shapes:
            self._checkpoint.reader.fill(f)
            return
        if self._last is None or self._last[0] != f.name:
            self._last = None  # before the next is made
            self._last = f.name, self._checkpoint.merged(f.name).view(-1)
        whole = self._last[1]
        strip = strip_of([f.start, f.data.numel(), *(f.cut or ())])
        for at, place, size in strip.overlaps(strip.low, strip.high):
            f.data[place : place + size].copy_(whole[at : at + size])


def unread_weight(
    name: str, shape: Sequence[int], start: int, described: Tensor, read: Callable[[], Tensor]
) -> Fragment:
    """Return a contiguous part of a parameter of `shape`, from element `start`, for write_weights.

    described: a tensor on the meta device with the part's number of elements and number format;
    read: returns the part, in any shape, when it is written.
    """
    return Fragment(name, tuple(shape), WEIGHT, start, described.view(-1), read=read)


def write_weights(run: Run, weights: Sequence[Fragment], tick: Callable[[int], None]) -> None:
    """Publish the weights (unread_weight), which are all parameters of a model, as the run's
    checkpoint of step 0.

    tick: called with the bytes of one when it is read. Raises UserError as `writer.write` does.
    """

    def counted(weight: Fragment) -> Fragment:
        def read() -> Tensor:
            tick(weight.data.nbytes)
            assert weight.read is not None
            return weight.read()

        return replace(weight, read=read)

    counters: dict[str, Any] = {"optimizer_steps": {}, "loss_scaler": {}}
    snapshot = Snapshot(Position(), [counted(weight) for weight in weights], counters, {})
    write(run, _NO_ATTEMPT, snapshot, ALONE)
