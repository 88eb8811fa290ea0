"""Making batches ahead of their consumer, in order, with one quarantine for all ranks.

    plan -> workers (threads, some steps at once) -> coordinator (agrees, in order) -> consumer

Workers are threads: reading, hashing and copying leave the interpreter's lock, nothing is copied
between processes, and a thread can't be killed without a word. At most `workers` + _READY batches
are held.

Invariant: batches come in the order of the plan, each made with the quarantine that all ranks
agreed on at that very step; so a member that one rank finds damaged is substituted on all ranks
from the same step on, however far each had read ahead.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from forescale.data.feed import Lost
from forescale.errors import UserError

_READY = 2  # batches that wait for the consumer
_FETCHED = 32  # steps ahead of the workers whose bytes are fetched, where they lie far away
_STALLED = 5.0  # seconds without a batch after which somebody is told why

J = TypeVar("J")
At = Callable[[str, str], None]
Agree = Callable[[frozenset[Lost]], frozenset[Lost]]
Tell = Callable[[str], None]
_END = object()


def prefetched(
    plan: Iterator[J],
    make: Callable[[J, frozenset[Lost], At], Any],
    fetch: Callable[[J], None],
    quarantine: frozenset[Lost],
    workers: int,
    agree: Agree | None,
    tell: Tell,
) -> Generator[Any, None, None]:
    """What `make` makes of each job of the plan, in order; 0 workers: when it is asked for.

    make(job, quarantine, at) returns a dataclass with `lost` and `quarantine`, and tells `at` the
    source and shard that it is about to read. fetch(job): a hint some steps before. agree: the
    union of what the ranks have lost, called once a step (and again where there is any), by every
    rank, from another thread than the consumer's; None for one rank. tell: hears why no batch has
    come for some seconds. An error of `make` is raised where its batch would have come.
    """
    settle = _Settle(make, quarantine, agree)
    if not workers:
        for job in plan:
            yield settle(job, None, lambda source, shard: None)
        return
    crew = _Crew(_hinted(plan, fetch), settle, workers)
    try:
        yield from crew.batches(tell)
    finally:
        crew.close()


def _hinted(plan: Iterator[J], fetch: Callable[[J], None]) -> Iterator[J]:
    """The plan, with `fetch` told of every job _FETCHED jobs before. What it can't find is left to
    the reading of that job to say, which comes next instead of after hints that would fail too."""
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


class _Settle:
    """Makes a batch again until every rank made it with the same quarantine, its own included."""

    def __init__(self, make, quarantine: frozenset[Lost], agree: Agree | None):
        self.make, self.quarantine, self.shared = make, quarantine, agree is not None
        self._agree: Agree = agree or (lambda lost: lost)

    def __call__(self, job: Any, made: Any, at: At) -> Any:
        """made: the batch, if it has been made with some earlier quarantine."""
        mine: frozenset[Lost] = frozenset()
        while True:
            if made is None or made.quarantine - made.lost != self.quarantine:
                made = self.make(job, self.quarantine, at)
            mine |= made.lost
            lost = self._agree(made.lost)
            if lost <= self.quarantine:
                return replace(made, lost=mine)
            self.quarantine |= lost


class _Task:
    """One job for a worker, and what became of it."""

    def __init__(self, job: Any, quarantine: frozenset[Lost]):
        self.job, self.quarantine = job, quarantine
        self.made: Any = None
        self.error: BaseException | None = None
        self.finished = threading.Event()


class _Crew:
    """The threads: workers, and the coordinator that hands out their batches in order."""

    def __init__(self, plan: Iterator[Any], settle: _Settle, workers: int):
        self._plan, self._settle, self._workers = plan, settle, workers
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

    def batches(self, tell: Tell) -> Iterator[Any]:
        while True:
            made, error = self._next(tell)
            if error is not None:
                raise error
            if made is _END:
                return
            self._free.release()
            yield made

    def close(self) -> None:
        """End the threads. With other ranks the coordinator first makes what they make too, so that
        none of them waits for its word."""
        self._closed.set()
        self._coordinator.join(timeout=10)

    def _next(self, tell: Tell) -> tuple[Any, BaseException | None]:
        patience, waited = _STALLED, 0.0
        while True:
            try:
                return self._ready.get(timeout=patience)
            except Empty:
                waited += patience
                tell(self._why(waited))
                patience = waited  # after 5, 10, 20, 40 s ...

    def _why(self, seconds: float) -> str:
        now = time.monotonic()
        doing = [(now - since, worker, *at) for worker, (since, *at) in list(self._doing.items())]
        if not doing:
            return f"no batch for {seconds:.0f} s: waiting for the other ranks' data"
        longest, worker, source, shard = max(doing)
        what = f"{worker} reads {shard} of {source} since {longest:.0f} s"
        return f"no batch for {seconds:.0f} s: {what}"

    def _at(self, source: str, shard: str) -> None:
        self._doing[threading.current_thread().name] = (time.monotonic(), source, shard)

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            try:
                if not self._closed.is_set():
                    task.made = self._settle.make(task.job, task.quarantine, self._at)
            except BaseException as e:
                task.error = e
            self._doing.pop(threading.current_thread().name, None)
            task.finished.set()

    def _coordinate(self) -> None:
        try:
            for task in self._in_order():
                if not self._may_make():
                    return
                task.finished.wait()
                if task.error is not None:
                    raise task.error
                self._ready.put((self._settle(task.job, task.made, self._at), None))
                self._doing.pop(threading.current_thread().name, None)
            self._ready.put((_END, None))
        except BaseException as e:
            self._ready.put((None, e))
        finally:
            for _ in range(self._workers):
                self._tasks.put(None)

    def _may_make(self) -> bool:
        """Wait until the consumer has taken enough; False once it is gone."""
        while not self._free.acquire(timeout=0.2):
            if self._closed.is_set():
                return False
        return self._settle.shared or not self._closed.is_set()

    def _in_order(self) -> Iterator[_Task]:
        """The jobs as tasks, as many given to the workers at once as there are workers."""
        given: deque[_Task] = deque()
        while True:
            for job in islice(self._plan, self._workers - len(given)):
                given.append(_Task(job, self._settle.quarantine))
                self._tasks.put(given[-1])
            if not given:
                return
            yield given.popleft()
