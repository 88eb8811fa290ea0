"""Input files opened for reading, their compression taken off, every damage named.

Invariant: a stream gives all that its file holds or raises UserError naming the file. A compressed
file that is cut off never looks like a shorter one: the decoder must reach the end that the format
marks. (Where a file of several members or frames is cut exactly between two, there is no such
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
from forescale.errors import UserError

COMPRESSED = (".gz", ".tgz", ".zst")
_BLOCK = 1 << 20
_PACKED = 1 << 17  # what is given to a decoder at once: it may become a thousand times as much


def bare(name: str) -> str:
    """The name in lower case, without a suffix that says how it is compressed."""
    name = name.lower()
    return next((name[: -len(s)] for s in COMPRESSED if name.endswith(s)), name)


def shown(where: str) -> str:
    """A path or an address as a message may show it."""
    return without_secrets(where) if is_url(where) else where


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Turn what goes wrong while a file is opened or read into a sentence that names it."""
    try:
        yield
    except (EOFError, zlib.error, zstandard.ZstdError, tarfile.TarError) as e:
        what = f"cut off or damaged ({e})"
        raise UserError(shown(where), what, "restore the file from its source") from e
    except OSError as e:
        name = os.fsdecode(e.filename) if isinstance(e.filename, str | bytes) else where
        what, todo = f"can't be read ({e.strerror or e})", "check the storage"
        if isinstance(e, FileNotFoundError):
            what, todo = "no such file", "check the path, and where it links to"
        elif isinstance(e, PermissionError):
            what, todo = "may not be read", "give yourself permission to read it"
        raise UserError(shown(name), what, todo) from e


def open_raw(where: str) -> BinaryIO:
    """The stored bytes of a file, local or at a server; seekable. Raises UserError."""
    if is_url(where):
        from forescale.data.remote.listing import open_input

        return open_input(where)
    with reading(where):
        return open(where, "rb", buffering=0)


@contextmanager
def open_stream(name: str, where: str, start: int = 0) -> Iterator[io.BufferedReader]:
    """A file's text, uncompressed where its name says so; a plain file from offset `start`."""
    with open_raw(where) as raw:
        if start:
            raw.seek(start)
        yield io.BufferedReader(Blocks(where, unpacked(name, raw)), _BLOCK)


def unpacked(name: str, f: BinaryIO) -> Iterator[bytes]:
    """The blocks of an open file without the compression that its name's suffix says."""
    name = name.lower()
    if name.endswith((".gz", ".tgz")):
        return _frames(f, lambda: zlib.decompressobj(wbits=31), padding=b"\0")
    if name.endswith(".zst"):
        return _frames(
            f, lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
        )
    return iter(lambda: f.read(_BLOCK), b"")


def _frames(f: BinaryIO, new: Callable[[], Any], padding: bytes = b"") -> Iterator[bytes]:
    # The libraries' own stream readers end without a word where a .zst is cut off.
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
    """Blocks of bytes, one after the other, as a file; faults become sentences here."""

    def __init__(self, where: str, blocks: Iterator[bytes]):
        self._where, self._blocks, self._rest = where, blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, into) -> int:
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
        with reading(self._where):
            whole = b"".join([self._rest, *self._blocks])
        self._rest = memoryview(b"")
        return whole
