"""The files of a dataset: in a local directory, or at a server through a cache.

Invariant: `read_at` fills the whole buffer with the bytes at that position of the file, or raises a
UserError that names the file; it never returns fewer. All reads of a dataset go through here, so
that counting here counts everything.
"""

import hashlib
import os
import tempfile
import uuid
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

from forescale.ground.errors import Transient, UserError, masked, retried, storage_error
from forescale.ground.foreign import LARGE, open_fd
from forescale.remote.buckets import FsspecOrigin
from forescale.remote.cache import BLOCK, BlockCache, RemoteBlocks
from forescale.remote.transfer import (
    PATIENCE,
    Missing,
    Origin,
    Patience,
    WrongFile,
    exists,
    is_url,
    persist,
    receive,
)
from forescale.remote.web import HttpOrigin

CACHE_BYTES = 8 << 30
_RESTORE = "restore it from a copy or build the dataset again"
T = TypeVar("T")


class File:
    """One file, open for reading at any position; safe from several threads. size: in bytes."""

    size: int

    def read_at(self, offset: int, into: memoryview) -> None:
        """Fill `into` (bytes, one dimension) from `offset`. Raises UserError naming the file."""
        raise NotImplementedError

    def forget(self, offset: int, size: int) -> bool:
        """Drop cached copies of these bytes; return False if there is no cache (a local file)."""
        return False

    def will_read(self, ranges: list[tuple[int, int]]) -> None:
        """Announce that these (offset, size) come next, in this order; free for local files."""

    def close(self) -> None:
        """Close the file."""


class LocalFile(File):
    """A File of the local file system. Where reading fails for a moment, the file is opened again
    and read again, several times: a handle that a file server has forgotten stays useless."""

    def __init__(self, path: Path, size: int | None = None):
        """Raises UserError if the file can't be opened or has another size."""
        self._path = path
        self._fd = _persist(path, lambda: open_fd(path))
        self.size = _persist(path, lambda: os.fstat(self._fd).st_size)
        if size is not None and size != self.size:
            self.close()
            raise _other_size(path, self.size, size)

    def read_at(self, offset: int, into: memoryview) -> None:
        def afresh() -> None:
            fd = open_fd(self._path)
            try:
                if (size := os.fstat(fd).st_size) != self.size:
                    raise _other_size(self._path, size, self.size)
                os.dup2(fd, self._fd, inheritable=False)  # at once, also for reads of other threads
            finally:
                os.close(fd)
            self._fill(offset, into)

        try:
            self._fill(offset, into)
        except OSError as e:
            if not isinstance(error := _unreadable(self._path, e), Transient):
                raise error from e
            _persist(self._path, afresh)

    def _fill(self, offset: int, into: memoryview) -> None:
        # Not mmap: a storage error would kill the process (SIGBUS) without a message.
        count = os.preadv(self._fd, (into,), offset)
        while count < len(into):  # a signal, a read of 2 GiB, or the end of the file
            step = os.preadv(self._fd, (into[count:],), offset + count)
            if not step:
                size = os.fstat(self._fd).st_size
                raise _ends(str(self._path), size, offset + len(into) - size)
            count += step

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


class RemoteFile(File):
    """A File at a server, read through the node's cache. key: name of the file in the cache."""

    def __init__(self, origin: Origin, key: str, blocks: RemoteBlocks):
        self._origin, self._key, self._blocks = origin, key, blocks
        self.size = origin.size or 0

    def read_at(self, offset: int, into: memoryview) -> None:
        end = offset + len(into)
        if end > self.size:
            raise _ends(self._origin.where, self.size, end - self.size)
        at = 0
        while at < len(into):
            number, skip = divmod(offset + at, BLOCK)
            part = into[at : at + BLOCK - skip]
            self._blocks.read(self._origin, self._key, number, skip, part)
            at += len(part)

    def forget(self, offset: int, size: int) -> bool:
        self._blocks.forget(self._key, _numbers(offset, size))
        return True

    def will_read(self, ranges: list[tuple[int, int]]) -> None:
        numbers = (number for offset, size in ranges for number in _numbers(offset, size))
        self._blocks.will_read(self._origin, self._key, numbers)


