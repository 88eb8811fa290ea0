"""Blocks of remote files: each fetched by one thread at a time, and ahead of announced reads.

Invariant: a read never queues behind blocks that are fetched ahead: it fetches what it needs
itself, unless that very block is on its way. What fails ahead of its read is tried again by the
read, which raises its own error. Threads, and blocks ahead of their reads, are bounded; memory
holds no block but those in flight.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable

from forescale.data.remote.cache import BlockCache
from forescale.data.remote.transfer import MIB, Origin, Patience, fetch
from forescale.errors import UserError

BLOCK = MIB  # what is fetched, kept and evicted as one
_THREADS = 8
_AHEAD = 1024  # blocks that may be fetched before they are read, and
_SHARE = 16  # at most this part of the cache: other ranks fill it too
_HINTS = 1 << 16  # announced blocks that are remembered


class RemoteBlocks:
    """Blocks of files by number, from the cache or else from their origins."""

    def __init__(self, cache: BlockCache, patience: Patience):
        self._cache, self._patience = cache, patience
        self._ahead = min(_AHEAD, cache.limit // (_SHARE * BLOCK))
        self._lock = threading.Lock()
        self._flights: dict[str, _Flight] = {}
        self._hints: OrderedDict[str, tuple[Origin, int]] = OrderedDict()
        self._unread: set[str] = set()  # fetched ahead, or on their way
        self._threads = 0

    def read(self, origin: Origin, key: str, number: int, skip: int, into: memoryview) -> None:
        """Fill `into` with the bytes of a block from `skip` on; key: 32 hex digits for the file.

        Raises UserError.
        """
        name = f"{key}-{number}"
        if name in self._unread or name in self._hints:
            self._reached(name)
        if not self._cache.read(name, _length(origin, number), skip, into):
            data = self._obtain(origin, name, number)
            into[:] = memoryview(data)[skip : skip + len(into)]

    def will_read(self, origin: Origin, key: str, numbers: Iterable[int]) -> None:
        """These blocks come next, after those that were announced before."""
        with self._lock:
            for number in numbers:
                name = f"{key}-{number}"
                if name not in self._unread and len(self._hints) < _HINTS:
                    self._hints.setdefault(name, (origin, number))
            self._start()

    def forget(self, key: str, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._cache.drop(f"{key}-{number}")

    def close(self) -> None:
        """Fetch nothing ahead any more."""
        with self._lock:
            self._hints.clear()

    def _reached(self, name: str) -> None:
        with self._lock:
            if self._hints.pop(name, None):
                # The reader is where the fetching is: what was fetched and not read was passed
                # over, and mustn't stop the fetching for ever.
                self._unread.clear()
            self._unread.discard(name)
            self._start()

    def _start(self) -> None:
        """A thread lives while there is something to fetch. The caller holds the lock."""
        room = min(self._ahead - len(self._unread), len(self._hints) - self._threads)
        for _ in range(min(room, _THREADS - self._threads)):
            self._threads += 1
            threading.Thread(target=self._fetch_ahead, name="prefetch", daemon=True).start()

    def _fetch_ahead(self) -> None:
        while True:
            with self._lock:
                # A cache that takes nothing would have it all fetched in vain.
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
            except UserError:  # its read tries again, and raises
                with self._lock:
                    self._unread.discard(name)

    def _obtain(self, origin: Origin, name: str, number: int, ahead: bool = False) -> bytearray:
        """All bytes of a block that isn't in the cache."""
        while True:
            with self._lock:
                other = self._flights.get(name)
                if other is None:
                    mine = self._flights[name] = _Flight(ahead)
                    break
            other.done.wait()
            if other.data is not None:
                return other.data
            if isinstance(other.error, UserError) and not other.ahead:
                raise other.error
        start, length = number * BLOCK, _length(origin, number)
        try:
            mine.data = self._cache.fill(
                name,
                length,
                lambda: fetch(origin, start, start + length, self._patience),
                2 * self._patience.seconds,
            )
            return mine.data
        except BaseException as e:
            mine.error = e
            raise
        finally:
            with self._lock:
                del self._flights[name]
            mine.done.set()


class _Flight:
    """A block that one thread is fetching; others wait for it."""

    def __init__(self, ahead: bool):
        self.ahead, self.done = ahead, threading.Event()
        self.data: bytearray | None = None
        self.error: BaseException | None = None


def _length(origin: Origin, number: int) -> int:
    assert origin.size is not None, "a file is opened with its size"
    return min(BLOCK, origin.size - number * BLOCK)
