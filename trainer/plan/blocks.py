"""A table of facts for the terminal, for a page and for programs alike.

    row     a key in the JSON, a label, a value, its unit, and a text for people
    block   rows below one title; a row of a table has a value and a text for each of its columns

Invariant: this file only formats numbers; values are not rounded.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from forescale.ground.console import span, table

if TYPE_CHECKING:
    from forescale.pages.document import Section


@dataclass(frozen=True)
class Row:
    """One fact of a plan. key: its path in the JSON, "" if people alone read it; label: "" if
    programs alone read it; unit: of all values of a row, or of each; text: a sentence with the
    value, "" for the value in its unit."""

    key: str
    label: str
    value: Any = None
    unit: str | Sequence[str] = ""
    text: str = ""

    @property
    def texts(self) -> list[str]:
        """The text, or one for each value of a table."""
        if self.text:
            return [self.text]
        units = [self.unit] * len(self.value) if isinstance(self.unit, str) else self.unit
        return [in_unit(*each) for each in zip(self.value, units, strict=True)]


@dataclass(frozen=True)
class Block:
    """Rows below one title. columns: of a table; path: of the table in the JSON; chosen: the column
    of the job itself; after: sentences below."""

    title: str
    rows: Sequence[Row]
    columns: Sequence[str] = ()
    path: str = ""
    chosen: int = -1
    after: Sequence[str] = ()


def print_blocks(console: Console, blocks: Iterable[Block]) -> None:
    """Print the rows that people read."""
    for block in blocks:
        rows = [row for row in block.rows if row.label]
        if block.columns or block.title == "Time":
            console.print()
        if block.columns and rows:
            grid = table(block.title, *block.columns, left=[block.title])
            grid.columns[1 + block.chosen].style = "bold" if block.chosen >= 0 else ""
            for row in rows:
                texts = ["[red]no[/]" if text == "no" else text for text in row.texts]
                grid.add_row(row.label, *texts)
            console.print(grid)
        for n, row in enumerate(() if block.columns else rows):
            head = block.title if n == 0 else ""
            console.print(f"{head:<6} {escape(row.text)}", soft_wrap=True)
        for line in block.after:
            console.print(escape(line), soft_wrap=True)


def sections_of(blocks: Iterable[Block]) -> "list[Section]":
    """Return the same as sections of a page."""
    from forescale.pages.document import Section  # with numpy, which is slow

    sections = []
    for block in blocks:
        rows = [[row.label, *row.texts] for row in block.rows if row.label]
        head = [[block.title, *block.columns]] if block.columns and rows else []
        name = block.title.split()[0].lower() if block.title else ""
        if rows or block.after:
            sections.append(Section(name, block.title, rows=head + rows, head=bool(head),
                                    after=[*block.after]))  # fmt: skip
    return sections


def put_values(facts: dict[str, Any], blocks: Iterable[Block]) -> dict[str, Any]:
    """Return the facts, with the values that have a key; bytes and seconds are not rounded."""
    for block in blocks:
        for row in (row for row in block.rows if row.key):
            if not block.path:
                _put(facts, row.key, row.value)
            for column, value in zip(block.columns, row.value if block.path else (), strict=True):
                name = column.split()[0].replace(",", "")
                _put(facts, f"{block.path}.{name}.{row.key}", value)
    return facts


def _put(facts: dict[str, Any], path: str, value: Any) -> None:
    *folders, name = path.split(".")
    for folder in folders:
        facts = facts.setdefault(folder, {})
    facts[name] = None if isinstance(value, float) and abs(value) == float("inf") else value


def in_unit(value: Any, unit: str) -> str:
    if unit in ("GiB", "MiB"):
        number = value / (2**30 if unit == "GiB" else 2**20)
        return f"{number:,.2f}" if number < 100 else f"{number:,.0f}"
    if unit == "GB":
        return f"{value / 1e9:,.3g}" if value < 1e9 else f"{value / 1e9:,.1f}"
    if unit == "time":
        return span(value)
    if unit == "yes or no":
        return "yes" if value else "no"
    if unit == "or none":
        return str(value or "none")
    forms = {"": "", "count": ",", "s": ",.3f", "%": ".1%", "per second": ",.0f",
             "hours": ",.1f", "price": ",.2f"}  # fmt: skip
    return f"{value if unit == '' else value or 0:{forms[unit]}}"


def bytes_text(number: float) -> str:
    units = zip("TGMk", (1e12, 1e9, 1e6, 1e3), strict=True)
    return _scaled(number, units) + ("B" if number >= 1e3 else "bytes")


def short(number: float) -> str:
    return _scaled(number, (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)), digits=4).rstrip()


def flops_text(number: float) -> str:
    return f"{_scaled(number, zip('ZEPTGM', (1e21, 1e18, 1e15, 1e12, 1e9, 1e6), strict=True))}FLOP"


def _scaled(number: float, units: Iterable[tuple[str, float]], digits: int = 3) -> str:
    """Return a number in the largest unit that it reaches; a smaller one has a space and no
    unit."""
    unit, size = next(((u, s) for u, s in units if number >= s), ("", 0.0))
    return f"{number / size:.{digits}g} {unit}" if size else f"{number:,.0f} "
