"""The terminal: visible text, a console, tables without lines, time spans, progress.

Invariant: between `main` and a terminal, a control character that stands in the name or content of
a file is shown as text such as \\x1b. Only our own consoles move the cursor and choose colours.
Progress shows measured values only: a rate covers the last 30 seconds, the time left follows from
it.
"""

import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TextIO

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

_WIDEST = 10_000  # characters

# Control characters but tab and line ends, and bytes of names that aren't UTF-8 (surrogateescape).
_HIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]|\r(?!\n)")


def visible(text: str) -> str:
    """Return text with its control characters, and the bytes of a name that aren't UTF-8, as
    escapes such as \\x1b. Tabs and line ends stay."""

    def escaped(match: re.Match[str]) -> str:
        code = ord(match[0])
        if 0xDC80 <= code <= 0xDCFF:  # stands for this byte
            code -= 0xDC00
        return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"

    return _HIDDEN.sub(escaped, text)


class VisibleStream:
    """A text stream that shows control characters as text. It says that it is no terminal, so that
    libraries send it no colours; see `is_terminal`."""

    def __init__(self, stream: TextIO):
        self.rich_proxied_file = stream  # by this name, consoles of rich write beneath

    def write(self, text: str) -> int:
        return self.rich_proxied_file.write(visible(text))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.rich_proxied_file, name)


@contextmanager
def visible_output() -> Iterator[None]:
    """Show control characters as text on standard output and standard error, inside the block and,
    if an exception leaves it, until the process has shown that one."""
    was = sys.stdout, sys.stderr
    for name, stream in zip(("stdout", "stderr"), was, strict=True):
        if stream is not None and not isinstance(stream, VisibleStream):
            setattr(sys, name, VisibleStream(stream))
    yield
    sys.stdout, sys.stderr = was


def is_terminal(stream: TextIO | None) -> bool:
    """Return True if a stream ends at a terminal."""
    return stream is not None and getattr(stream, "rich_proxied_file", stream).isatty()


def unchanged_output() -> TextIO:
    """Return standard output for text that programs read: what goes to a file or a pipe is written
    byte for byte, what goes to a terminal is made visible."""
    beneath = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    return sys.stdout if is_terminal(sys.stdout) else beneath


class VisibleConsole(Console):
    """A console that shows control characters in its texts as text."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Return text as rich shows it; here, so that tables measure what they show."""
        return super().render_str(visible(text), **options)

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """Yield the segments of anything that rich can show."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def open_console(wide: int = 140, **options: Any) -> Console:
    """A console on standard output, without automatic colours for numbers and names. wide: columns
    where standard output is no terminal, and COLUMNS is not in the environment. options: arguments
    of rich's Console, such as stderr=True."""
    console = VisibleConsole(highlight=False, **options)
    if console.is_terminal or "COLUMNS" in os.environ or "width" in options:
        return console
    return VisibleConsole(highlight=False, width=wide, **options)


