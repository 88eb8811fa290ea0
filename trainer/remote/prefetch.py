"""Blocks of remote files: each fetched by one thread at a time, and before announced reads.

Invariant: a read never queues behind prefetched blocks: it fetches what it needs itself, unless
that block is already being fetched. A failed prefetch is tried again by the read, which raises its
own error. The number of threads and of prefetched blocks is bounded; memory holds only blocks that
are being fetched.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future

from forescale.ground.errors import UserError
from forescale.remote.cache import BlockCache
from forescale.remote.transfer import MIB, Origin, Patience, fetch

BLOCK = MIB  # bytes that are fetched, kept and evicted together
_THREADS = 8
_AHEAD = 1024  # maximum prefetched blocks, and
_SHARE = 16  # at most this fraction of the cache: other ranks fill it too
_HINTS = 1 << 16  # maximum announced blocks that are remembered


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
