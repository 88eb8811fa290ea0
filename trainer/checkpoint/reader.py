"""Reads published checkpoints. Which one of a run is read: choice.py.

    checkpoints/step-00001000/
      rank-00000.safetensors ...   fragments of weights and moments (engine/portable)
      state.json                   step, g, who wrote it, where each fragment is, counters
      files.json                   the table: size and sha256 of each, written last

Invariant: nothing here needs an engine or runs code from a checkpoint; only reading tensors imports
torch, so that `status` starts at once.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

from typing_extensions import TypedDict

from forescale.engine.portable.strips import Series, united
from forescale.ground.errors import UserError, shortened
from forescale.ground.storage import FileEntry, read_json
from forescale.ground.typed import AnyNumber, Count, Number, Size, Whole, typed
from forescale.models.adapters import adapter_of, is_adapter

if TYPE_CHECKING:
    from torch import Tensor

    from forescale.engine.portable.fragments import FragmentReader

FORMAT = 4
_FORMAT_BY_FILE = 3  # the format before: a row of each fragment
STATE = "state.json"
_RANK_FILE = re.compile(r"rank-([0-9]{5,9})\.safetensors")
_RESTORE = "restore the checkpoint, or choose another"


@dataclass(frozen=True)
class Position:
    """How far a run is.

    step: optimizer steps made; g: the next global sample index; tokens: targets trained on.
    skipped: half-open intervals of samples skipped for good; quarantined: members (source, shard's
    number, key) that count as damaged from here on.
    """

    step: Count = 0
    g: Count = 0
    tokens: Count = 0
    skipped: tuple[tuple[Count, Count], ...] = ()
    quarantined: tuple[tuple[str, Count, str], ...] = ()

    @property
    def counts(self) -> tuple[int, int, int]:
        """(step, g, tokens), which every row of metrics has too."""
        return self.step, self.g, self.tokens


_Row = tuple[str, str, Count, Count]
_StripRow = tuple[str, str, Count, Count, Count, Count, Count]


class Counters(TypedDict, total=False):
    """The state that isn't a tensor. optimizer_steps: by parameter group; bounds: exponents by
    parameter, of engine/invariant.py."""

    optimizer_steps: dict[str, Count]
    loss_scaler: dict[str, AnyNumber | None]
    bounds: dict[str, int]


class Guard(TypedDict):
    """What the guard (train/guard.py) knows of the steps before."""

    losses: list[AnyNumber]
    norms: list[AnyNumber]
    anomalous_in_a_row: Count


class Watched(TypedDict):
    """What a comparison with a forecast (run/band.py) knows of the steps before.
    of: the hash of the forecast, and the steps of the run."""

    of: str
    means: list[AnyNumber]
    ends: list[Count]
    sum: AnyNumber
    count: Count
    since: tuple[Count, Count] | None
    inside: Count
    alarm: tuple[Count, AnyNumber, AnyNumber] | None
    left: list[tuple[Whole, Count]]


class Numerics(TypedDict, total=False):
    """What bits depend on (run/start.py), with further keys. *_parallel: how many ranks divide."""

    stage: Count
    tensor_parallel: Count
    sequence_parallel: Count
    context_parallel: Count
    expert_parallel: Count


_SeriesRow = tuple[
    str, str, Count, Count, tuple[Count, Count, Count] | None, Count, Size, Whole, Count
]


class State(TypedDict):
    """The content of state.json.

    fragments: rows of Series (engine/portable/strips.py); logged: the attempt's files of rows,
    by name, at that time; adapter_scale: of a run with adapters; outer: the step of the last round
    of a run on several clusters.
    """

    position: Position
    attempt: Count
    world_size: Count
    shapes: dict[str, list[Count]]
    fragments: list[_SeriesRow]
    counters: Counters
    numerics: NotRequired[Numerics | None]
    guard: NotRequired[Guard | None]
    watch: NotRequired[Watched | None]
    logged: NotRequired[dict[str, FileEntry]]
    adapter_scale: NotRequired[Number | None]
    outer: NotRequired[dict[str, Count]]


class _StateByFile(State):
    fragments: dict[str, list[_Row | _StripRow]]  # type: ignore[misc]


class Checkpoint:
    """One published checkpoint, readable without an engine, tensor by tensor.

    partial: it holds some of the model's parameters. Raises UserError if the path holds none, or
    one of a format that this version can't read.
    """

    def __init__(self, path: Path | str, partial: bool = False):
        self.path = Path(path)
        where, stored = self.path / STATE, read_json(self.path / STATE)
        version = stored.get("format") if isinstance(stored, dict) else None
        if version not in (_FORMAT_BY_FILE, FORMAT) or type(version) is not int:
            known = f"{_FORMAT_BY_FILE} or {FORMAT}"
            problem = f"checkpoint format {shortened(str(version), 20)}, not {known}"
            todo = "load it with the version of forescale that wrote it"
            raise UserError(str(self.path), problem, todo)
        typed(State if version == FORMAT else _StateByFile, stored, str(where), _RESTORE)
        self.state: dict[str, Any] = stored
        if fault := next(_contradictions(self.state, partial), None):
            raise UserError(str(where), f"is damaged: {fault}", _RESTORE)
        # Where the run was when it was saved.
        self.position = typed(Position, self.state["position"], str(where), _RESTORE)

    @property
    def attempt(self) -> int:
        return self.state["attempt"]

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Full shape of each parameter and persistent buffer, by name."""
        return self.state["shapes"]

    @cached_property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(f.stat().st_size for f in self.path.iterdir())

    @cached_property
    def reader(self) -> "FragmentReader":
        """Reader of ranges of the states; opens only the files that hold them."""
        from forescale.engine.portable.fragments import FragmentReader

        return FragmentReader(self.path, self.fragments)

    @cached_property
    def fragments(self) -> list[Series]:
        """Where each element of each state is. Raises UserError if that is outside the path."""
        stored = self.state["fragments"]
        if isinstance(stored, list):
            return [Series.from_row(row) for row in stored]
        every = []
        for file, rows in stored.items():
            if not (match := _RANK_FILE.fullmatch(file)):
                problem = f"names a file outside its directory, {file!r}"
                raise UserError(str(self.path), problem, _RESTORE)
            every += [Series.of(int(match[1]), row) for row in rows]
        return united(every)

    def tensor(self, name: str, state: str = "weight") -> "Tensor":
        """Return a full parameter or moment, fp32, in its shape."""
        from torch import empty, float32

        self.expect_bytes([name])
        out = empty(self.shapes[name], dtype=float32)
        self.reader.read_into(name, state, 0, out.view(-1))
        return out

    def expect_bytes(self, names: Iterable[str]) -> None:
        """Raise UserError if the files are too small for parameters: each number has a byte or
        more. Their shapes can be anything."""
        if sum(math.prod(self.shapes[name]) for name in names) > self.size:
            problem = f"is damaged: the shapes in its {STATE} are larger than its files"
            raise UserError(str(self.path), problem, _RESTORE)

    def merged(self, name: str) -> "Tensor":
        """Return a full parameter as `tensor` does, with its adapter merged, if it has one."""
        weight, (down, up) = self.tensor(name), adapter_of(name)
        if down in self.shapes:
            weight.addmm_(self.tensor(up), self.tensor(down), alpha=self.state["adapter_scale"])
        return weight

    def weights(self) -> "Weights":
        """Return all parameters and buffers by name, fp32, adapters merged; each is read on
        access."""
        self.expect_bytes(self.shapes)
        return Weights(self)

    def expect_shapes(self, model: Mapping[str, Sequence[int]], merged: bool = False) -> None:
        """Raise UserError unless the parameters and persistent buffers of `model` (shape by name)
        are those of the checkpoint; merged: of its `weights`."""
        stored_shapes = self.weights().shapes if merged else self.shapes
        for name in sorted(model.keys() | stored_shapes.keys()):
            shape = list(model[name]) if name in model else None
            if shape != (stored := stored_shapes.get(name)):
                problem = f"parameter {name} is {stored} there and {shape} in this model"
                raise UserError(str(self.path), problem, "use the model of the run that saved it")


