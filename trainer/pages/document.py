"""Pages: one HTML file with sections of charts, tables and sentences that opens without a network.

All pages share this file, `page.html.j2` (skeleton, tables, light and dark theme) and one script of
our own for charts, `chart.js`. The alternatives weigh more than they bring: plotly.js makes each
page 4.6 MB where chart.js makes it 15 kB, and the pages of runs would need as much script of their
own above it (medians, one zoom for all charts, what happened, hidden runs); pictures of matplotlib
alone say nothing about the point under the pointer.

Invariant: whatever a value says stands on the page as text (autoescape, textContent), and the page
may load nothing (its Content-Security-Policy), so that opening it sends nothing to anybody. Every
number of a table is there in full (<data value=>), however it is rounded.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jinja2
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape

from forescale.ground.console import table
from forescale.pages.figure import Figure

Cell = Markup | str
Picture = tuple[str, Figure | Markup | str, str]
_HERE = Path(__file__).parent
PAGE = _HERE / "page.html.j2"


@dataclass
class Section:
    """One section of a page.

    pictures: (name, figure, HTML or why there is none, caption); rows: the table; head: whether its
    first row is the header; key: labels and their colours; after: sentences below; absent: why the
    section is empty; rests: which runs its numbers come from, and how they count; columns: how
    those of a table with a header stand: "numbers" to the right; "words" to the left, and broken
    where they are long; "last" only the last one so; strong: its first value is set large.
    """

    name: str
    title: str
    pictures: list[Picture] = field(default_factory=list)
    rows: list[list[Cell]] = field(default_factory=list)
    head: bool = False
    key: Sequence[tuple[Cell, str]] = ()
    after: list[Cell] = field(default_factory=list)
    absent: str = ""
    rests: str = ""
    columns: Literal["numbers", "words", "last"] = "numbers"
    strong: bool = False

    def drawn(self) -> Iterator[tuple[Markup, str]]:
        """Yield each picture as HTML, or the sentence in its place, with its caption."""
        for name, picture, caption in self.pictures:
            if isinstance(picture, Markup):
                yield picture, caption
            elif isinstance(picture, str):
                yield Markup('<p class="absent">No figure: {}</p>').format(picture), ""
            else:
                yield (
                    Markup('<div class="chart" id="{0}" data-figure="{0}"></div>').format(name),
                    caption,
                )


@cache
def _templates(folder: Path) -> jinja2.Environment:
    """Return the templates of a folder, and the page that they extend, each compiled once."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader([folder, _HERE]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render(template: Path = PAGE, *, title: str, sections: Sequence[Section] = (),
           data: Mapping[str, Any] | None = None, scripts: Sequence[Path] = (),
           **values: Any) -> str:  # fmt: skip
    """Return a page as HTML. template: page.html.j2, or one that extends it; data: what the scripts
    read beside the figures; scripts: files that run after chart.js; values: what the template reads
    beside: intro, a sentence below the title; lead: smaller ones."""
    figures = {
        name: picture.as_dict()
        for section in sections
        for name, picture, _ in section.pictures
        if isinstance(picture, Figure)
    }
    code = "\n".join(path.read_text() for path in (_HERE / "chart.js", *scripts))
    text = json.dumps({"figures": figures, **(data or {})}, ensure_ascii=False, allow_nan=False,
                      separators=(",", ":"))  # fmt: skip
    for mark in "<>&\u2028\u2029":  # so that it can stand inside of a script element
        text = text.replace(mark, f"\\u{ord(mark):04x}")
    page = (
        _templates(template.parent)
        .get_template(template.name)
        .render(
            title=title,
            sections=sections,
            data=Markup(text),
            script=Markup(code),
            **{"intro": "", "lead": (), **values},
        )
    )
    return page.encode(errors="backslashreplace").decode()  # names of files that aren't UTF-8


def code(text: str) -> Markup:
    """Return text in the letters of a program."""
    return Markup("<code>{}</code>").format(text)


def number(value: float, digits: int = 5) -> Markup:
    """Return the number rounded for reading, with its full value for programs."""
    text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, power = text.split("e")
        text = f"{mantissa}×10<sup>{int(power)}</sup>"
    rounded = Markup(text.replace("-", "−"))
    return Markup('<data value="{}">{}</data>').format(repr(float(value)), rounded)


def whole(value: int) -> Markup:
    """Return a whole number with its thousands apart."""
    return Markup('<data value="{}">{}</data>').format(value, f"{value:,}")


def span(ends: Iterable[float], digits: int = 5) -> Markup:
    """Return `LOW to HIGH`."""
    return Markup("{} to {}").format(*(number(x, digits) for x in ends))


def percent(value: float, digits: int = 2, sign: str = "") -> Markup:
    """Return a fraction as a percentage, with its full value for programs."""
    return Markup('<data value="{}">{}</data>').format(
        repr(float(value)), f"{value:{sign}.{digits}%}".replace("-", "−")
    )


def show(console: Console, sections: Iterable[Section], *lines: Cell) -> None:
    """Print lines, and below them sections without their pictures, in the terminal."""
    for line in lines:
        console.print(escape(_plain(line)), soft_wrap=True)
    for section in sections:
        console.print(f"\n[bold]{escape(section.title)}[/]")
        if section.head and section.rows:
            head, *rest = ([escape(_plain(cell)) for cell in row] for row in section.rows)
            columns = table(*head, left=head[:1])
            for row in rest:
                columns.add_row(*row)
            console.print(columns)
        else:
            for label, value in section.rows:
                console.print(escape(f"{label}: {_plain(value)}".lstrip(": ")), soft_wrap=True)
        for line in (*filter(None, [section.absent]), *section.after):
            console.print(escape(_plain(line)), soft_wrap=True)


def _plain(cell: Cell) -> str:
    """Return a cell without HTML; powers of ten as 1.5e21, other powers as C^a."""
    if not isinstance(cell, Markup):
        return cell
    text = re.sub("<sup>(.*?)</sup>", r"^\1", re.sub("×10<sup>(.*?)</sup>", r"e\1", cell))
    return Markup(text).striptags().replace("−", "-")
