"""The building blocks of a report: sections of figures, tables and sentences; formatted numbers.

Invariant: every number of a table is there in full (<data value=>), however it is rounded.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup
from plotly.io import to_html

from forescale.scaling.report.figures import Picture

Cell = Markup | str


@dataclass
class Section:
    """One section of the page.

    pictures: (name, figure or why there is none, caption); rows: the table; head: whether its first
    row is the header; key: labels and their colours; after: sentences below; absent: why the
    section is empty; rests: which runs its numbers come from, and how they count.
    """

    name: str
    title: str
    pictures: list[tuple[str, Picture, str]] = field(default_factory=list)
    rows: list[list[Cell]] = field(default_factory=list)
    head: bool = False
    key: Sequence[tuple[Cell, str]] = ()
    after: list[Cell] = field(default_factory=list)
    absent: str = ""
    rests: str = ""

    def drawn(self) -> Iterator[tuple[Markup, str]]:
        """Yield each figure as HTML, or the sentence in its place, with its caption."""
        for name, picture, caption in self.pictures:
            if isinstance(picture, str):
                yield Markup('<p class="absent">No figure: {}</p>').format(picture), ""
            else:
                yield _html(name, picture), caption


def _html(name: str, picture: Picture) -> Markup:
    save = {"format": "svg", "filename": name}
    config = {"displaylogo": False, "responsive": True, "toImageButtonOptions": save}
    made = to_html(picture, config, include_plotlyjs=False, full_html=False, div_id=name)
    return Markup(made)


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


def flops_key(shades: dict[float, str]) -> list[tuple[Cell, str]]:
    """Return the label and colour of each budget."""
    return [(number(budget, 3) + " FLOPs" * (i == 0), c)
            for i, (budget, c) in enumerate(shades.items())]  # fmt: skip
