"""Parameters and moments as portable fragments: from DeepSpeed to files, and back.

A fragment is one contiguous range of one parameter's row-major state: the fp32 weight, or a moment
of the base optimizer. Its key in a safetensors file is `name|state|start`. Invariant: the fragments
of all ranks together hold every element exactly once, at any stage and world size, so every other
stage and world size can read its own ranges from them. No collective moves tensor data: each rank
writes what it owns, and reads what it needs.

The state is exact, with one exception: stages 1 to 3 in bf16 keep Muon's momentum in bf16, all
others in fp32, so moving it from fp32 to bf16 rounds it.
"""

import json
import math
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from forescale.engine.layout import Layout, Piece, Unit
from forescale.engine.step import Engine
from forescale.errors import UserError
from forescale.storage import FileEntry, HashingFile

WEIGHT, MOMENTUM = "weight", "momentum_buffer"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_ALIGNMENT, _BLOCK = 64, 1 << 22  # bytes: of a fragment's copy, of a write
_DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL", torch.uint8: "U8"}


@dataclass(frozen=True)
class Fragment:
    """`data` is the 1-D view of `state` of parameter `name` (of `shape`) from `start`."""

    name: str
    shape: tuple[int, ...]
    state: str
    start: int
    data: Tensor

    @property
    def key(self) -> str:
        """Its name in a safetensors file."""
        return f"{self.name}|{self.state}|{self.start}"


def shape_of(param) -> tuple[int, ...]:
    """Return a parameter's full shape, even if ZeRO-3 has partitioned it."""
    return tuple(getattr(param, "ds_shape", param.shape))


def num_parameters(engine: Engine) -> int:
    """Return the number of the model's parameters, frozen ones too."""
    return sum(math.prod(shape_of(param)) for param in engine.names)


def _held(engine: Engine, unit: Unit, piece: Piece, state: str, tensor: Tensor) -> Fragment:
    """Return everything of a piece's `state` that the unit's `tensor` holds."""
    slot = (piece.start, piece.at, piece.size)
    if state == MOMENTUM:
        slot = engine.layout.momentum_slot(unit, piece) or slot
    start, at, size = slot
    data = tensor.detach().view(-1)[at : at + size]
    return Fragment(engine.names[piece.param], shape_of(piece.param), state, start, data)


def _owned(engine: Engine, piece: Piece, held: Fragment) -> Fragment | None:
    """Return the part of a held fragment that this rank writes; None if it writes nothing of it."""
    first, end = piece.start, piece.start + piece.size
    if engine.layout.replicated:
        part = -(-piece.size // engine.world.size)
        first = min(piece.size, engine.world.rank * part)
        end = min(piece.size, first + part)
    if first == end:
        return None
    data = held.data[first - held.start : end - held.start]
    return Fragment(held.name, held.shape, held.state, first, data)


def owned_fragments(engine: Engine) -> Iterator[Fragment]:
    """Yield what this rank writes, as views. Rank 0 writes buffers and frozen parameters; at stage
    3 each rank writes its part of the frozen parameters."""
    base = engine.layout.base
    for unit in engine.layout.units():
        states = {WEIGHT: unit.master}
        states |= {k: v for k, v in base.state.get(unit.master, {}).items() if _is_moment(v)}
        for piece in unit.pieces:
            for state, tensor in states.items():
                if own := _owned(engine, piece, _held(engine, unit, piece, state, tensor)):
                    yield own
    yield from _untrained(engine, writing=True)


def _is_moment(value: Any) -> bool:
    return torch.is_tensor(value) and value.dim() > 0


def _untrained(engine: Engine, writing: bool) -> Iterator[Fragment]:
    """Yield persistent buffers and frozen parameters."""
    main = engine.world.is_main or not writing
    kept = engine.module.state_dict(keep_vars=True)
    for name, buffer in engine.module.named_buffers():
        if main and name in kept:
            yield Fragment(name, tuple(buffer.shape), WEIGHT, 0, buffer.detach().view(-1))
    for param, name in engine.names.items():
        if param.requires_grad:
            continue
        if hasattr(param, "ds_tensor"):
            part = param.ds_tensor.numel()
            start = engine.world.rank * part
            size = max(0, min(part, math.prod(shape_of(param)) - start))
            if size:
                data = param.ds_tensor.detach().view(-1)[:size]
                yield Fragment(name, shape_of(param), WEIGHT, start, data)
        elif main:
            yield Fragment(name, shape_of(param), WEIGHT, 0, param.detach().view(-1))


def scalars(engine: Engine) -> dict[str, Any]:
    """Return what isn't a tensor range: each group's step count, by its name, and the state of an
    fp16 loss scale.

    The count is the base optimizer's own, which may differ from the run's step.
    """
    layout, steps = engine.layout, {}
    for unit in layout.units():
        step = layout.base.state.get(unit.master, {}).get("step")
        if step is not None:
            steps[layout.base.param_groups[unit.group]["name"]] = int(step)
    return {"optimizer_steps": steps, "loss_scaler": _scaler(layout)}


def _scaler_object(layout: Layout) -> Any:
    optimizer = layout.optimizer
    return getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)