class Weights(Mapping[str, "Tensor"]):
    """A checkpoint's weights by name, adapters merged, read on access and not kept."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self.shapes = {k: v for k, v in checkpoint.shapes.items() if not is_adapter(k)}

    def __getitem__(self, name: str) -> "Tensor":
        if name not in self.shapes:
            raise KeyError(name)
        return self._checkpoint.merged(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def _contradictions(state: dict[str, Any], partial: bool) -> Iterator[str]:
    """Yield a phrase for each part of a state.json, of the right types, that can't be: a strip
    whose runs are empty or don't fit between two of their begins, or, unless it is partial, an
    adapter that fits no weight."""
    stored = state["fragments"]
    by_file = isinstance(stored, dict)
    rows = [row for each in stored.values() for row in each] if by_file else stored
    for name, _, _, size, *division in rows:
        cut = division if by_file else division[0]
        if cut and not 0 < cut[0] <= cut[1] - cut[2]:
            yield f"a fragment of {name} is in the strip {list(cut)}"
        elif not by_file:
            rank, count, rank_step, start_step = division[1:]
            last = rank + (count - 1) * rank_step
            if max(rank, last) >= state["world_size"] or last < 0:
                yield f"fragments of {name} are in files of ranks that it doesn't have"
            # Else their number would be bounded by nothing, and whoever counts them would not end.
            elif count > 1 and (not size or start_step < (1 if cut else size)):
                yield f"{count:,} fragments of {name} have no distance from each other"
    shapes = {} if partial else state["shapes"]
    adapters = {name for name in shapes if is_adapter(name)}
    for name, shape in shapes.items() if adapters else ():
        down, up = adapter_of(name)
        if name in adapters or down not in adapters:
            continue
        ranks = shapes[down][:1]
        if [shapes[down], shapes.get(up)] != [[*ranks, *shape[1:]], [*shape[:1], *ranks]]:
            yield f"the adapter of {name} has another shape"
        adapters -= {down, up}
    if adapters:
        yield f"{min(adapters)} is the adapter of no weight"
    elif state.get("adapter_scale") is None and any(map(is_adapter, shapes)):
        yield "adapter_scale is missing"


def coverage_faults(shapes: Mapping[str, Sequence[int]], fragments: Iterable[Series]) -> list[str]:
    """Return where the fragments don't cover every element of every state exactly once, a sentence
    each."""
    by_state: dict[tuple[str, str], list[Series]] = {}
    for series in fragments:
        by_state.setdefault((series.name, series.state), []).append(series)
    stored = {name for name, kind in by_state if kind == "weight"}
    faults = [f"weight of {name}: no fragment" for name in sorted(shapes.keys() - stored)]
    for (name, kind), parts in by_state.items():
        if name not in shapes:
            faults.append(f"{kind} of {name}: a fragment of no known parameter")
            continue
        end, total = 0, math.prod(shapes[name])
        if (size := sum(part.size * part.count for part in parts)) != total:
            faults.append(f"{kind} of {name}: {size:,} of {total:,} elements")
            continue
        for start, size in sorted(run for part in parts for run in part.runs()):
            if start != end:
                faults.append(f"{kind} of {name}: a gap or an overlap at element {end:,}")
                break
            end = start + size
    return faults
