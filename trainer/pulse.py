"""Where the time goes: every second of a rank's life falls in one phase.

Invariant: phases don't nest, so their seconds add up to the wall clock.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Pulse:
    """Seconds by phase since the last `take`; `began` is a time.monotonic()."""

    def __init__(self, phase: str, began: float | None = None):
        self.phase = phase
        self._since = time.monotonic() if began is None else began
        self._seconds: dict[str, float] = defaultdict(float)

    def enter(self, phase: str) -> str:
        """Begin a phase; returns the one that ends."""
        now = time.monotonic()
        self._seconds[self.phase] += now - self._since
        self._since, previous, self.phase = now, self.phase, phase
        return previous

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
        self.enter(self.phase)
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken
