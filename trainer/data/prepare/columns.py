"""Files of finished work: columns of numbers, facts at the end, and a checksum over it all.

    columns         raw little-endian arrays, one after the other; who wrote them knows the offsets
    facts           JSON: where the columns lie, counts, reports
    trailer         length and XXH3-64 of the facts, XXH3-128 of all before it, a mark

Invariant: a file that has its name is whole, or `is_whole` says so: it is written beside it and
renamed. It isn't flushed to the disk: what a power cut takes is found missing or damaged, and made
again. Equal work gives equal bytes, so that whoever repeats it may replace the file.
"""

import json
import os
import struct
from bisect import bisect_left
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from forescale.errors import UserError
from forescale.storage import naming

_TRAILER = struct.Struct("<QQ16s8s")
_MARK = b"unit 1\r\n"
_BLOCK = 1 << 22
_WHOLE = 1024  # entries of a column that are read at once rather than searched on disk


class UnitWriter:
    """A unit's file, in the making; it has its name after `finish`, and leaves nothing without."""

    def __init__(self, path: Path):
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed in finish or __exit__
        self._sum = xxhash.xxh3_128()
        self._size = 0

    def add(self, data: np.ndarray | bytes | memoryview) -> int:
        """Append a contiguous array; returns the offset of its first byte."""
        offset = self._size
        if isinstance(data, np.ndarray):
            data = data.reshape(-1).view(np.uint8).data
        view = memoryview(data)
        self._sum.update(view)
        with naming(self.path):
            self._file.write(view)
        self._size += view.nbytes
        return offset

    def finish(self, facts: dict[str, Any]) -> None:
        raw = json.dumps(facts).encode()
        self.add(raw)
        self.add(struct.pack("<QQ", len(raw), xxhash.xxh3_64_intdigest(raw)))
        with naming(self.path):
            self._file.write(self._sum.digest() + _MARK)
            self._file.close()
        os.replace(self._temporary, self.path)

    def __enter__(self) -> "UnitWriter":
        return self

    def __exit__(self, *exc) -> None:
        try:
            self._file.close()
        finally:
            self._temporary.unlink(missing_ok=True)


class UnitFile:
    """A finished file, open for reading. What is found damaged is a UserError."""

    def __init__(self, path: Path):
        self.path = path
        self._fd = os.open(path, os.O_RDONLY)

    @cached_property
    def facts(self) -> dict[str, Any]:
        return json.loads(self._end[0])

    @cached_property
    def _end(self) -> tuple[bytes, int, bytes]:
        """The facts, the file's size, and the checksum over all of it."""
        size = os.fstat(self._fd).st_size
        if size < _TRAILER.size:
            raise self.damaged()
        trailer = self._read(size - _TRAILER.size, _TRAILER.size)
        length, digest, whole, mark = _TRAILER.unpack(trailer)
        if mark != _MARK or length > size - _TRAILER.size:
            raise self.damaged()
        raw = bytes(self._read(size - _TRAILER.size - length, length))
        if xxhash.xxh3_64_intdigest(raw) != digest:
            raise self.damaged()
        return raw, size, whole

    def __enter__(self) -> "UnitFile":
        return self

    def __exit__(self, *exc) -> None:
        os.close(self._fd)

    def damaged(self) -> UserError:
        return UserError(str(self.path), "is damaged", "give the same command again: it mends that")

    def column(self, offset: int, count: int, dtype: Any, first: int = 0) -> np.ndarray:
        """Entries [first, first + count) of the column that begins at byte `offset`."""
        dtype = np.dtype(dtype)
        raw = self._read(offset + first * dtype.itemsize, count * dtype.itemsize)
        return np.frombuffer(raw, dtype)

    def search(self, offset: int, count: int, key: int) -> int:
        """The first entry of an ascending uint64 column that is at least `key`."""
        if count <= _WHOLE:
            column = self.column(offset, count, "<u8")
            return count if key >> 64 else int(np.searchsorted(column, np.uint64(key)))
        return bisect_left(_OnDisk(self._fd, offset, count), key)

    def is_whole(self, tick: Callable[[int], None] = lambda n: None) -> bool:
        """Compare all of it with its checksum. tick: bytes read."""
        _, size, whole = self._end
        found, at, end = xxhash.xxh3_128(), 0, size - len(whole) - len(_MARK)
        while at < end:
            block = self._read(at, min(_BLOCK, end - at))
            found.update(block)
            at += len(block)
            tick(len(block))
        return found.digest() == whole

    def _read(self, offset: int, size: int) -> bytearray:
        data = bytearray(size)
        left = memoryview(data)
        with naming(self.path):
            while left.nbytes:
                if not (count := os.preadv(self._fd, [left], offset)):
                    raise self.damaged()
                left, offset = left[count:], offset + count
        return data


class _OnDisk:
    """A column of uint64 as bisect wants it: a search touches some 20 entries, not all."""

    def __init__(self, fd: int, offset: int, count: int):
        self._fd, self._offset, self._count = fd, offset, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> int:
        return int.from_bytes(os.pread(self._fd, 8, self._offset + 8 * index), "little")


def finished(path: Path) -> dict[str, Any] | None:
    """The facts of a file that is there and whole, to the last byte; None where it must be made."""
    try:
        with UnitFile(path) as file:
            return file.facts if file.is_whole() else None
    except (FileNotFoundError, UserError):
        return None


def facts(path: Path) -> dict[str, Any]:
    """The facts alone. Raises UserError where they are damaged."""
    with UnitFile(path) as file:
        return file.facts