class Store:
    """A directory of files, local or at a server. A name that is an absolute path or an address is
    used as it is.

    path: a directory, or an address of any protocol, whose query (a signature) is used for every
    file; cache: a directory on a local disk of the node, shared by its processes, default
    forescale-UID in $TMPDIR or /tmp; cache_bytes: the most that they store there together. Nothing
    is read yet. Raises UserError for anything that is neither a path nor an address (such as a
    command), and for a cache that can't be used.
    """

    def __init__(
        self,
        path: str | Path,
        cache: Path | None = None,
        cache_bytes: int = CACHE_BYTES,
        patience: Patience = PATIENCE,
    ):
        self._path, self._patience, self._is_remote = str(path), patience, is_url(path)
        self.where = masked(self._path) if self._is_remote else str(Path(path))  # for messages
        self._cache = cache or Path(tempfile.gettempdir()) / f"forescale-{os.getuid()}"
        self._cache_bytes = cache_bytes
        self._origins: dict[tuple[str, str], Origin] = {}
        if self._is_remote:
            self._blocks  # noqa: B018 - opens the cache

    @cached_property
    def _blocks(self) -> RemoteBlocks:
        return RemoteBlocks(BlockCache(self._cache, self._cache_bytes), self._patience)

    def read(self, name: str, size: int | None = None, version: str = "") -> bytes:
        """Return the whole of a small file; it is cached only if size and version are given."""
        place = self._place(name)
        if isinstance(place, Path):
            file = LocalFile(place)
            if file.size > LARGE:
                raise UserError(str(place), f"has more than {LARGE:,} bytes", _RESTORE)
            data = bytearray(file.size)
            file.read_at(0, memoryview(data))
            return bytes(data)
        if size is not None and version:  # useful and safe to cache
            data = bytearray(size)
            self.open(name, size, version).read_at(0, memoryview(data))
            return bytes(data)
        origin = origin_of(place, size)
        return b"".join(receive(origin, 0, size, self._patience, whole=True))

    def open(self, name: str, size: int | None = None, version: str = "") -> File:
        """Open a file. size: checked, if known; version: distinguishes contents (a sha256)."""
        place = self._place(name)
        if isinstance(place, Path):
            return LocalFile(place, size)
        origin = self._origins.setdefault((place, version), origin_of(place, size))
        origin.learn(size, "")
        if origin.size is None or not (version or origin.tag):
            persist(origin.where, self._patience, partial(origin.ask, self._patience.timeout))
        if origin.size is None:
            problem = "the server doesn't report the file size"
            todo = "serve it with a Content-Length, or copy it to a local disk"
            raise UserError(origin.where, problem, todo)
        # Without any version the next process couldn't know whether the file is still the same.
        version = version or origin.tag or uuid.uuid4().hex
        key = hashlib.sha256(f"{place} {origin.size} {version}".encode()).hexdigest()[:32]
        return RemoteFile(origin, key, self._blocks)

    def exists(self, name: str) -> bool:
        """Return whether the file exists."""
        place = self._place(name)
        if isinstance(place, Path):
            return _persist(place, place.is_file)
        return exists(origin_of(place), self._patience)

    def _place(self, name: str) -> Path | str:
        if is_url(name):
            return name
        if not self._is_remote or name.startswith("/"):
            return Path(self._path, name)
        head, mark, query = self._path.partition("?")
        return f"{head.rstrip('/')}/{name}{mark}{query}"


def origin_of(url: str, size: int | None = None) -> Origin:
    """Return the file at an address. Nothing is requested yet."""
    kind = HttpOrigin if url.startswith(("http://", "https://")) else FsspecOrigin
    return kind(url, size)


def _numbers(offset: int, size: int) -> range:
    return range(offset // BLOCK, -(-(offset + size) // BLOCK))


def _persist(path: Path, work: Callable[[], T]) -> T:
    """Return the result of `work`, tried again if storage fails for a moment. Raises UserError."""

    def attempt() -> T:
        try:
            return work()
        except OSError as e:
            raise _unreadable(path, e) from e

    def failed(error: Transient, pause: float) -> None:
        text = f"{error.where}: {error.problem}; next try in {pause:g} s"
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    return retried(attempt, failed)


def _unreadable(path: Path, e: OSError) -> UserError:
    if isinstance(e, FileNotFoundError):
        with suppress(OSError), os.scandir(path.parent) as entries:  # it may be gone itself
            if any(entries):
                return Missing(str(path), "is missing", "restore it from a copy, or check the path")
        todo = "check that its file system is mounted, then run the same command again"
        return Transient(str(path), "its folder is gone or empty", todo)
    e.filename = e.filename or str(path)
    if isinstance(error := storage_error(e), Transient):
        return error
    problem = f"can't be read ({e.strerror})"
    return UserError(str(path), problem, "check the storage and its permissions")


def _other_size(path: Path, size: int, expected: int) -> WrongFile:
    return WrongFile(str(path), f"has {size:,} bytes, expected {expected:,}", _RESTORE)


def _ends(where: str, size: int, lacks: int) -> WrongFile:
    return WrongFile(where, f"ends after {size:,} bytes, {lacks:,} too early", _RESTORE)
