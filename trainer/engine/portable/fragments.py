"""Fragments of parameters' states in files: written, copied to host memory, read back.

A fragment is one contiguous range of one parameter's row-major state: the fp32 weight, or a moment
of the base optimizer; where ranks divide a matrix by its columns, a range of such a part (a strip).
Its key in a safetensors file is `name|state|start`. Invariant: reading runs no code, and what is
read is exactly what was written, however the reader divides the parameter.
"""

import json
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from forescale.engine.portable.strips import Series, Strip
from forescale.ground.errors import UserError
from forescale.ground.storage import FileEntry, HashingFile

WEIGHT = "weight"
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_DTYPES |= {torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL", torch.uint8: "U8"}
_ALIGNMENT, _BLOCK = 64, 1 << 22  # bytes: of a fragment's copy, of a write


@dataclass(frozen=True)
class Fragment:
    """`data` is the 1-D view of `state` of parameter `name` (of `shape`) from `start`; with `cut`,
    of what the strip (run, stride, first) holds of it, from its `start` (strips.py).

    read: returns the data where `data`, on torch's meta device, only says what it is: for a state
    that is written without being held whole."""

    name: str
    shape: tuple[int, ...]
    state: str
    start: int
    data: Tensor
    cut: tuple[int, int, int] | None = None
    read: Callable[[], Tensor] | None = None

    @property
    def key(self) -> str:
        """Its name in a safetensors file."""
        return f"{self.name}|{self.state}|{self.start}"

    @property
    def row(self) -> list[Any]:
        """What a checkpoint's table says of it, beside its file."""
        return [self.name, self.state, self.start, self.data.numel(), *(self.cut or ())]


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
        sources, starts, end = list(fragments), [], 0
        for f in sources:
            starts.append(end)
            end += -(-f.data.nbytes // _ALIGNMENT) * _ALIGNMENT
        on_gpu = any(f.data.is_cuda for f in sources)
        memory = self._room(end, on_gpu)
        copies = []
        for f, start in zip(sources, starts, strict=True):
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
                problem = f"a copy of the state needs {size:,} bytes of host memory ({e})"
                todo = "set it to false: training then waits for each save, and copies nothing"
                raise UserError("checkpoint.background", problem, todo) from None
        return self._memory


def write_fragments(
    path: Path, fragments: list[Fragment], midway: Callable[[], None] = lambda: None
) -> tuple[FileEntry, list[list[Any]]]:
    """Write a safetensors file, one tensor at a time, hashed meanwhile and fsynced.

    midway: called when half of the fragments are written. Return the file's entry for the table of
    files, and a row of each fragment.
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
    # Hashing beside holds what was written a while longer.
    with HashingFile(path, beside=all(f.read is None for f in fragments)) as out:
        out.write(struct.pack("<Q", len(raw)) + raw)
        for n, f in enumerate(fragments):
            if n == len(fragments) // 2:
                midway()
            source = f.data if f.read is None else f.read()
            assert (source.dtype, source.numel()) == (f.data.dtype, f.data.numel()), f.key
            data = source.contiguous().cpu().view(-1).view(torch.uint8).numpy().data
            for start in range(0, len(data), _BLOCK):
                out.write(data[start : start + _BLOCK])
            del source, data  # before the next is read
        entry = out.finish()
    return entry, [f.row for f in fragments]


class FragmentReader:
    """Reads ranges of parameters' states from the files of one checkpoint.

    Opens only the files that it reads, and unpickles nothing. Raises UserError for a file that
    isn't safetensors.
    """

    def __init__(self, directory: Path, fragments: Iterable[Series]):
        self.directory = Path(directory)
        self._where: dict[tuple[str, str], list[Series]] = {}
        for series in fragments:
            self._where.setdefault((series.name, series.state), []).append(series)
        self._open: dict[str, Any] = {}

    def states(self, name: str) -> list[str]:
        return [state for stored, state in self._where if stored == name]

    def dtype(self, name: str, state: str) -> torch.dtype:
        """Return the number format in which a state is stored. Raises UserError if there is
        none."""
        every = self._where.get((name, state))
        if not every:
            raise self._damaged(f"has no {state} of {name}")
        stored = self._slice(*every[0].place(0)).get_dtype()
        return next(kind for kind, label in _DTYPES.items() if label == stored)

    def read_into(self, name: str, state: str, start: int, out: Tensor) -> None:
        """Fill `out` (1-D) with the range from `start`. Raises UserError if a part is
        missing."""
        filled, end = 0, start + out.numel()
        every = self._where.get((name, state), [])
        for strip, key, file in (part for series in every for part in series.between(start, end)):
            runs = [*strip.overlaps(start, end)]
            if not runs:
                continue
            first, last = runs[0][1], runs[-1][1] + runs[-1][2]
            stored = self._slice(key, file)
            if stored.get_shape() != [strip.size]:
                raise self._damaged(f"{key} in {file} has another size than its table says")
            part = stored[first:last]
            for at, place, size in runs:
                out[at - start : at - start + size].copy_(
                    part[place - first : place - first + size]
                )
                filled += size
        if filled != out.numel():
            count = f"{filled:,} of {out.numel():,} elements of the {state}"
            raise self._damaged(f"holds {count} of {name}")

    def fill(self, fragment: Fragment) -> None:
        """Fill the data of a fragment, of any division. Raises UserError as `read_into`."""
        f = fragment
        if f.cut is None:
            self.read_into(f.name, f.state, f.start, f.data)
            return
        strip = Strip(f.start, f.data.numel(), *f.cut)
        rows = max(1, _BLOCK // strip.stride)  # at once: what is read between the runs is dropped
        for low in range(strip.low, strip.high, rows * strip.stride):
            high = min(strip.high, low + rows * strip.stride)
            between = torch.empty(high - low, dtype=f.data.dtype)
            self.read_into(f.name, f.state, low, between)
            for at, place, size in strip.overlaps(low, high):
                f.data[place : place + size].copy_(between[at - low : at - low + size])

    def _slice(self, key: str, file: str) -> Any:
        try:
            return self._file(file).get_slice(key)
        except SafetensorError:
            raise self._damaged(f"{file} has no {key}") from None

    def _damaged(self, problem: str) -> UserError:
        return UserError(str(self.directory), problem, "restore the checkpoint, or choose another")

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self.directory / name
            try:
                self._open[name] = safe_open(str(path), "pt")
            except SafetensorError as e:
                raise UserError(str(path), f"not a safetensors file ({e})", "restore it") from None
        return self._open[name]
