"""Checkpoints as they lie on disk: what one says of itself, whether it is whole, which one counts.

    checkpoints/step-00001000/
      rank-00000.safetensors ...   fragments of weights and moments (engine/state.py)
      state.json                   step, g, who wrote it, which fragment lies where, counters
      files.json                   the table: size and sha256 of each, written last

Invariant: nothing here needs an engine, or runs code that a checkpoint holds; and nothing but
reading tensors imports torch, so that `status` starts at once.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.durable import check_table, read_json
from trainer.errors import UserError
from trainer.run import Run

if TYPE_CHECKING:
    from torch import Tensor

    from trainer.engine.state import FragmentReader

FORMAT = 1
STATE = "state.json"
_RESTORE = "restore the checkpoint, or choose another"
_KEYS = {"position", "attempt", "world_size", "shapes", "fragments", "counters"}


@dataclass(frozen=True)
class Position:
    """How far a run is: optimizer steps, the next global sample index, targets trained on; which
    samples were passed over for good (half-open intervals), and which members (source, shard's
    number, key) count as damaged from here on."""

    step: int = 0
    g: int = 0
    tokens: int = 0
    skipped: tuple[tuple[int, int], ...] = ()
    quarantined: tuple[tuple[str, int, str], ...] = ()

    @classmethod
    def of(cls, stored: dict[str, Any]) -> "Position":
        """From JSON, which knows no tuples."""
        lists = {k: tuple(map(tuple, v)) for k, v in stored.items() if isinstance(v, list)}
        return cls(**{**stored, **lists})

    @property
    def counts(self) -> tuple[int, int, int]:
        """Step, g and tokens, which every row of metrics has too."""
        return self.step, self.g, self.tokens


class Checkpoint:
    """One published checkpoint, readable without an engine, tensor by tensor.

    Raises UserError where the path holds none, or one of a format that this version doesn't know.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.state: dict[str, Any] = read_json(self.path / STATE)
        found = self.state.get("format") if isinstance(self.state, dict) else None
        if found != FORMAT:
            todo = "load it with the version of forescale that wrote it"
            raise UserError(str(self.path), f"checkpoint format {found}, not {FORMAT}", todo)
        if missing := _KEYS - self.state.keys():
            what = f"its {STATE} has no {', '.join(sorted(missing))}"
            raise UserError(str(self.path), what, _RESTORE)

    @property
    def position(self) -> Position:
        return Position.of(self.state["position"])

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

    @cached_property
    def reader(self) -> "FragmentReader":
        """Reads ranges of the states; opens only the files that hold them."""
        from trainer.engine.state import FragmentReader

        return FragmentReader(self.path, self.state["fragments"])

    def tensor(self, name: str, state: str = "weight") -> "Tensor":
        """One whole parameter or moment, fp32, in its shape."""
        from torch import empty, float32

        out = empty(self.shapes[name], dtype=float32)
        self.reader.read_into(name, state, 0, out.view(-1))
        return out

    def weights(self) -> dict[str, "Tensor"]:
        """All parameters and buffers by name, fp32."""
        return {name: self.tensor(name) for name in self.shapes}


def coverage_faults(state: dict[str, Any]) -> list[str]:
    """Where the fragments of a state.json don't hold every element of every state exactly once."""
    found: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for rows in state["fragments"].values():
        for name, kind, start, size in rows:
            found.setdefault((name, kind), []).append((start, size))
    shapes = state["shapes"]
    stored = {name for name, kind in found if kind == "weight"}
    faults = [f"weight of {name}: no fragment" for name in sorted(shapes.keys() - stored)]
    for (name, kind), parts in found.items():
        if name not in shapes:
            faults.append(f"{kind} of {name}: a fragment of no known parameter")
            continue
        end = 0
        for start, size in sorted(parts):
            if start != end:
                faults.append(f"{kind} of {name}: a gap or an overlap at element {end:,}")
                break
            end = start + size
        else:
            if end != (total := math.prod(shapes[name])):
                faults.append(f"{kind} of {name}: {end:,} of {total:,} elements")
    return faults


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
    return whole(path)


def whole(path: Path | str) -> Checkpoint:
    """The checkpoint at a path, every byte of it verified; UserError where it is damaged."""
    if faults := check_table(Path(path)):
        raise UserError(str(path), f"damaged ({faults[0]})", "choose another step")
    return Checkpoint(path)
