"""Open input files: their kind by their name, their bytes decompressed, any damage reported.

Invariant: a stream gives everything that its file holds, or raises UserError naming the file. A
truncated compressed file is never taken for a shorter one: the decoder must reach the end marked by
the format. (If a file of several members or frames is cut exactly between two, there is no such
mark.)

Unpacked data passes through in pieces of at most some 30 MB, and of one document no more is in
memory than its policy needs. Without a limit a document may be large, but not a hundred times as
large as its file: that is not text but an attempt to fill the memory. What a file unpacks to has a
bound too: a few kilobytes may hold years of reading.
"""

import codecs
import errno
import io
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import zstandard

from forescale.data.text.documents import Policy
from forescale.ground.errors import Transient, UserError, masked, storage_error
from forescale.ground.foreign import open_regular
from forescale.remote.transfer import is_url

HUB = "hf://"
_TEXT = (
    ".txt .text .md .markdown .rst .tex .org .adoc .asciidoc .textile "
    ".py .pyi .c .h .cc .cpp .cxx .hh .hpp .cu .cs .go .hs .java .jl .js .jsx .kt .lua .ml .php "
    ".pl .pm .r .rb .rs .scala .sh .sql .swift .ts .tsx"
)
PLAIN = tuple(_TEXT.split())
HTML = (".html", ".htm", ".xhtml")
KNOWN = (
    ".txt .md .rst .tex .html .jsonl and source code (also with .gz or .zst), .parquet, .tar, or "
    "text without a suffix; suffixes=[.xyz] adds others"
)
COMPRESSED = (".gz", ".tgz", ".zst")
_BLOCK = 1 << 20
_SNIFFED = 1 << 16  # bytes from which `is_text` judges
_PACKED = 1 << 17  # bytes of a compressed file that are read at once
# Bytes given to a decoder at once. Their output may be a thousand times larger with gzip, and
# 33,000 times with zstd (a block of 128 kB in 4 bytes).
_GZIP, _ZSTD = 1 << 14, 1 << 10
_WINDOW = 1 << 27  # bytes that zstd may look back, unless the file is larger, as zstd's own tool
_LARGE, _LARGE_LINE = 256 << 20, 64 << 20  # bytes that a document, a line may have in any case
_RATIO = 100  # a longer one has at most so many times the bytes that its file takes on the disk
_UNPACKED = 1 << 30  # bytes that a file may unpack to in any case; beyond, _RATIO times its size


def bare(name: str) -> str:
    """Return the name in lower case, without a suffix for compression."""
    name = name.lower()
    return next((name[: -len(s)] for s in COMPRESSED if name.endswith(s)), name)


def kind_of(name: str, suffixes: Sequence[str] = ()) -> str | None:
    """Return how a file is read, by its suffix: plain, html, lines, parquet, tar; bare if it has
    none, so that its content decides; None if the suffix isn't one of text.

    suffixes: further ones of plain text.
    """
    stem = bare(name)
    if stem.endswith((*PLAIN, *suffixes)):
        return "plain"
    if stem.endswith(HTML):
        return "html"
    # C4 and Dolma call compressed lines .json.gz; a plain .json is mostly one object or an array.
    if stem.endswith(".jsonl") or (len(stem) < len(name) and stem.endswith(".json")):
        return "lines"
    if stem.endswith(".tar") or name.lower().endswith(".tgz"):
        return "tar"
    if name.lower().endswith(".parquet"):
        return "parquet"
    return None if PurePosixPath(stem).suffix else "bare"


def clean(name: str) -> str:
    """Return a file name as valid UTF-8: otherwise texts that contain it couldn't be written."""
    return os.fsencode(name).decode("utf-8", "replace")


def printable(where: str) -> str:
    """Return a path or an address without secrets, for messages."""
    return masked(where) if is_url(where) else where


@contextmanager
def reading(where: str) -> Iterator[None]:
    """Convert errors of opening and reading a file to a UserError that names it."""
    try:
        yield
    except (EOFError, zlib.error, zstandard.ZstdError, tarfile.TarError) as e:
        if "too much memory" in str(e):
            problem = "unpacking it needs more memory than the file is large"
            todo = "decompress it first: zstd -d --long=31"
            raise UserError(printable(where), problem, todo) from e
        problem = f"truncated or damaged ({e})"
        raise UserError(printable(where), problem, "restore the file from its source") from e
    except OSError as e:
        e.filename = e.filename or where
        if isinstance(error := storage_error(e), Transient):
            raise Transient(printable(error.where), error.problem, error.todo) from e
        name = os.fsdecode(e.filename) if isinstance(e.filename, str | bytes) else where
        problem, todo = f"can't be read ({e.strerror or e})", "check the storage"
        if isinstance(e, FileNotFoundError):
            problem, todo = "doesn't exist", "check the path, and the target if it is a link"
        elif isinstance(e, PermissionError):
            problem, todo = "permission denied", "change its permissions"
        raise UserError(printable(name), problem, todo) from e


def open_raw(where: str) -> BinaryIO:
    """Return the stored bytes of a local or remote file; seekable. Raises UserError."""
    if is_url(where):
        from forescale.remote.listing import open_input

        return open_input(where)
    with reading(where):
        return open_regular(where)


