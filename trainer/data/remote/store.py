"""Where the bytes of a dataset lie: a local directory, or a server read through a cache.

Invariant: `read_at` fills the whole buffer with the bytes that the file has there, or raises a
UserError that names the file; it never returns less. All that a dataset reads passes through here,
so that counting here counts everything.
"""

import hashlib
import os
import tempfile
import uuid
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Protocol

from forescale.data.remote.buckets import FsspecOrigin
from forescale.data.remote.cache import BlockCache
from forescale.data.remote.prefetch import BLOCK, RemoteBlocks
from forescale.data.remote.transfer import (
    PATIENCE,
    Missing,
    Origin,
    Patience,
    is_url,
    persist,
    receive,
    without_secrets,
)
from forescale.data.remote.web import HttpOrigin
from forescale.errors import UserError

CACHE_BYTES = 8 << 30


class File(Protocol):
    """One file, open for reading at any place; safe from several threads."""

    size: int  # bytes

    def read_at(self, offset: int, into: memoryview) -> None:
        """Fill `into` (bytes, one dimension) from `offset`. Raises UserError naming the file."""

    def forget(self, offset: int, size: int) -> bool:
        """Drop cached copies of these bytes; False if there were none to drop (a local file)."""

    def will_read(self, ranges: list[tuple[int, int]]) -> None:
        """A hint: these (offset, size) come next, in this order. Costs nothing on local files."""

    def close(self) -> None: ...


class Store(Protocol):
    """A directory of files. A name that is an absolute path or a URL stands for itself."""

    where: str

    def read(self, name: str, size: int | None = None, version: str = "") -> bytes:
        """The whole of a small file; kept in a cache only if size and version are given.

        Raises UserError.
        """

    def open(self, name: str, size: int | None = None, version: str = "") -> File:
        """`size` in bytes, if known, is checked; `version` tells contents apart (a sha256)."""

    def exists(self, name: str) -> bool: ...


class LocalFile:
    """A File of the local file system."""

    def __init__(self, path: Path, size: int | None = None):
        self._path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise _unreadable(path, e) from e
        self.size = os.fstat(self._fd).st_size
        if size is not None and size != self.size:
            self.close()
            what = f"{self.size:,} bytes where {size:,} belong"
            raise UserError(str(path), what, "restore it from a copy, or build the dataset again")

    def read_at(self, offset: int, into: memoryview) -> None:
        # Not mmap: a fault of the storage would end the process (SIGBUS) without a sentence.
        try:
            count = os.preadv(self._fd, (into,), offset)
            while count < len(into):  # a signal, a read of 2 GiB, or the end of the file
                more = os.preadv(self._fd, (into[count:],), offset + count)
                if not more:
                    size = os.fstat(self._fd).st_size
                    raise _ends(str(self._path), size, offset + len(into) - size)
                count += more
        except OSError as e:
            raise _unreadable(self._path, e) from e

    def forget(self, offset: int, size: int) -> bool:
        return False

    def will_read(self, ranges: list[tuple[int, int]]) -> None:
        pass

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "_fd", -1) >= 0:
            self.close()


class RemoteFile:
    """A File at a server, read through the node's cache."""

    def __init__(self, origin: Origin, key: str, blocks: RemoteBlocks):
        self._origin, self._key, self._blocks = origin, key, blocks
        self.size = origin.size or 0

    def read_at(self, offset: int, into: memoryview) -> None:
        end = offset + len(into)
        if end > self.size:
            raise _ends(self._origin.shown, self.size, end - self.size)
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

    def close(self) -> None:
        pass  # nothing is held for one file


