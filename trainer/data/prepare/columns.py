"""Files of finished work: columns of numbers, facts at the end, and a checksum over everything.

    columns         raw little-endian arrays, one after the other; the writer knows their offsets
    facts           JSON: offsets of the columns, counts, reports
    trailer         length and XXH3-64 of the facts, XXH3-128 of everything before it, a mark

Invariant: a file with its final name is complete, or `is_intact` returns False: it gets its name by
a rename. It isn't flushed to disk: after a power failure it is missing or damaged, and built again.
Equal work gives equal bytes, so repeated work may replace the file.
"""

import json
import os
import secrets
import struct
from bisect import bisect_left
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from forescale.ground.errors import UserError
from forescale.ground.storage import FileEntry, hash_file, naming

_TRAILER = struct.Struct("<QQ16s8s")
_MARK = b"unit 1\r\n"
_BLOCK = 1 << 22
_WHOLE = 1024  # columns up to this number of entries are read at once, not searched on disk


class UnitWriter:
    """Writes a unit's file; it gets its name in `finish`, and without that nothing is left."""

    def __init__(self, path: Path):
        """path: the final name."""
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        self._file = open(self._temporary, "wb")  # noqa: SIM115 - closed in finish or __exit__
        self._sum = xxhash.xxh3_128()
        self._size = 0

    def add(self, data: np.ndarray | bytes | memoryview) -> int:
        """Append a contiguous array; return the offset of its first byte."""
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
        """Append the facts and the trailer, and rename the file."""
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
    """A finished file, open for reading. Raises UserError where it proves damaged."""

    def __init__(self, path: Path):
        self.path = path
        self._fd = os.open(path, os.O_RDONLY)

    @cached_property
    def facts(self) -> dict[str, Any]:
        return json.loads(self._end[0])

    @cached_property
    def _end(self) -> tuple[bytes, int, bytes]:
        """The facts as bytes, the file's size, and the checksum over all of it."""
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
        todo = "run the same command again; it makes the file again"
        return UserError(str(self.path), "is damaged", todo)

    def column(self, offset: int, count: int, dtype: Any, first: int = 0) -> np.ndarray:
        """Return entries [first, first + count) of the column that begins at byte `offset`."""
        dtype = np.dtype(dtype)
        raw = self._read(offset + first * dtype.itemsize, count * dtype.itemsize)
        return np.frombuffer(raw, dtype)

    def search(self, offset: int, count: int, key: int) -> int:
        """Return the index of the first entry, at least `key`, of an ascending uint64 column."""
        if count <= _WHOLE:
            column = self.column(offset, count, "<u8")
            return count if key >> 64 else int(np.searchsorted(column, np.uint64(key)))

        def entry(index: int) -> int:  # about 20 are read, not all
            return int.from_bytes(os.pread(self._fd, 8, offset + 8 * index), "little")

        return bisect_left(range(count), key, key=entry)

    def is_intact(self) -> bool:
        _, size, whole = self._end
        digest, at, end = xxhash.xxh3_128(), 0, size - len(whole) - len(_MARK)
        while at < end:
            block = self._read(at, min(_BLOCK, end - at))
            digest.update(block)
            at += len(block)
        return digest.digest() == whole

    def _read(self, offset: int, size: int) -> bytearray:
        data = bytearray(size)
        left = memoryview(data)
        with naming(self.path):
            while left.nbytes:
                if not (count := os.preadv(self._fd, [left], offset)):
                    raise self.damaged()
                left, offset = left[count:], offset + count
        return data


def finished(path: Path) -> dict[str, Any] | None:
    """Return the facts of a file that exists and is intact; None if it has to be built."""
    try:
        with UnitFile(path) as file:
            return file.facts if file.is_intact() else None
    except (FileNotFoundError, UserError):
        return None


def is_whole(path: Path, stage: Path) -> bool:
    """Return whether the facts in a file of rows/ are there, and the files in `stage` that they
    list are whole."""
    with suppress(FileNotFoundError):
        if done := finished(path):
            files = done["files"].items()
            return all(hash_file(stage / name) == FileEntry(**entry) for name, entry in files)
    return False


def facts(path: Path) -> dict[str, Any]:
    """Return the facts without checking the columns. Raises UserError if the facts are damaged."""
    with UnitFile(path) as file:
        return file.facts