@contextmanager
def open_stream(name: str, where: str, start: int = 0) -> Iterator[io.BufferedReader]:
    """Yield a file's text, decompressed according to its name; a plain file from offset `start`."""
    with open_raw(where) as raw:
        if start:
            raw.seek(start)
        yield io.BufferedReader(Blocks(where, unpacked(name, raw, Total(where))), _BLOCK)


class Total:
    """The bytes that a file, or all members of one together, unpack to. where: on the disk."""

    def __init__(self, where: str):
        self.where, self._bytes, self._most = where, 0, _UNPACKED

    def add(self, size: int) -> None:
        """Count `size` bytes. Raises UserError for more than text can have."""
        self._bytes += size
        if self._bytes > self._most:
            self._most = max(self._most, _RATIO * stored_bytes(self.where))
            if self._bytes > self._most:
                problem = f"unpacks to more than {_RATIO} times its bytes"
                todo = "remove it, or decompress it yourself if it is text"
                raise UserError(printable(self.where), problem, todo)


def unpacked(name: str, f: BinaryIO, total: Total) -> Iterator[bytes]:
    """Yield the blocks of an open file, decompressed according to its name. total: of the file on
    the disk that it is, or that it is a member of."""
    for block in _decoded(name.lower(), f, total.where):
        total.add(len(block))
        yield block


def _decoded(name: str, f: BinaryIO, where: str) -> Iterator[bytes]:
    if name.endswith((".gz", ".tgz")):
        return _frames(f, lambda start: zlib.decompressobj(wbits=31), _GZIP, padding=b"\0")
    if name.endswith(".zst"):

        def zstd(start: bytes) -> Any:
            """Return a decoder of the frame that begins with `start`."""
            window = _WINDOW
            try:
                needed = zstandard.get_frame_parameters(start).window_size
            except zstandard.ZstdError:  # its header goes on in the next piece
                needed = window + 1
            if needed > window:
                window = min(max(window, stored_bytes(where)), 1 << 31)
            return zstandard.ZstdDecompressor(max_window_size=window).decompressobj()

        return _frames(f, zstd, _ZSTD)
    return iter(lambda: f.read(_BLOCK), b"")


def _frames(
    f: BinaryIO, new: Callable[[bytes], Any], at_once: int, padding: bytes = b""
) -> Iterator[bytes]:
    # The libraries' own stream readers end without an error if a .zst is truncated.
    frame, frames = None, 0
    while packed := f.read(_PACKED):
        for start in range(0, len(packed), at_once):
            block = packed[start : start + at_once]
            while block:
                if frame is None:
                    if frames and padding and not (block := block.lstrip(padding)):
                        break
                    frame = new(block)
                yield frame.decompress(block)
                block = frame.unused_data if frame.eof else b""
                frames += frame.eof
                frame = None if frame.eof else frame
    if frame is not None or not frames:
        raise EOFError("it ends too early" if frame else "it is empty")


def stored_bytes(where: str) -> int:
    """Return the bytes that a file takes where it is stored: without the holes of a sparse one."""
    with open_raw(where) as f, reading(where):
        size = f.seek(0, io.SEEK_END)
        if is_url(where):
            return size
        held = at = 0
        while at < size:
            try:
                at = os.lseek(f.fileno(), at, os.SEEK_DATA)
            except OSError as e:
                if e.errno != errno.ENXIO:  # a file system that doesn't know its holes
                    return size
                break  # only a hole is left
            end = os.lseek(f.fileno(), at, os.SEEK_HOLE)
            held, at = held + end - at, end
        return held


class Budget:
    """The limit of one document, or of one line, in memory.

    most: bytes by its policy, None without a limit; large: bytes that are always allowed, unless
    `most` is less.
    """

    def __init__(self, name: str, where: str, most: int | None, large: int = _LARGE):
        """name, where: of the document, and of the file that holds it."""
        self._name, self._where, self._most, self._large = name, where, most, large

    @classmethod
    def of_line(cls, name: str, where: str, policy: Policy) -> "Budget":
        """Return the budget of a line of JSON; its text may be a small part of it."""
        limit = policy.max_document_bytes
        most = None if limit is None else (16 << 20) + 8 * limit
        return cls(name, where, most, _LARGE_LINE)

    def allows(self, size: int) -> bool:
        """Return True if `size` bytes may be held. Raises UserError for more than text can have."""
        if self._most is not None and size > self._most:
            return False
        if size > self._large:
            if size > _RATIO * self._stored:
                stored = f"{_RATIO} times the {self._stored:,} bytes of its file"
                problem = f"unpacks to more than {stored}"
                todo = "remove it; or set max_document_bytes and long (cut or skip)"
                raise UserError(self._name, problem, todo)
            self._large = _RATIO * self._stored
        return True

    @cached_property
    def _stored(self) -> int:
        return stored_bytes(self._where)


def is_text(stream: io.BufferedReader) -> bool:
    """Return True if a stream begins with valid UTF-8 without a zero byte. Consumes nothing."""
    head = stream.peek(_SNIFFED)[:_SNIFFED]
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # its last character may be cut
    except UnicodeDecodeError:
        return False
    return b"\0" not in head


class Blocks(io.RawIOBase):
    """Consecutive blocks of bytes as a file; errors become UserErrors."""

    def __init__(self, where: str, blocks: Iterator[bytes]):
        self._where, self._blocks, self._rest = where, blocks, memoryview(b"")

    def readable(self) -> bool:
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
        with reading(self._where):
            whole = b"".join([self._rest, *self._blocks])
        self._rest = memoryview(b"")
        return whole
