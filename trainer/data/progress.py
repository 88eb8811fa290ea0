"""How far a long preparation is: a small protocol, and a renderer for terminals and for logs."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    def __call__(self, phase: str, done: int, total: int | None, unit: str) -> None:
        """`phase` reads as a line of its own; `done` of `total` (None: unknown) in `unit`.

        A phase ends with done == total. Called from one thread, up to some hundred times a second.
        """


def silent(phase: str, done: int, total: int | None, unit: str) -> None:
    """The progress of callers that show none."""


@contextmanager
def console(every: float = 10.0) -> Iterator[Progress]:
    """A live display on a terminal; elsewhere a plain line at each phase's end and `every` s."""
    if sys.stderr.isatty():
        yield from _live()
    else:
        yield _Lines(every)


class _Lines:
    def __init__(self, every: float):
        self._every, self._phase, self._began, self._said = every, "", 0.0, 0.0

    def __call__(self, phase: str, done: int, total: int | None, unit: str) -> None:
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._began, self._said = phase, now, now
        if done == total or now - self._said >= self._every:
            self._said = now
            of = "" if total in (None, done) else f" of {total:,}"
            seconds = now - self._began
            print(f"{phase}: {done:,}{of} {unit} ({seconds:.1f} s)", file=sys.stderr, flush=True)


def _live() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<26}"),
        BarColumn(),
        TextColumn("{task.fields[amount]:>24}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict = {}

        def show(phase: str, done: int, total: int | None, unit: str) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total, amount="")
            bars.update(tasks[phase], completed=done, total=total, amount=f"{done:,} {unit}")

        yield show
