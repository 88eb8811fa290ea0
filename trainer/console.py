"""The terminal, as all pages use it: a console, tables without lines, and time spans as text."""

import os
from collections.abc import Collection

from rich.console import Console
from rich.table import Table


def open_console(wide: int = 140) -> Console:
    """A console on standard output, without automatic colours for numbers and names.

    wide: columns where standard output is no terminal, and COLUMNS is not in the environment.
    """
    console = Console(highlight=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(highlight=False, width=wide)


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
