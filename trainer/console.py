"""The terminal, as all pages use it: visible text, a console, tables without lines, time spans.

Invariant: between `main` and a terminal, a control character that stands in the name or content of
a file is shown as text such as \\x1b. Only our own consoles move the cursor and choose colours.
"""

import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

# Control characters but tab and line ends, and bytes of names that aren't UTF-8 (surrogateescape).
_HIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]|\r(?!\n)")


def visible(text: str) -> str:
    """Return text with its control characters, and the bytes of a name that aren't UTF-8, as
    escapes such as \\x1b. Tabs and line ends stay."""
    return _HIDDEN.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:  # stands for this byte
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


class VisibleStream:
    """A text stream that shows control characters as text. It says that it is no terminal, so that
    libraries send it no colours; see `is_terminal`."""

    def __init__(self, stream: TextIO):
        self.rich_proxied_file = stream  # by this name, consoles of rich write beneath

    def write(self, text: str) -> int:
        """Write text, made visible."""
        return self.rich_proxied_file.write(visible(text))

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each of `lines`."""
        for line in lines:
            self.write(line)

    def isatty(self) -> bool:
        """False."""
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
    return (
        sys.stdout
        if is_terminal(sys.stdout)
        else getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    )


class VisibleConsole(Console):
    """A console that shows control characters in its texts as text."""

    def render_str(self, text: str, **more: Any) -> Text:
        """Return text as rich shows it; here, so that tables measure what they show."""
        return super().render_str(visible(text), **more)

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        """Yield the segments of anything that rich can show."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text))


def open_console(wide: int = 140, **more: Any) -> Console:
    """A console on standard output, without automatic colours for numbers and names.

    wide: columns where standard output is no terminal, and COLUMNS is not in the environment. more:
    arguments of rich's Console, such as stderr=True.
    """
    console = VisibleConsole(highlight=False, **more)
    if console.is_terminal or "COLUMNS" in os.environ or "width" in more:
        return console
    return VisibleConsole(highlight=False, width=wide, **more)


def table(*names: str, left: Collection[str] = ()) -> Table:
    """A table without lines: a column for each name, those in `left` left-aligned, the others
    right-aligned."""
    made = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        made.add_column(name, justify="left" if name in left else "right", no_wrap=True)
    return made


def span(seconds: float) -> str:
    """A length of time in the largest unit that fits twice: 0.52 s, 34 s, 2.5 min, 12 h, 9 d."""
    units = (("d", 86_400.0), ("h", 3600.0), ("min", 60.0))
    unit, size = next((found for found in units if seconds >= 2 * found[1]), ("s", 1.0))
    number = seconds / size
    return f"{number:.2g} {unit}" if number < 10 else f"{number:,.0f} {unit}"
