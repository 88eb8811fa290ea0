"""Open input files, decompress them, and report any damage.

Invariant: a stream gives everything that its file holds, or raises UserError naming the file. A
truncated compressed file is never taken for a shorter one: the decoder must reach the end marked by
the format. (If a file of several members or frames is cut exactly between two, there is no such
mark.)
"""

import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO

import zstandard

from forescale.data.remote.transfer import is_url, without_secrets
from forescale.errors import Transient, UserError, storage_error

COMPRESSED = (".gz", ".tgz", ".zst")
_BLOCK = 1 << 20
_PACKED = 1 << 17  # bytes given to a decoder at once; their output may be a thousand times larger


def bare(name: str) -> str:
    """Return the name in lower case, without a suffix for compression."""
    name = name.lower()
    return next((name[: -len(s)] for s in COMPRESSED if name.endswith(s)), name)


def shown(where: str) -> str:
    """Return a path or an address without secrets, for messages."""
    return without_secrets(where) if is_url(where) else where


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Convert errors of opening and reading a file to a UserError that names it."""
    try:
        yield
    except (EOFError, zlib.error, zstandard.ZstdError, tarfile.TarError) as e:
        what = f"truncated or damaged ({e})"
        raise UserError(shown(where), what, "restore the file from its source") from e
    except OSError as e:
        e.filename = e.filename or where
        if isinstance(error := storage_error(e), Transient):
            raise Transient(shown(error.where), error.what, error.todo) from e
        name = os.fsdecode(e.filename) if isinstance(e.filename, str | bytes) else where
        what, todo = f"can't be read ({e.strerror or e})", "check the storage"
        if isinstance(e, FileNotFoundError):
            what, todo = "doesn't exist", "check the path, and the target if it is a link"
        elif isinstance(e, PermissionError):
            what, todo = "permission denied", "change its permissions"
        raise UserError(shown(name), what, todo) from e


def open_raw(where: str) -> BinaryIO:
    """Return the stored bytes of a local or remote file; seekable. Raises UserError."""
    if is_url(where):
        from forescale.data.remote.listing import open_input

        return open_input(where)
    with reading(where):
        return open(where, "rb", buffering=0)


@contextmanager
def open_stream(name: str, where: str, start: int = 0) -> Iterator[io.BufferedReader]:
    """Yield a file's text, decompressed according to its name; a plain file from offset `start`."""
    with open_raw(where) as raw:
        if start:
            raw.seek(start)
        yield io.BufferedReader(Blocks(where, unpacked(name, raw)), _BLOCK)


def unpacked(name: str, f: BinaryIO) -> Iterator[bytes]:
    """Yield the blocks of an open file, decompressed according to its name."""
    name = name.lower()
    if name.endswith((".gz", ".tgz")):
        return _frames(f, lambda: zlib.decompressobj(wbits=31), padding=b"\0")
    if name.endswith(".zst"):
        return _frames(
            f, lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        )
    return iter(lambda: f.read(_BLOCK), b"")


def _frames(f: BinaryIO, new: Callable[[], Any], padding: bytes = b"") -> Iterator[bytes]:
    # The libraries' own stream readers end without an error if a .zst is truncated.
    frame, frames = None, 0
    while block := f.read(_PACKED):
        while block:
            if frame is None:
                if frames and padding and not (block := block.lstrip(padding)):
                    break
                frame = new()
            yield frame.decompress(block)
            block = frame.unused_data if frame.eof else b""
            frames += frame.eof
            frame = None if frame.eof else frame
    if frame is not None or not frames:
        raise EOFError("it ends too early" if frame else "it is empty")


class Blocks(io.RawIOBase):
    """Consecutive blocks of bytes as a file; errors become UserErrors."""

    def __init__(self, where: str, blocks: Iterator[bytes]):
        """where: for messages."""
        self._where, self._blocks, self._rest = where, blocks, memoryview(b"")

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, into) -> int:
        """Read up to len(into) bytes; return how many."""
        with reading(self._where):
            while not self._rest:
                if (block := next(self._blocks, None)) is None:
                    return 0
                self._rest = memoryview(block)
        taken = min(len(into), len(self._rest))
        into[:taken] = self._rest[:taken]
        self._rest = self._rest[taken:]
        return taken

    def readall(self) -> bytes:
        """Return all remaining bytes."""
        with reading(self._where):
            whole = b"".join([self._rest, *self._blocks])
        self._rest = memoryview(b"")
        return whole
