"""Checkpoints as they lie on disk: what one says of itself, whether it is whole, which one counts.

    checkpoints/step-00001000/
      rank-00000.safetensors ...   fragments of weights and moments (engine/state.py)
      state.json                   step, g, who wrote it, which fragment lies where, counters
      files.json                   the table: size and sha256 of each, written last

Invariant: nothing here needs an engine, or runs code that a checkpoint holds; and nothing but
reading tensors imports torch, so that `status` starts at once.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forescale.engine.ranks import ALONE, Ranks
from forescale.errors import UserError
from forescale.run.directory import Run
from forescale.storage import check_table, read_json

if TYPE_CHECKING:
    from torch import Tensor

    from forescale.engine.state import FragmentReader

Tell = Callable[..., None]
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
        from forescale.engine.state import FragmentReader

        return FragmentReader(self.path, self.state["fragments"])

    def tensor(self, name: str, state: str = "weight") -> "Tensor":
        """One whole parameter or moment, fp32, in its shape."""
        from torch import empty, float32

        out = empty(self.shapes[name], dtype=float32)
        self.reader.read_into(name, state, 0, out.view(-1))
        return out

    def weights(self) -> "Weights":
        """All parameters and buffers by name, fp32, each read when it is asked for."""
        return Weights(self)


class Weights(Mapping[str, "Tensor"]):
    """A checkpoint's weights, none of them held."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint

    def __getitem__(self, name: str) -> "Tensor":
        if name not in self._checkpoint.shapes:
            raise KeyError(name)
        return self._checkpoint.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint.shapes)

    def __len__(self) -> int:
        return len(self._checkpoint.shapes)


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


def newest_whole(run: Run, tell: Tell, ranks: Ranks = ALONE) -> Checkpoint | None:
    """The newest eligible checkpoint whose every byte is as it was written, or None for a run that
    has none. `tell(kind, **facts)` is told of each that is passed over. Every one of `ranks` calls
    it together and reads its share of the files; all get the same answer.

    Raises UserError where there are checkpoints but none can be used: never back to step 0.
    """
    steps = _steps(run, ranks)
    found = _first_whole(run, reversed(steps), tell, ranks)
    if found is None and steps:
        raise UserError(
            str(run.checkpoints),
            f"none of its {len(steps)} checkpoints can be used",
            f"`forescale check {run.path}` names the faults; restore one, or give run.name another",
        )
    return found


def before(run: Run, newest: int, strictly: bool, tell: Tell, ranks: Ranks = ALONE) -> Checkpoint:
    """The newest whole eligible checkpoint of step `newest` or before; where there is none and it
    is not needed `strictly`, the oldest of those after. Called and told as `newest_whole`.

    Raises UserError where there is none to go to.
    """
    steps = _steps(run, ranks)
    early = [s for s in reversed(steps) if s <= newest]
    later = [] if strictly else [s for s in steps if s > newest]
    if found := _first_whole(run, early + later, tell, ranks):
        return found
    what = f"has no whole checkpoint of step {newest:,} or before to go back to"
    raise UserError(str(run.path), what, "keep more with checkpoint.keep or checkpoint.keep_every")


def _steps(run: Run, ranks: Ranks) -> list[int]:
    return ranks.from_main(run.checkpoint_steps, run.checkpoints)


def _first_whole(run: Run, steps: Iterable[int], tell: Tell, ranks: Ranks) -> Checkpoint | None:
    for step in steps:
        path = run.checkpoint_path(step)
        # What it says of itself is little, and may make it needless to read the rest.
        faults, counts = ranks.from_main(partial(_first_look, run, step), path)
        if not faults and not counts:
            tell("checkpoint_passed_over", step=step, reason="a later attempt went on before it")
        elif faults := faults or shared_faults(path, ranks):
            tell("checkpoint_damaged", step=step, faults=faults)
        else:
            return _own(path, ranks)
    return None


def _own(path: Path, ranks: Ranks) -> Checkpoint:
    """The checkpoint as each rank reads it: what one says of itself grows with the ranks that wrote
    it, so nobody hands it on."""
    found: list[Checkpoint] = []
    ranks.together(lambda: found.append(Checkpoint(path)), path)
    return found[0]


def _first_look(run: Run, step: int) -> tuple[list[str], bool]:
    """The faults of a checkpoint's state.json, and whether the checkpoint is eligible."""
    path = run.checkpoint_path(step)
    if faults := check_table(path, only=STATE):
        return faults, False
    checkpoint = Checkpoint(path)
    if (own := checkpoint.position.step) != step:
        return [f"{path}: holds step {own:,}"], False
    return [], run.is_eligible(checkpoint.attempt, step)


def shared_faults(path: Path, ranks: Ranks, afresh: bool = False) -> list[str]:
    """Every byte of a published directory against its table, each rank's share of the files read by
    that rank; the faults that all have found, on every rank. afresh: as durable.hash_file."""
    mine = partial(check_table, path, part=(ranks.rank, ranks.size), afresh=afresh)
    found = ranks.together(mine, path)
    return list(dict.fromkeys(fault for faults in found for fault in faults))


def at_step(run: Run, step: int | None, ranks: Ranks = ALONE) -> Checkpoint:
    """The checkpoint of `step`, or the newest whole one; UserError where there is none. Called as
    `newest_whole`."""
    if step is None:
        checkpoint = newest_whole(run, lambda kind, **facts: None, ranks)
        if checkpoint is None:
            todo = f"train it: forescale train run.name={run.name}"
            raise UserError(str(run.path), "this run has no checkpoint yet", todo)
        return checkpoint
    path = run.checkpoint_path(step)
    known = _steps(run, ranks)
    if step not in known:
        steps = ", ".join(map(str, known)) or "none"
        raise UserError(str(path), "no such checkpoint", f"choose one of these steps: {steps}")
    return whole(path, ranks)


def readable(path: Path) -> Checkpoint | None:
    """A checkpoint that says what it is; None for one whose state.json is lost or damaged."""
    try:
        return Checkpoint(path)
    except UserError:
        return None


def whole(path: Path | str, ranks: Ranks = ALONE) -> Checkpoint:
    """The checkpoint at a path, every byte of it verified; UserError where it is damaged. Called
    as `newest_whole`."""
    if faults := shared_faults(Path(path), ranks):
        raise UserError(str(path), f"damaged ({faults[0]})", "choose another step")
    return Checkpoint(path)
