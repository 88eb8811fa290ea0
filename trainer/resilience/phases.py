"""Where the time goes: every second of a rank's life falls in one phase, and at one place in it.

Invariant: phases don't nest, so their seconds add up to the wall clock. Only the training thread
changes a pulse; others may read it at any time (forescale.resilience.watchdog).
"""

import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
PLACE = struct.Struct("<q24s")  # step, and place in ASCII


class Pulse:
    """Seconds by phase since the last `take`; `began` is a time.monotonic().

    `step` is the one being made, `at` a finer place inside the phase, `since` when the rank came
    there. `spent` and `longest` are the seconds at each place that it has left, in all and in one
    visit, the latter without start-up and the `first` step, which compiles. `mirror`, if there is
    one, is memory that others see too: step and place stand there (PLACE), for whoever finds this
    process stopped. `hook`, if there is one, is called at every change, in the training thread.
    """

    def __init__(self, phase: str, began: float | None = None):
        self.phase = self.at = phase
        self.step = self.first = 0
        self.began = self.since = time.monotonic() if began is None else began
        self.spent: dict[str, float] = {}
        self.longest: dict[str, float] = {}
        self.mirror: Any = None  # a writable buffer
        self.hook: Callable[[], None] | None = None
        self._counted = self.since
        self._seconds: dict[str, float] = defaultdict(float)

    def enter(self, phase: str) -> str:
        """Begin a phase; returns the one that ends."""
        now = time.monotonic()
        self._seconds[self.phase] += now - self._counted
        self._counted, previous, self.phase = now, self.phase, phase
        self._come(phase, now)
        return previous

    def mark(self, at: str) -> None:
        """Say where inside the phase the rank is, such as "forward" inside "compute"."""
        self._come(at, time.monotonic())

    def _come(self, at: str, now: float) -> None:
        left, visit = self.at, now - self.since
        self.spent[left] = self.spent.get(left, 0.0) + visit
        if self.step != self.first:
            if not self.first:
                self.first = self.step
            elif visit > self.longest.get(left, -1.0):
                self.longest[left] = visit
        self.since = now  # first: who reads between the two must not see an old visit as this one's
        self.at = at
        if self.mirror is not None:
            PLACE.pack_into(self.mirror, 0, self.step, at.encode())
        if self.hook is not None:
            self.hook()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        previous = self.enter(phase)
        try:
            yield
        finally:
            self.enter(previous)

    def each(self, phase: str, items: Iterable[T]) -> Iterator[T]:
        """The items, with the time that they take to come counted as `phase`."""
        iterator = iter(items)
        while True:
            with self(phase):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call."""
        now = time.monotonic()
        self._seconds[self.phase] += now - self._counted
        self._counted = now
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken
