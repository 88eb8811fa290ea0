"""Measures where a rank's time goes: every second falls in one phase, and at one place within it.

Invariant: phases don't nest, so their seconds add up to the wall clock. Only the training thread
changes a phase timer; other threads may read it at any time (see resilience/reporter.py).
"""

import struct
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

T = TypeVar("T")
PLACE = struct.Struct("<q24s")  # step, and place in ASCII
# Between steps, now and then.
_BESIDE = ("evaluation", "checkpoint", "outer", "startup", "recovery")


def training_seconds(seconds: Mapping[str, float]) -> float:
    """Return the seconds of a step itself, given its row's seconds by phase: without evaluation,
    saving and start-up, which say nothing of how fast steps are."""
    return sum(spent for phase, spent in seconds.items() if phase not in _BESIDE)


class PhaseTimer:
    """Seconds by phase since the last `take`.

    step: the step being made; at: the place inside the phase; since: when the rank came there.
    spent, longest: seconds at each place that the rank has left, in all and in the longest visit;
    `longest` leaves out start-up and the `first` step, which compiles.
    mirror: None, or memory that other processes map too; step and place are written there (PLACE),
    so that they can be read when this process is stopped.
    hook: None, or a function that the training thread calls at every change.
    began and since are values of time.monotonic().
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
        """Begin a phase and return the one that it ends."""
        now = time.monotonic()
        self._seconds[self.phase] += now - self._counted
        self._counted, previous, self.phase = now, self.phase, phase
        self._move(phase, now)
        return previous

    def mark(self, at: str) -> None:
        """Set the place inside the phase, such as "forward" inside "compute"."""
        self._move(at, time.monotonic())

    def _move(self, at: str, now: float) -> None:
        left, visit = self.at, now - self.since
        self.spent[left] = self.spent.get(left, 0.0) + visit
        if self.step != self.first:
            if not self.first:
                self.first = self.step
            elif visit > self.longest.get(left, -1.0):
                self.longest[left] = visit
        # `since` first: a reader between the two lines must not take an old visit for the new one.
        self.since = now
        self.at = at
        if self.mirror is not None:
            PLACE.pack_into(self.mirror, 0, self.step, at.encode())
        if self.hook is not None:
            self.hook()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the block as `phase`, then return to the phase before."""
        previous = self.enter(phase)
        try:
            yield
        finally:
            self.enter(previous)

    def each(self, phase: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and count the time spent waiting for each as `phase`."""
        iterator = iter(items)
        while True:
            with self(phase):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def take(self) -> dict[str, float]:
        """Return the seconds by phase since the last call."""
        now = time.monotonic()
        self._seconds[self.phase] += now - self._counted
        self._counted = now
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken
