"""How far a long preparation is: a small protocol, and a renderer for terminals and for logs.

Invariant: what is shown is measured: a rate is of the last half minute, the time left follows from
it, and neither is shown before there is one.
"""

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from forescale.console import span

_WINDOW = 30.0  # seconds that a rate is measured over


class Progress(Protocol):
    def __call__(
        self, phase: str, done: int, total: int | None, unit: str, *, tokens: int = 0
    ) -> None:
        """`phase` reads as a line of its own; `done` of `total` (None: unknown) in `unit`, "bytes"
        and "tokens" among them.

        tokens: made so far, where `unit` isn't tokens. A phase ends with done == total. Without a
        unit the phase is a sentence to be said at once. Called from one thread, up to some hundred
        times a second.
        """


def silent(phase: str, done: int, total: int | None, unit: str, *, tokens: int = 0) -> None:
    """The progress of callers that show none."""


def say(progress: Progress, sentence: str) -> None:
    """Have a sentence said among the phases."""
    progress(sentence, 0, 0, "")


class Meter:
    """Adds up what workers report of a phase: called with amounts since the last call."""

    def __init__(self, progress: Progress, phase: str, total: int, unit: str):
        self._progress, self._phase, self._total, self._unit = progress, phase, total, unit
        self._done = self._tokens = 0

    def __call__(self, amount: int, tokens: int) -> None:
        self._done += amount
        self._tokens += tokens
        if 0 < self._done < self._total:
            self._show()

    def end(self) -> None:
        self._done = self._total
        self._show()

    def _show(self) -> None:
        self._progress(self._phase, self._done, self._total, self._unit, tokens=self._tokens)


class Rates:
    """Amounts a second over the last half minute, at a phase's end over all of it."""

    def __init__(self, now: float):
        self._first = (now, 0, 0)
        self._seen = deque([self._first])

    def see(self, now: float, done: int, tokens: int) -> None:
        if now - self._seen[-1][0] < 0.2 and len(self._seen) > 1:
            self._seen.pop()  # a few samples a second are enough
        self._seen.append((now, done, tokens))
        while len(self._seen) > 2 and self._seen[1][0] <= now - _WINDOW:
            self._seen.popleft()

    def text(self, total: int | None, unit: str) -> str:
        """Such as "3.4 MB/s, 1,200,000 tokens/s, 12 s left"; nothing in the first second."""
        now, done, tokens = self._seen[-1]
        then, done0, tokens0 = self._first if done == total else self._seen[0]
        if (seconds := now - then) < 1:
            return ""
        rate = (done - done0) / seconds
        said = [f"{rate / 1e6:.1f} MB/s" if unit == "bytes" else f"{rate:,.0f} {unit}/s"]
        if tokens and unit != "tokens":
            said.append(f"{(tokens - tokens0) / seconds:,.0f} tokens/s")
        if rate and total and done < total:
            said.append(f"{span((total - done) / rate)} left")
        return ", ".join(said)


def amount(done: int, total: int | None, unit: str) -> str:
    """Such as "12.0 of 40.0 MB (30%)"."""
    is_large = unit == "bytes" and max(done, total or 0) >= 100_000
    said, of = (f"{n / 1e6:,.1f}" if is_large else f"{n:,}" for n in (done, total or 0))
    unit = "MB" if is_large else unit
    if total is None or done == total:
        return f"{said} {unit}"
    return f"{said} of {of} {unit} ({done / max(total, 1):.0%})"


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

    def __call__(
        self, phase: str, done: int, total: int | None, unit: str, *, tokens: int = 0
    ) -> None:
        now = time.monotonic()
        if not unit:
            print(phase, file=sys.stderr, flush=True)
            return
        if phase != self._phase:
            self._phase, self._began, self._said = phase, now, now
            self._rates = Rates(now)
        self._rates.see(now, done, tokens)
        if done == total or now - self._said >= self._every:
            self._said = now
            facts = [f"{now - self._began:.1f} s", self._rates.text(total, unit)]
            told = ", ".join(fact for fact in facts if fact)
            print(f"{phase}: {amount(done, total, unit)} ({told})", file=sys.stderr, flush=True)


def _live() -> Iterator[Progress]:
    from rich.console import Console
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
    with Bars(*columns, console=Console(stderr=True)) as bars:
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