class BandedTable(Table):
    """A table without lines. One that is wider than the terminal is shown in bands of columns, each
    after the first columns, as many as tell the rows apart; so no number is cut."""

    def __init__(self) -> None:
        super().__init__(box=None, pad_edge=False, padding=(0, 2, 0, 0))

    def add(self, name: RenderableType, justify: JustifyMethod) -> None:
        """Add a column, whose texts are not broken into lines."""
        self.add_column(name, justify=justify, no_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = [[column.header, *column.cells] for column in self.columns]
        wide = options.update(width=_WIDEST)  # of which a text is measured as wide as it is
        widths = [max(Measurement.get(console, wide, x).maximum for x in c) + 2 for c in columns]
        rows = [*zip(*columns, strict=True)]
        names = [tuple(map(str, row)) for row in rows]
        counts = range(1, len(columns))
        keys = next((k for k in counts if len({n[:k] for n in names}) == len(rows)), 1)
        room = options.max_width + 2 - sum(widths[:keys])
        if sum(widths[keys:]) <= room or max(widths[keys:]) > room:
            yield from super().__rich_console__(console, options)
            return
        first = keys
        while first < len(columns):
            end = first + 1
            while end < len(columns) and sum(widths[first : end + 1]) <= room:
                end += 1
            band = BandedTable()
            for column in (*self.columns[:keys], *self.columns[first:end]):
                band.add(column.header, column.justify)
            for row in rows[1:]:
                band.add_row(*row[:keys], *row[first:end])
            if first > keys:
                yield ""
            yield band
            first = end


def table(*names: str, left: Collection[str] = ()) -> BandedTable:
    """A table with a column for each name, those in `left` left-aligned, the others
    right-aligned."""
    columns = BandedTable()
    for name in names:
        columns.add(name, "left" if name in left else "right")
    return columns


def span(seconds: float) -> str:
    """A length of time in the largest unit that fits twice: 0.52 s, 34 s, 2.5 min, 12 h, 9 d."""
    units = (("d", 86_400.0), ("h", 3600.0), ("min", 60.0))
    unit, size = next(((u, s) for u, s in units if seconds >= 2 * s), ("s", 1.0))
    number = seconds / size
    return f"{number:.2g} {unit}" if number < 10 else f"{number:,.0f} {unit}"


def plus_minus(stderr: float | None) -> str:
    """A standard error behind its number, " ± 0.0123"; empty where a single value has none."""
    return "" if stderr is None or math.isnan(stderr) else f" ± {stderr:.4f}"


_WINDOW = 30.0  # seconds that a rate is measured over
_LEAST = 3  # units from which a time left follows


class Progress(Protocol):
    """A callable that displays how far a phase is."""

    def __call__(
        self, phase: str, done: int, total: int | None, unit: str, *, tokens: int = 0
    ) -> None:
        """Show that `done` of `total` (None: unknown) of `phase` are done. phase: a label that can
        stand alone on a line; unit: such as "bytes" or "tokens". tokens: number made so far, if
        `unit` isn't tokens. A phase ends with done == total. Without a unit, `phase` is a sentence
        to print at once. Called from one thread, up to some hundred times a second."""


def silent(phase: str, done: int, total: int | None, unit: str, *, tokens: int = 0) -> None:
    pass


def log_line(progress: Progress, sentence: str) -> None:
    """Print a sentence between the phases."""
    progress(sentence, 0, 0, "")


class Meter:
    """Adds up what workers report about a phase; called with the amounts since the last call."""

    def __init__(self, progress: Progress, phase: str, total: int | None, unit: str):
        """total: of the phase, in `unit`; None: unknown."""
        self._progress, self._phase, self._total, self._unit = progress, phase, total, unit
        self.done = self._tokens = 0

    def __call__(self, amount: int, tokens: int) -> None:
        """Add an amount in the phase's unit, and a number of tokens."""
        self.done += amount
        self._tokens += tokens
        if 0 < self.done < (self._total or self.done + 1):
            self._show()

    def end(self) -> None:
        self._total = self.done = self.done if self._total is None else self._total
        self._show()

    def _show(self) -> None:
        self._progress(self._phase, self.done, self._total, self._unit, tokens=self._tokens)


class Rates:
    """Rates over the last 30 seconds; at a phase's end over the whole phase."""

    def __init__(self, now: float):
        """now: seconds of a monotonic clock."""
        self._first = (now, 0, 0)
        self._samples = deque([self._first])

    def see(self, now: float, done: int, tokens: int) -> None:
        """Record the amounts done so far."""
        if now - self._samples[-1][0] < 0.2 and len(self._samples) > 1:
            self._samples.pop()  # a few samples a second are enough
        self._samples.append((now, done, tokens))
        while len(self._samples) > 2 and self._samples[1][0] <= now - _WINDOW:
            self._samples.popleft()

    @property
    def per_second(self) -> float:
        """The amount of a second; 0 in the first one."""
        (now, done, _), (then, done0, _) = self._samples[-1], self._samples[0]
        return (done - done0) / (now - then) if now - then >= 1 else 0.0

    def text(self, total: int | None, unit: str) -> str:
        """Return such as "3.4 MB/s, 1,200,000 tokens/s, 12 s left"; "" in the first second."""
        now, done, tokens = self._samples[-1]
        then, done0, tokens0 = self._first if done == total else self._samples[0]
        if (seconds := now - then) < 1:
            return ""
        rate = (done - done0) / seconds
        digits = 0 if rate >= 10 else 1 if rate >= 1 else 2  # it is never shown as 0
        is_bytes = unit == "bytes"
        parts = [f"{rate / 1e6:.1f} MB/s" if is_bytes else f"{rate:,.{digits}f} {unit}/s"]
        if tokens and unit != "tokens":
            parts.append(f"{(tokens - tokens0) / seconds:,.0f} tokens/s")
        # One or two of a few large units say little about the time of the rest.
        if total and done < total and done - done0 >= _LEAST:
            parts.append(f"{span((total - done) / rate)} left")
        return ", ".join(parts)


def amount(done: int, total: int | None, unit: str) -> str:
    """Return such as "12.0 of 40.0 MB (30%)"."""
    is_large = unit == "bytes" and max(done, total or 0) >= 100_000
    number, whole = (f"{n / 1e6:,.1f}" if is_large else f"{n:,}" for n in (done, total or 0))
    unit = "MB" if is_large else unit
    if total is None or done == total:
        return f"{number} {unit}"
    return f"{number} of {whole} {unit} ({done / max(total, 1):.0%})"


@contextmanager
def progress_display(every: float = 10.0) -> Iterator[Progress]:
    """Yield a Progress: a live display on a terminal; elsewhere a line at each phase's end and
    `every` seconds."""
    if not is_terminal(sys.stderr):
        yield _Lines(every)
        return
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
            text, of_phase = amount(done, None, unit), rates[phase].text(total, unit)
            bars.update(tasks[phase], completed=done, total=total, amount=text, rates=of_phase)

        yield show


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
