"""Checkpoints: written by all ranks, published by one rename, chosen by lineage, kept by number.

    checkpoints/step-00001000/
      rank-00000.safetensors ...   fragments of weights and moments (engine/state.py)
      state.json                   step, g, who wrote it, which fragment lies where, counters
      files.json                   the table: size and sha256 of each, written last

Invariant: what bears a checkpoint's name is whole. It is written to a stage directory that carries
the attempt's number, hashed as it is written, fsynced; rank 0 writes the table after every rank's
word, and renames. Nothing here runs code while loading: safetensors and JSON only.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, empty, float32

from trainer.durable import check_table, publish, read_json, write_json, write_table
from trainer.engine.state import WEIGHT, FragmentReader, load_fragments, owned_fragments, scalars
from trainer.engine.state import write_fragments as write_rank_file
from trainer.engine.step import Engine
from trainer.errors import UserError, storage_error
from trainer.run import Run

FORMAT = 1
STATE = "state.json"


@dataclass(frozen=True)
class Position:
    """How far a run is: optimizer steps, the next global sample index, targets trained on."""

    step: int = 0
    g: int = 0
    tokens: int = 0


class Checkpoint:
    """One published checkpoint, readable without an engine, tensor by tensor."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self.state: dict[str, Any] = read_json(self.path / STATE)
        if self.state.get("format") != FORMAT:
            found = self.state.get("format")
            todo = "load it with the version of forescale that wrote it"
            raise UserError(str(self.path), f"checkpoint format {found}, not {FORMAT}", todo)

    @property
    def position(self) -> Position:
        return Position(**self.state["position"])

    @property
    def attempt(self) -> int:
        return self.state["attempt"]

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Full shape of each parameter and persistent buffer, by name."""
        return self.state["shapes"]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(f.stat().st_size for f in self.path.iterdir())

    def reader(self) -> FragmentReader:
        return FragmentReader(self.path, self.state["fragments"])

    def tensor(self, name: str, state: str = WEIGHT) -> Tensor:
        """One whole parameter or moment, fp32, in its shape."""
        out = empty(self.shapes[name], dtype=float32)
        self.reader().read_into(name, state, 0, out.view(-1))
        return out

    def weights(self) -> dict[str, Tensor]:
        """All parameters and buffers by name, fp32."""
        return {name: self.tensor(name) for name in self.shapes}


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
        _assert_each_element_once(state)
        table = {w[0]: w[1] for w in words}
        table[STATE] = write_json(stage / STATE, state)
        write_table(stage, table)
        _replace(stage, final)

    _together(world, commit, only_main=True, stage=stage)
    return final


def _replace(stage: Path, final: Path) -> None:
    """Publish; a checkpoint of this step that is there already makes way only now. It was judged
    when this attempt chose its parent: an older one that doesn't count, or one that couldn't be
    read."""
    if final.exists():
        aside = final.with_name(f".{final.name}.replaced")
        shutil.rmtree(aside, ignore_errors=True)
        final.rename(aside)
        publish(stage, final)
        shutil.rmtree(aside, ignore_errors=True)
    else:
        publish(stage, final)


def _together(world, work: Callable, *, stage: Path, only_main: bool = False) -> Any:
    """Do `work` on every rank (or rank 0); if it fails anywhere, it fails everywhere, at once and
    with the same words, instead of leaving the others in a collective."""
    result, fault = None, None
    try:
        if world.is_main or not only_main:
            result = work()
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


def _assert_each_element_once(state: dict) -> None:
    """Ours to guarantee, so an assertion: the fragments cover every state exactly."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for rows in state["fragments"].values():
        for name, kind, start, size in rows:
            found.setdefault((name, kind), []).append((start, size))
    for (name, kind), parts in found.items():
        end = 0
        for start, size in sorted(parts):
            assert start == end, f"{kind} of {name}: a gap or an overlap at {end}"
            end = start + size
        total = 1
        for n in state["shapes"][name]:
            total *= n
        assert end == total, f"{kind} of {name}: {end} of {total} elements"


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
    load_fragments(engine, checkpoint.reader(), counters)


def _model_shapes(engine: Engine) -> dict[str, tuple[int, ...]]:
    from trainer.engine.state import shape_of

    shapes = {name: shape_of(param) for param, name in engine.names.items()}
    kept = engine.module.state_dict(keep_vars=True)
    shapes |= {n: tuple(b.shape) for n, b in engine.module.named_buffers() if n in kept}
    return shapes


def newest_whole(run: Run, tell: Callable[..., None]) -> Checkpoint | None:
    """The newest eligible checkpoint whose every byte is as it was written, or None for a run that
    has none. `tell(kind, **facts)` is told of each that is passed over.

    Raises UserError where there are checkpoints but none can be used: never back to step 0.
    """
    steps = run.checkpoint_steps()
    for step in reversed(steps):
        path = run.checkpoint_path(step)
        faults = check_table(path)
        if faults:
            tell("checkpoint_damaged", step=step, faults=faults)
            continue
        checkpoint = Checkpoint(path)
        if run.is_eligible(checkpoint.attempt, step):
            return checkpoint
        tell("checkpoint_passed_over", step=step, reason="a later attempt went on from before it")
    if steps:
        raise UserError(
            str(run.checkpoints),
            f"none of its {len(steps)} checkpoints can be used",
            f"`forescale check {run.path}` names the faults; restore one, or give run.name another",
        )
    return None


def at_step(run: Run, step: int | None) -> Checkpoint:
    """The checkpoint of `step`, or the newest whole one; UserError where there is none."""
    if step is None:
        checkpoint = newest_whole(run, lambda kind, **facts: None)
        if checkpoint is None:
            todo = f"train it: forescale train run.name={run.name}"
            raise UserError(str(run.path), "this run has no checkpoint yet", todo)
        return checkpoint
    path = run.checkpoint_path(step)
    if not path.is_dir():
        known = ", ".join(map(str, run.checkpoint_steps())) or "none"
        raise UserError(str(path), "no such checkpoint", f"choose one of these steps: {known}")
    if faults := check_table(path):
        raise UserError(str(path), f"damaged ({faults[0]})", "choose another step")
    return Checkpoint(path)


def retain(run: Run, attempt: int, keep: int) -> list[int]:
    """Delete all but the newest `keep` eligible checkpoints; the steps deleted. Rank 0 calls it.

    Does nothing unless `attempt` is the newest: an old one that woke up has no say.
    """
    if run.attempts()[-1].number != attempt:
        return []
    steps = [
        step
        for step in run.checkpoint_steps()
        if run.is_eligible(Checkpoint(run.checkpoint_path(step)).attempt, step)
    ]
    old = steps[:-keep]
    for step in old:
        path = run.checkpoint_path(step)
        doomed = path.with_name(f".{path.name}.deleted")
        path.rename(doomed)  # first the name, so that a kill here leaves nothing half-deleted
        shutil.rmtree(doomed)
    return old
