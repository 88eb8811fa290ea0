"""Blocks of remote files on a node's own disk, shared by all processes there, fetched ahead.

    NAME              a block: its bytes, then XXH3-64 of every 64 KiB of them, 8 bytes each
    NAME.part         a block that is being fetched; the fetching process holds its lock
    usage             8 bytes: total size of all blocks; its lock guards publishing and eviction

Locks are taken with flock, which the kernel releases when a process dies: the files of a killed
process are taken over by the next one that needs the block, or removed by the next eviction.

Invariant: bytes are returned only if their checksum, which also covers the block's name, was
correct in this very read. The blocks never take more than the limit, whichever process writes them.
A block may disappear at any time; a read then either returns all bytes or reports that the block is
missing.

A process fetches each block in one thread at a time, and before announced reads. A read never
queues behind prefetched blocks: it fetches what it needs itself, unless that block is already being
fetched. A failed prefetch is tried again by the read, which raises its own error. The number of
threads and of prefetched blocks is bounded; memory holds only blocks that are being fetched.
"""

import errno
import fcntl
import os
import re
import shutil
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path

import xxhash

from forescale.ground.errors import UserError
from forescale.remote.transfer import MIB, Origin, Patience, fetch

_PIECE = 1 << 16  # bytes under one checksum
_NAME = re.compile(r"[0-9a-f]{32}-\d+")
_POLL = 0.01  # seconds between checks of a block that another process fetches
_FRESH = 1.0  # seconds after a read in which further reads don't update its time
_SPARE = 0.9  # eviction frees space down to this fraction of the limit, so that it is rarely needed
BLOCK = MIB  # bytes that are fetched, kept and evicted together
_THREADS = 8
_AHEAD = 1024  # maximum prefetched blocks, and
_SHARE = 16  # at most this fraction of the cache: other ranks fill it too
_HINTS = 1 << 16  # maximum announced blocks that are remembered


