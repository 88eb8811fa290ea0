"""Progress of a long preparation: a small protocol, and renderers for terminals and for logs.

Invariant: only measured values are shown: a rate covers the last 30 seconds, the time left follows
from it, and neither is shown before it was measured.
"""

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from forescale.console import is_terminal, open_console, span

_WINDOW = 30.0  # seconds that a rate is measured over
_LEAST = 3  # units from which a time left follows


class Progress(Protocol):
    """A callable that displays how far a phase is."""

    def __call__(
        self, phase: str, done: int, total: int | None, unit: str, *, tokens: int = 0
    ) -> None:
        """Show that `done` of `total` (None: unknown) of `phase` are done. phase: a label that can
        stand alone on a line; unit: such as "bytes" or "tokens".

        tokens: number made so far, if `unit` isn't tokens. A phase ends with done == total. Without
        a unit, `phase` is a sentence to print at once. Called from one thread, up to some hundred
        times a second.
        """


def silent(phase: str, done: int, total: int | None, unit: str, *, tokens: int = 0) -> None:
    """Show nothing."""


def log_line(progress: Progress, sentence: str) -> None:
    """Print a sentence between the phases."""
    progress(sentence, 0, 0, "")


class Meter:
    """Adds up what workers report about a phase; called with the amounts since the last call."""

    def __init__(self, progress: Progress, phase: str, total: int, unit: str):
        """total: of the phase, in `unit`."""
        self._progress, self._phase, self._total, self._unit = progress, phase, total, unit
        self._done = self._tokens = 0

    def __call__(self, amount: int, tokens: int) -> None:
        """Add an amount in the phase's unit, and a number of tokens."""
        self._done += amount
        self._tokens += tokens
        if 0 < self._done < self._total:
            self._show()

    def end(self) -> None:
        """Show the phase as finished."""
        self._done = self._total
        self._show()

    def _show(self) -> None:
        self._progress(self._phase, self._done, self._total, self._unit, tokens=self._tokens)


class Rates:
    """Rates over the last 30 seconds; at a phase's end over the whole phase."""

    def __init__(self, now: float):
        """now: seconds of a monotonic clock."""
        self._first = (now, 0, 0)
        self._seen = deque([self._first])

    def see(self, now: float, done: int, tokens: int) -> None:
        """Record the amounts done so far."""
        if now - self._seen[-1][0] < 0.2 and len(self._seen) > 1:
            self._seen.pop()  # a few samples a second are enough
        self._seen.append((now, done, tokens))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _WINDOW:
            self._seen.popleft()

    def text(self, total: int | None, unit: str) -> str:
        """Return such as "3.4 MB/s, 1,200,000 tokens/s, 12 s left"; "" in the first second."""
        now, done, tokens = self._seen[-1]
        then, done0, tokens0 = self._first if done == total else self._seen[0]
        if (seconds := now - then) < 1:
            return ""
        rate = (done - done0) / seconds
        parts = [
            f"{rate / 1e6:.1f} MB/s" if unit == "bytes" else f"{rate:,.{_digits(rate)}f} {unit}/s"
        ]
        if tokens and unit != "tokens":
            parts.append(f"{(tokens - tokens0) / seconds:,.0f} tokens/s")
        # One or two of a few large units say little about the time of the rest.
        if total and done < total and done - done0 >= _LEAST:
            parts.append(f"{span((total - done) / rate)} left")
        return ", ".join(parts)


def _digits(rate: float) -> int:
    """Return the decimals of a rate: it is never shown as 0."""
    return 0 if rate >= 10 else 1 if rate >= 1 else 2


def amount(done: int, total: int | None, unit: str) -> str:
    """Return such as "12.0 of 40.0 MB (30%)"."""
    is_large = unit == "bytes" and max(done, total or 0) >= 100_000
    shown, of = (f"{n / 1e6:,.1f}" if is_large else f"{n:,}" for n in (done, total or 0))
    unit = "MB" if is_large else unit
    if total is None or done == total:
        return f"{shown} {unit}"
    return f"{shown} of {of} {unit} ({done / max(total, 1):.0%})"


@contextmanager
def shown(every: float = 10.0) -> Iterator[Progress]:
    """Yield a live display on a terminal; elsewhere print a line at each phase's end and `every`
    seconds."""
    if is_terminal(sys.stderr):
        yield from _live()
    else:
        yield _Lines(every)


class _Lines:
    def __init__(self, every: float):
        self._every, self._phase, self._began, self._printed = every, "", 0.0, 0.0

    def __call__(
        self, phase: str, done: int, total: int | None, unit: str, *, tokens: int = 0
    ) -> None:
        now = time.monotonic()
        if not unit:
            print(phase, file=sys.stderr, flush=True)
            return
        if phase != self._phase:
            self._phase, self._began, self._printed = phase, now, now
            self._rates = Rates(now)
        self._rates.see(now, done, tokens)
        if done == total or now - self._printed >= self._every:
            self._printed = now
            facts = [f"{now - self._began:.1f} s", self._rates.text(total, unit)]
            text = ", ".join(fact for fact in facts if fact)
            print(f"{phase}: {amount(done, total, unit)} ({text})", file=sys.stderr, flush=True)


def _live() -> Iterator[Progress]:
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        TextColumn("{task.fields[amount]:>20}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[rates]}"),
    )
    with Bars(*columns, console=open_console(stderr=True)) as bars:
        tasks: dict = {}
        rates: dict[str, Rates] = {}

        def show(phase: str, done: int, total: int | None, unit: str, *, tokens: int = 0) -> None:
            if not unit:
                bars.console.print(phase)
                return
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total, amount="", rates="")
                rates[phase] = Rates(time.monotonic())
            rates[phase].see(time.monotonic(), done, tokens)
            bars.update(
                tasks[phase],
                completed=done,
                total=total,
                amount=amount(done, None, unit),
                rates=rates[phase].text(total, unit),
            )

        yield show
