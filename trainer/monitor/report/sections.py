"""The building blocks of a page: sections of pictures, tables and sentences; formatted numbers.

Invariant: every number of a table is there in full (<data value=>), however it is rounded.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from markupsafe import Markup

Cell = Markup | str


@dataclass
class Section:
    """One section of the page.

    pictures: (name, picture or why there is none, caption); rows: the table; head: whether its
    first row is the header; key: labels and their colours; after: sentences below; absent: why the
    section is empty; rests: which runs its numbers come from, and how they count; columns: how
    those of a table with a header stand: "numbers" to the right; "words" to the left, and broken
    where they are long; "last" only the last one so.
    """

    name: str
    title: str
    pictures: list[tuple[str, Any, str]] = field(default_factory=list)
    rows: list[list[Cell]] = field(default_factory=list)
    head: bool = False
    key: Sequence[tuple[Cell, str]] = ()
    after: list[Cell] = field(default_factory=list)
    absent: str = ""
    rests: str = ""
    columns: Literal["numbers", "words", "last"] = "numbers"

    def drawn(self) -> Iterator[tuple[Markup, str]]:
        """Yield each picture as HTML, or the sentence in its place, with its caption."""
        for name, picture, caption in self.pictures:
            if isinstance(picture, Markup):
                yield picture, caption
            elif isinstance(picture, str):
                yield Markup('<p class="absent">No figure: {}</p>').format(picture), ""
            else:
                yield self.html_of(name, picture), caption

    def html_of(self, name: str, picture: Any) -> Markup:
        """Return the HTML of a picture that isn't HTML; a room with such pictures says how."""
        raise TypeError(f"the picture {name} is a {type(picture).__name__}, not HTML")


def number(value: float, digits: int = 5) -> Markup:
    """Return the number rounded for reading, with its full value for programs."""
    text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, power = text.split("e")
        text = f"{mantissa}×10<sup>{int(power)}</sup>"
    shown = Markup(text.replace("-", "−"))
    return Markup('<data value="{}">{}</data>').format(repr(float(value)), shown)


def span(ends: Iterable[float], digits: int = 5) -> Markup:
    """Return `LOW to HIGH`."""
    return Markup("{} to {}").format(*(number(x, digits) for x in ends))


def percent(value: float, digits: int = 2, sign: str = "") -> Markup:
    """Return a fraction as a percentage, with its full value for programs."""
    return Markup('<data value="{}">{}</data>').format(
        repr(float(value)), f"{value:{sign}.{digits}%}".replace("-", "−")
    )