class BlockCache:
    """Blocks by name (32 hex digits, a dash, a number), at most `limit` bytes altogether.

    Safe between threads and between processes. Raises UserError if the directory can't be used;
    later, a failing disk costs speed and gives a warning, but doesn't stop the run (`failing` is
    True).
    """

    def __init__(self, directory: Path, limit: int):
        """Create the directory, remove abandoned parts, and evict blocks above the limit."""
        self._directory, self._prefix = str(directory), f"{directory}/"
        self.failing = self._warned = False
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            with self._usage() as usage:
                _sweep(self._prefix)
                # Never fill the disk completely: others write to it, and would fail.
                taken = self._count(usage)
                room = shutil.disk_usage(directory).free + taken
                self.limit = min(limit, int(_SPARE * room))
                if taken > self.limit:
                    _set(usage, self._evict(self.limit))
        except OSError as e:
            problem = f"can't be used as cache of remote files ({e.strerror})"
            todo = "set data.cache to a writable directory on a local disk of the node"
            raise UserError(str(directory), problem, todo) from e

    def read(self, name: str, length: int, skip: int, into: memoryview) -> bool:
        """Fill `into` with a block's bytes from `skip` on; return False if the block is missing,
        truncated or damaged. length: bytes of the whole block."""
        try:
            fd = os.open(self._prefix + name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            if e.errno != errno.ENOENT:
                self._fails(e)
            return False
        is_intact = False
        try:
            facts = os.fstat(fd)
            first, last = skip // _PIECE, (skip + len(into) - 1) // _PIECE
            data = memoryview(bytearray(min((last + 1) * _PIECE, length) - first * _PIECE))
            sums = bytearray(8 * (last + 1 - first))
            if (
                facts.st_size == _stored(length)
                and os.preadv(fd, [data], first * _PIECE) == len(data)
                and os.preadv(fd, [sums], length + 8 * first) == len(sums)
                and b"".join(_checksums(name, data, first)) == sums
            ):
                into[:] = data[skip - first * _PIECE :][: len(into)]
                _refresh(fd, facts)
                is_intact = True
        except OSError as e:
            self._fails(e)
        finally:
            os.close(fd)
        if not is_intact:
            self.drop(name)
        return is_intact

    def fill(
        self, name: str, length: int, fetch: Callable[[], bytearray], wait: float
    ) -> bytearray:
        """Return all bytes of a block. One process of the node fetches it, the others wait for it.

        fetch: called while holding only this block's lock; its exceptions are raised here. wait:
        seconds after which a stuck process isn't waited for any more.
        """
        until, path = time.monotonic() + wait, f"{self._prefix}{name}.part"
        data = bytearray(length)
        while True:
            try:
                part = _locked(path)
            except OSError as e:
                self._fails(e)
                return fetch()
            try:  # also if locked: it may have been published since the last check
                if self.read(name, length, 0, memoryview(data)):
                    return data
                if part is not None:
                    data = fetch()
                    self._publish(part, name, data)
                    return data
            finally:
                if part is not None:
                    _release(part, path)
            if time.monotonic() > until:
                return fetch()
            time.sleep(_POLL)

    def keep(self, name: str, length: int) -> bool:
        """Return whether a block seems to be present (its bytes are verified when read). If so, it
        counts as read now, so that it isn't evicted before it is read."""
        try:
            facts = os.stat(self._prefix + name)
            _refresh(self._prefix + name, facts)
        except OSError as e:
            if e.errno != errno.ENOENT:
                self._fails(e)
            return False
        return facts.st_size == _stored(length)

    def drop(self, name: str) -> None:
        """Remove a block, so that the next read fetches it."""
        try:
            with self._usage() as usage:
                _set(usage, self._count(usage) - _remove(self._prefix + name))
        except OSError as e:
            self._fails(e)

    def _publish(self, part: int, name: str, data: bytearray) -> None:
        sums = b"".join(_checksums(name, memoryview(data), 0))
        size = len(data) + len(sums)
        try:
            if size > self.limit:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            with self._usage() as usage:
                taken = self._count(usage)
                if taken + size > self.limit:
                    taken = self._evict(min(int(_SPARE * self.limit), self.limit - size))
                # Counted first: after a kill here, the next eviction corrects the count.
                _set(usage, taken + size)
                if os.pwritev(part, [data, sums], 0) < size:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.rename(f"{self._prefix}{name}.part", self._prefix + name)
            self.failing = False
        except OSError as e:
            self._fails(e)

    def _evict(self, target: int) -> int:
        """Remove the least recently read blocks until the others take up at most `target` bytes;
        return their size. The caller holds the lock of `usage`."""
        _sweep(self._prefix)
        rows = sorted(_blocks(self._prefix))
        left = sum(size for _, size, _ in rows)
        for _, size, name in rows:
            if left <= target:
                break
            _remove(self._prefix + name)
            left -= size
        return left

    @contextmanager
    def _usage(self) -> Iterator[int]:
        fd = os.open(self._prefix + "usage", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield fd
        finally:
            # Closing alone would keep the lock if a fork has the descriptor too.
            fcntl.flock(fd, fcntl.LOCK_UN)
            os.close(fd)

    def _count(self, usage: int) -> int:
        raw = os.pread(usage, 8, 0)
        if len(raw) == 8:
            return int.from_bytes(raw, "little")
        return sum(size for _, size, _ in _blocks(self._prefix))

    def _fails(self, error: OSError) -> None:
        self.failing = True
        if not self._warned:
            self._warned = True
            problem = f"{self._directory}: the cache of remote files failed ({error.strerror})"
            warnings.warn(f"{problem}; reading continues without it", RuntimeWarning, stacklevel=2)


def _stored(length: int) -> int:
    """Return the bytes that a block of this length takes up with its checksums."""
    return length + 8 * -(-length // _PIECE)


def _refresh(file: int | str, facts: os.stat_result) -> None:
    if abs(time.time() - facts.st_mtime) > _FRESH:
        os.utime(file)


def _checksums(name: str, data: memoryview, first: int) -> Iterator[bytes]:
    seed = xxhash.xxh3_64_intdigest(name.encode()) + first
    for i, start in enumerate(range(0, len(data), _PIECE)):
        yield xxhash.xxh3_64_digest(data[start : start + _PIECE], (seed + i) % 2**64)


def _blocks(prefix: str) -> list[tuple[float, int, str]]:
    """Return (time of the last read, 0 if that is to come, size, name) of every block."""
    rows, end = [], time.time() + _FRESH  # beyond it, the clock was put back: not there for ever
    with os.scandir(prefix) as entries:
        for entry in entries:
            if _NAME.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    facts = entry.stat()
                    moment = facts.st_mtime if facts.st_mtime < end else 0.0
                    rows.append((moment, facts.st_size, entry.name))
    return rows


def _sweep(prefix: str) -> None:
    """Remove parts that no process fetches: their processes were killed."""
    for name in os.listdir(prefix):
        if name.endswith(".part") and _NAME.fullmatch(name[:-5]):
            path = prefix + name
            if (part := _locked(path)) is not None:
                _release(part, path)


def _locked(path: str) -> int | None:
    """Return a descriptor of this file, new or not, with its lock; None if another holds it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The name may belong to another file by now: its last holder removed or published it.
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _release(fd: int, path: str) -> None:
    """Remove the file unless it was renamed, and release its lock."""
    try:
        if os.path.samestat(os.fstat(fd), os.stat(path)):
            os.unlink(path)
    except FileNotFoundError:
        pass
    finally:
        os.close(fd)


def _remove(path: str) -> int:
    """Remove a block that may be gone already; return the bytes that it took up."""
    try:
        size = os.stat(path).st_size
        os.unlink(path)
    except FileNotFoundError:
        return 0
    return size


def _set(usage: int, count: int) -> None:
    os.pwrite(usage, max(0, count).to_bytes(8, "little"), 0)


class RemoteBlocks:
    """Blocks of files by number, from the cache or from their origins."""

    def __init__(self, cache: BlockCache, patience: Patience):
        self._cache, self._patience = cache, patience
        self._ahead = min(_AHEAD, cache.limit // (_SHARE * BLOCK))
        self._lock = threading.Lock()
        # Blocks that a thread is fetching, for which others wait; whether they are prefetched.
        self._flights: dict[str, tuple[Future[bytearray], bool]] = {}
        self._hints: OrderedDict[str, tuple[Origin, int]] = OrderedDict()
        self._unread: set[str] = set()  # prefetched or being prefetched
        self._threads = 0

    def read(self, origin: Origin, key: str, number: int, skip: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a block from `skip` on; key: 32 hex digits for the file.

        Raises UserError.
        """
        name = f"{key}-{number}"
        if name in self._unread or name in self._hints:
            with self._lock:
                if self._hints.pop(name, None):
                    # The reader has caught up: blocks fetched but not read were skipped, and must
                    # not block prefetching forever.
                    self._unread.clear()
                self._unread.discard(name)
                self._start()
        if not self._cache.read(name, _length(origin, number), skip, into):
            data = self._obtain(origin, name, number)
            into[:] = memoryview(data)[skip : skip + len(into)]

    def will_read(self, origin: Origin, key: str, numbers: Iterable[int]) -> None:
        """Announce blocks that will be read after those announced before."""
        with self._lock:
            for number in numbers:
                name = f"{key}-{number}"
                if name not in self._unread and len(self._hints) < _HINTS:
                    self._hints.setdefault(name, (origin, number))
            self._start()

    def forget(self, key: str, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._cache.drop(f"{key}-{number}")

    def _start(self) -> None:
        """Start threads while there is something to fetch. The caller holds the lock."""
        room = min(self._ahead - len(self._unread), len(self._hints) - self._threads)
        for _ in range(min(room, _THREADS - self._threads)):
            self._threads += 1
            threading.Thread(target=self._fetch_ahead, name="prefetch", daemon=True).start()

    def _fetch_ahead(self) -> None:
        while True:
            with self._lock:
                # Prefetching is useless if the cache can't store anything.
                if not self._hints or len(self._unread) >= self._ahead or self._cache.failing:
                    self._threads -= 1
                    return
                name, (origin, number) = self._hints.popitem(last=False)
                self._unread.add(name)
            if self._cache.keep(name, _length(origin, number)):
                with self._lock:
                    self._unread.discard(name)
                continue
            try:
                self._obtain(origin, name, number, ahead=True)
            except UserError:  # the read tries again and raises
                with self._lock:
                    self._unread.discard(name)

    def _obtain(self, origin: Origin, name: str, number: int, ahead: bool = False) -> bytearray:
        """Return all bytes of a block that isn't in the cache."""
        while True:
            with self._lock:
                if (other := self._flights.get(name)) is None:
                    flight: Future[bytearray] = Future()
                    self._flights[name] = flight, ahead
                    break
            error = other[0].exception()  # waits
            if error is None:
                return other[0].result()
            if isinstance(error, UserError) and not other[1]:
                raise error
        start, length = number * BLOCK, _length(origin, number)

        def fetched() -> bytearray:
            return fetch(origin, start, start + length, self._patience)

        try:
            data = self._cache.fill(name, length, fetched, 2 * self._patience.seconds)
        except BaseException as e:
            with self._lock:
                del self._flights[name]
            flight.set_exception(e)
            raise
        with self._lock:
            del self._flights[name]
        flight.set_result(data)
        return data


def _length(origin: Origin, number: int) -> int:
    assert origin.size is not None, "the size is known when a file is opened"
    return min(BLOCK, origin.size - number * BLOCK)
