"""Prepare batches ahead of their consumer, in order, with the same quarantine on all ranks.

    plan -> workers (threads, several steps at once) -> coordinator (agrees, in order) -> consumer

Workers are threads: reading, hashing and copying release the interpreter's lock, nothing is copied
between processes, and a thread can't be killed unnoticed. At most `workers` + _READY batches are in
memory.

Invariant: batches come in the order of the plan, with the quarantine that all ranks agreed on at
that step. So a member that proves damaged on one rank is substituted on all ranks from the same
step on, however far each had read ahead.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import replace
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from forescale.data.feed import LostMember, OnRead
from forescale.ground.errors import UserError

_READY = 2  # batches that wait for the consumer
_FETCHED = 32  # steps ahead of the workers for which remote bytes are prefetched
_STALLED = 5.0  # seconds without a batch after which the reason is logged

J = TypeVar("J")

Agree = Callable[[frozenset[LostMember]], frozenset[LostMember]]
Log = Callable[[str], None]
_Task = tuple[Any, frozenset[LostMember], "Future[Any]"]  # job, quarantine, batch
_END = object()


def prefetched(
    plan: Iterator[J],
    make: Callable[[J, frozenset[LostMember], OnRead], Any],
    fetch: Callable[[J], None],
    quarantine: frozenset[LostMember],
    workers: int,
    agree: Agree | None,
    log: Log,
) -> Generator[Any, None, None]:
    """Yield the result of `make` for each job of the plan, in order; with 0 workers it is called on
    request.

    make(job, quarantine, on_read) returns a dataclass with `lost` and `quarantine`, and calls
    `on_read` with the source and shard before each read. fetch(job): a hint, called some steps
    before. agree: returns the union of the members that the ranks have lost; called once a step
    (and again if there are any) by every rank, from a thread other than the consumer's; None for
    one rank. log: called with the reason if no batch has come for some seconds. An error of `make`
    is raised in place of its batch.
    """
    maker = _BatchMaker(make, quarantine, agree)
    if not workers:
        for job in plan:
            yield maker(job, None, lambda source, shard: None)
        return
    pool = _WorkerPool(_hinted(plan, fetch), maker, workers)
    try:
        yield from pool.batches(log)
    finally:
        pool.close()


def _hinted(plan: Iterator[J], fetch: Callable[[J], None]) -> Iterator[J]:
    """Yield the jobs of the plan, with `fetch` called for every job up to _FETCHED jobs before. If
    a hint fails, no more hints are sent until the jobs before it are done: reading that job raises
    the error."""
    ahead: deque[J] = deque()
    for job in plan:
        ahead.append(job)
        try:
            fetch(job)
        except UserError:
            yield from ahead
            ahead.clear()
        if len(ahead) > _FETCHED:
            yield ahead.popleft()
    yield from ahead


class _BatchMaker:
    """Makes a batch again until all ranks have made it with the same quarantine."""

    def __init__(self, make, quarantine: frozenset[LostMember], agree: Agree | None):
        self.make, self.quarantine, self.shared = make, quarantine, agree is not None
        self._agree: Agree = agree or (lambda lost: lost)

    def __call__(self, job: Any, batch: Any, on_read: OnRead) -> Any:
        """Return the batch that all ranks agree on. batch: of an earlier quarantine, or None."""
        mine: frozenset[LostMember] = frozenset()
        while True:
            if batch is None or batch.quarantine - batch.lost != self.quarantine:
                batch = self.make(job, self.quarantine, on_read)
            mine |= batch.lost
            lost = self._agree(batch.lost)
            if lost <= self.quarantine:
                return replace(batch, lost=mine)
            self.quarantine |= lost


class _WorkerPool:
    """The threads: workers, and the coordinator that hands out their batches in order."""

    def __init__(self, plan: Iterator[Any], maker: _BatchMaker, workers: int):
        self._plan, self._maker, self._workers = plan, maker, workers
        self._tasks: SimpleQueue[_Task | None] = SimpleQueue()
        self._ready: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._free, self._closed = threading.Semaphore(_READY), threading.Event()
        self._doing: dict[str, tuple[float, str, str]] = {}
        names = [f"data worker {i}" for i in range(workers)]
        threads = [threading.Thread(target=self._work, name=n, daemon=True) for n in names]
        self._coordinator = threading.Thread(
            target=self._coordinate, name="data coordinator", daemon=True
        )
        for thread in [*threads, self._coordinator]:
            thread.start()

    def batches(self, log: Log) -> Iterator[Any]:
        waited, patience = 0.0, _STALLED
        while True:
            try:
                batch, error = self._ready.get(timeout=patience)
            except Empty:
                waited += patience
                log(self._why(waited))
                patience = waited  # after 5, 10, 20, 40 s ...
                continue
            if error is not None:
                raise error
            if batch is _END:
                return
            self._free.release()
            yield batch
            waited, patience = 0.0, _STALLED

    def close(self) -> None:
        """End the threads. With several ranks the coordinator first makes the batches that the
        other ranks make too, so that none of them waits for its answer."""
        self._closed.set()
        self._coordinator.join(timeout=10)

    def _why(self, seconds: float) -> str:
        """Return why no batch has come for so long."""
        now = time.monotonic()
        doing = [(now - since, worker, *at) for worker, (since, *at) in list(self._doing.items())]
        if not doing:
            return f"no batch for {seconds:.0f} s: waiting for the data of other ranks"
        longest, worker, source, shard = max(doing)
        problem = f"{worker} has been reading {shard} of {source} for {longest:.0f} s"
        return f"no batch for {seconds:.0f} s: {problem}"

    def _on_read(self, source: str, shard: str) -> None:
        self._doing[threading.current_thread().name] = (time.monotonic(), source, shard)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            job, quarantine, future = task
            try:
                is_open = not self._closed.is_set()
                batch = self._maker.make(job, quarantine, self._on_read) if is_open else None
                future.set_result(batch)
            except BaseException as e:
                future.set_exception(e)
            self._doing.pop(threading.current_thread().name, None)

    def _coordinate(self) -> None:
        try:
            for job, _, future in self._in_order():
                # Wait until the consumer has taken enough batches, or closes the pool.
                while not self._free.acquire(timeout=0.2):
                    if self._closed.is_set():
                        return
                if self._closed.is_set() and not self._maker.shared:
                    return
                self._ready.put((self._maker(job, future.result(), self._on_read), None))
                self._doing.pop(threading.current_thread().name, None)
            self._ready.put((_END, None))
        except BaseException as e:
            self._ready.put((None, e))
        finally:
            for _ in range(self._workers):
                self._tasks.put(None)

    def _in_order(self) -> Iterator[_Task]:
        """Yield the jobs as tasks; each worker has one."""
        tasks: deque[_Task] = deque()
        while True:
            for job in islice(self._plan, self._workers - len(tasks)):
                tasks.append((job, self._maker.quarantine, Future()))
                self._tasks.put(tasks[-1])
            if not tasks:
                return
            yield tasks.popleft()
