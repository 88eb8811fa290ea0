"""What a report's page is made of: sections of pictures, tables and sentences, and numbers in them.

Invariant: every number of a table stands there in full (<data value=>), however it is rounded.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup
from plotly.io import to_html

from forescale.scaling.report.figures import Picture

Cell = Markup | str


@dataclass
class Section:
    """pictures: (name, picture or why there is none, caption); rows: of a table, the first its head
    where `head` says so; key: what which colour stands for; after: sentences; absent: why there is
    nothing; rests: which runs its numbers are from, and how they count."""

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
        """Each picture as HTML, or the sentence in its place, and its caption."""
        for name, picture, caption in self.pictures:
            if isinstance(picture, str):
                yield Markup('<p class="absent">Not drawn: {}</p>').format(picture), ""
            else:
                yield _html(name, picture), caption


def _html(name: str, picture: Picture) -> Markup:
    save = {"format": "svg", "filename": name}
    config = {"displaylogo": False, "responsive": True, "toImageButtonOptions": save}
    made = to_html(picture, config, include_plotlyjs=False, full_html=False, div_id=name)
    return Markup(made)


def number(value: float, digits: int = 5) -> Markup:
    """Rounded for the eye, whole for programs."""
    text = f"{value:.{digits}g}"
    if "e" in text:
        mantissa, power = text.split("e")
        text = f"{mantissa}×10<sup>{int(power)}</sup>"
    shown = Markup(text.replace("-", "−"))
    return Markup('<data value="{}">{}</data>').format(repr(float(value)), shown)


def span(ends: Iterable[float], digits: int = 5) -> Markup:
    return Markup("{} to {}").format(*(number(x, digits) for x in ends))


def percent(value: float, digits: int = 2, sign: str = "") -> Markup:
    return Markup('<data value="{}">{}</data>').format(
        repr(float(value)), f"{value:{sign}.{digits}%}".replace("-", "−")
    )


def flops_key(shades: dict[float, str]) -> list[tuple[Cell, str]]:
    """What the colours of budgets stand for."""
    return [(number(budget, 3) + " FLOPs" * (i == 0), c)
            for i, (budget, c) in enumerate(shades.items())]  # fmt: skip