class RemoteStore:
    """A Store that is a folder of a server.

    url: of any protocol, its query (a signature) kept for every file; cache: a directory on a disk
    of the node's own; cache_bytes: what all processes of the node keep there at most.
    """

    def __init__(self, url: str, cache: Path, cache_bytes: int, patience: Patience):
        self._url, self.where, self._patience = url, without_secrets(url), patience
        self._blocks = RemoteBlocks(BlockCache(cache, cache_bytes), patience)
        self._origins: dict[tuple[str, str], Origin] = {}

    def read(self, name: str, size: int | None = None, version: str = "") -> bytes:
        if size is not None and version:  # worth keeping, and safe to keep
            data = bytearray(size)
            self.open(name, size, version).read_at(0, memoryview(data))
            return bytes(data)
        origin = origin_of(self._address(name), size)
        return b"".join(receive(origin, 0, size, self._patience, whole=True))

    def open(self, name: str, size: int | None = None, version: str = "") -> File:
        if not is_url(name) and name.startswith("/"):
            return LocalFile(Path(name), size)
        url = self._address(name)
        origin = self._origins.setdefault((url, version), origin_of(url, size))
        origin.learn(size, "")
        if origin.size is None or not (version or origin.tag):
            persist(origin.shown, self._patience, partial(origin.ask, self._patience.timeout))
        if origin.size is None:
            what = "the server doesn't say how long the file is"
            raise UserError(origin.shown, what, "serve it with a Content-Length, or copy it here")
        # Of a file without any version nothing tells the next process whether it is still the same.
        version = version or origin.tag or uuid.uuid4().hex
        key = hashlib.sha256(f"{url} {origin.size} {version}".encode()).hexdigest()[:32]
        return RemoteFile(origin, key, self._blocks)

    def exists(self, name: str) -> bool:
        if not is_url(name) and name.startswith("/"):
            return Path(name).is_file()
        origin = origin_of(self._address(name))
        try:
            persist(origin.shown, self._patience, partial(origin.ask, self._patience.timeout))
        except Missing:
            return False
        return True

    def close(self) -> None:
        """Fetch nothing ahead any more."""
        self._blocks.close()

    def _address(self, name: str) -> str:
        if is_url(name):
            return name
        head, mark, query = self._url.partition("?")
        return f"{head.rstrip('/')}/{name}{mark}{query}"


class LocalStore:
    """A Store that is a local directory; `remote` opens the names in it that are addresses."""

    def __init__(self, directory: Path, remote: Callable[[], RemoteStore]):
        self.directory, self.where = Path(directory), str(directory)
        self._remote = cache(remote)

    def read(self, name: str, size: int | None = None, version: str = "") -> bytes:
        if is_url(name):
            return self._remote().read(name, size, version)
        path = self.directory / name
        try:
            return path.read_bytes()
        except OSError as e:
            raise _unreadable(path, e) from e

    def open(self, name: str, size: int | None = None, version: str = "") -> File:
        if is_url(name):
            return self._remote().open(name, size, version)
        return LocalFile(self.directory / name, size)

    def exists(self, name: str) -> bool:
        return self._remote().exists(name) if is_url(name) else (self.directory / name).is_file()


def open_store(
    path: str | Path,
    cache: Path | None = None,
    cache_bytes: int = CACHE_BYTES,
    patience: Patience = PATIENCE,
) -> Store:
    """The Store of a directory: local for a path, through the node's cache for an address.

    cache: a directory on a disk of the node's own, which all its processes share; None:
    forescale-UID in $TMPDIR or /tmp. Nothing is read yet. Raises UserError for what is neither a
    path nor an address (a command, say), and for a cache that can't be used.
    """
    chosen = cache or Path(tempfile.gettempdir()) / f"forescale-{os.getuid()}"
    if is_url(path):
        return RemoteStore(str(path), chosen, cache_bytes, patience)
    return LocalStore(Path(path), lambda: RemoteStore("", chosen, cache_bytes, patience))


def origin_of(url: str, size: int | None = None) -> Origin:
    """The file at an address. Nothing is asked yet."""
    kind = HttpOrigin if url.startswith(("http://", "https://")) else FsspecOrigin
    return kind(url, size)


def _numbers(offset: int, size: int) -> range:
    return range(offset // BLOCK, -(-(offset + size) // BLOCK))


def _unreadable(path: Path, e: OSError) -> UserError:
    if isinstance(e, FileNotFoundError):
        return UserError(str(path), "missing", "restore it from a copy, or check the path")
    what = f"can't be read ({e.strerror})"
    return UserError(str(path), what, "check the storage and its permissions")


def _ends(where: str, size: int, lacks: int) -> UserError:
    todo = "restore it from a copy, or build the dataset again"
    return UserError(where, f"ends after {size:,} bytes, {lacks:,} too early", todo)