_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _scaler(layout: Layout) -> dict[str, Any]:
    """Return the state of the fp16 loss scale that DeepSpeed adapts; {} in every other engine."""
    scaler = _scaler_object(layout)
    found = {k: getattr(scaler, k) for k in _SCALER if hasattr(scaler, k)} if scaler else {}
    return found if _adapts(found) else {}


def _adapts(scaler: dict[str, Any]) -> bool:
    """True for the state of an fp16 loss scale that is adapted. The constant 1.0 of bf16 and fp32,
    which checkpoints may hold too, and a constant scale of the config have no last overflow."""
    return scaler.get("last_overflow_iter") is not None


def _load_scaler(layout: Layout, stored: dict[str, Any]) -> None:
    """Set the loss scale from a checkpoint, from fp16 to fp16 alone: in bf16 a large scale would
    make gradients wrong, in fp16 a scale of 1.0 would make them vanish."""
    own = _scaler(layout)
    for key in own.keys() & stored.keys() if _adapts(stored) else ():
        setattr(_scaler_object(layout), key, stored[key])


class HostCopy:
    """Host memory for one copy of what this rank writes, reused by every save.

    Invariant: what `take` returned doesn't change until the next `take`, whatever the engine does.
    """

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    @torch.no_grad()
    def take(self, fragments: Iterable[Fragment]) -> list[Fragment]:
        """Return the same fragments in host memory, page-locked if they come from a GPU.

        Raises UserError if there isn't enough memory.
        """
        found, starts, end = list(fragments), [], 0
        for f in found:
            starts.append(end)
            end += -(-f.data.nbytes // _ALIGNMENT) * _ALIGNMENT
        on_gpu = any(f.data.is_cuda for f in found)
        memory = self._room(end, on_gpu)
        copies = []
        for f, start in zip(found, starts, strict=True):
            target = memory[start : start + f.data.nbytes].view(f.data.dtype)
            copies.append(replace(f, data=target.copy_(f.data, non_blocking=True)))
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        return copies

    def _room(self, size: int, pinned: bool) -> Tensor:
        if self._memory is None or self._memory.numel() < size:
            self._memory = None  # first, so that the two are never held together
            try:
                self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
            except RuntimeError as e:
                what = f"a copy of the state needs {size:,} bytes of host memory ({e})"
                todo = "set it to false: training then waits for each save, and copies nothing"
                raise UserError("checkpoint.background", what, todo) from None
        return self._memory


def write_fragments(
    path: Path, fragments: list[Fragment], midway: Callable[[], None] = lambda: None
) -> tuple[FileEntry, list[list[Any]]]:
    """Write a safetensors file, one tensor at a time, hashed meanwhile and fsynced.

    midway: called when half of the fragments are written. Return the file's entry for the table of
    files, and its rows [name, state, start, size].
    """
    header: dict[str, Any] = {}
    offset = 0
    for f in fragments:
        end = offset + f.data.nbytes
        header[f.key] = {
            "dtype": _DTYPES[f.data.dtype],
            "shape": [f.data.numel()],
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with HashingFile(path, beside=True) as out:
        out.write(struct.pack("<Q", len(raw)) + raw)
        for n, f in enumerate(fragments):
            if n == len(fragments) // 2:
                midway()
            data = f.data.contiguous().cpu().view(torch.uint8).numpy().data
            for start in range(0, len(data), _BLOCK):
                out.write(data[start : start + _BLOCK])
        entry = out.finish()
    return entry, [[f.name, f.state, f.start, f.data.numel()] for f in fragments]


class FragmentReader:
    """Reads ranges of parameters' states from the files of one checkpoint.

    rows: {file name: [[name, state, start, size], ...]}. Opens only the files that it reads, and
    unpickles nothing. Raises UserError for a file that isn't safetensors or is outside `directory`.
    """

    def __init__(self, directory: Path, rows: dict[str, list[list[Any]]]):
        self.directory = Path(directory)
        self._where: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        for file, entries in rows.items():
            if Path(file).name != file:
                what = f"names a file outside its directory, {file!r}"
                raise UserError(str(self.directory), what, "restore it, or choose another")
            for name, state, start, size in entries:
                self._where.setdefault((name, state), []).append((start, size, file))
        self._open: dict[str, Any] = {}

    def states(self, name: str) -> list[str]:
        """Return the names of a parameter's stored states."""
        return [state for stored, state in self._where if stored == name]

    def read_into(self, name: str, state: str, start: int, out: Tensor) -> None:
        """Fill `out` (1-D) with the range from `start`. Raises KeyError if a part is missing."""
        filled = 0
        for first, size, file in self._where.get((name, state), []):
            a, b = max(start, first), min(start + out.numel(), first + size)
            if a < b:
                part = self._file(file).get_slice(f"{name}|{state}|{first}")
                out[a - start : b - start].copy_(part[a - first : b - first])
                filled += b - a
        if filled != out.numel():
            raise KeyError(f"{name}: {filled:,} of {out.numel():,} elements of its {state}")

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.directory / name
            try:
                self._open[name] = safe_open(str(path), "pt")
            except SafetensorError as e:
                raise UserError(str(path), f"not a safetensors file ({e})", "restore it") from None
        return self._open[name]


@torch.no_grad()
def load_fragments(engine: Engine, reader: FragmentReader, stored: dict[str, Any] | None) -> None:
    """Set this rank's part of weights and buffers; and of moments, if `stored` is given.

    stored: what `scalars` returned. With None the optimizer starts anew, as in a branch that takes
    the weights only.
    """
    layout = engine.layout
    layout.before_load()
    for unit in layout.units():
        tensors = {WEIGHT: unit.master}
        if stored is not None:
            tensors |= _moments(engine, unit, reader, stored["optimizer_steps"])
        for piece in unit.pieces:
            for state, tensor in tensors.items():
                held = _held(engine, unit, piece, state, tensor)
                reader.read_into(held.name, state, held.start, held.data)
    for held in _untrained(engine, writing=False):
        reader.read_into(held.name, held.state, held.start, held.data)
    layout.after_load()
    if stored is not None:
        _load_scaler(layout, stored["loss_scaler"])


def _moments(engine: Engine, unit: Unit, reader: FragmentReader, steps: dict) -> dict[str, Tensor]:
    """Return the unit's moments by state, for the states that the checkpoint holds; those that the
    engine doesn't have yet are created as zeros."""
    layout = engine.layout
    group = layout.base.param_groups[unit.group]
    names = {engine.names[piece.param] for piece in unit.pieces}
    keys = {state for name in names for state in reader.states(name) if state != WEIGHT}
    if not keys:
        layout.base.state.pop(unit.master, None)
        return {}
    state = layout.base.state[unit.master]
    for key in keys:
        if key not in state:
            size = layout.momentum_size(unit) if key == MOMENTUM else unit.master.numel()
            shape = unit.master.shape if size == unit.master.numel() else (size,)
            state[key] = torch.zeros(shape, dtype=torch.float32, device=unit.master.device)
    if group["name"] in steps:
        # As torch's fused AdamW keeps it: an fp32 scalar on the parameter's device.
        state["step"] = torch.tensor(float(steps[group["name"]]), device=unit.master.device)
    return {key: state[key] for key in keys}
