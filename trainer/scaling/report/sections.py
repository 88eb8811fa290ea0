"""The sections of a study's report: those of every page, with plotly's pictures.

Invariant: every number of a table is there in full (<data value=>), however it is rounded.
"""

from dataclasses import dataclass

from markupsafe import Markup
from plotly.io import to_html

from forescale.monitor.report import sections
from forescale.monitor.report.sections import Cell, number
from forescale.scaling.report.figures import Picture


@dataclass
class Section(sections.Section):
    """One section of the page; its pictures are plotly figures, or why there is none."""

    def html_of(self, name: str, picture: Picture) -> Markup:
        """Return the HTML of a figure, without plotly itself."""
        save = {"format": "svg", "filename": name}
        config = {"displaylogo": False, "responsive": True, "toImageButtonOptions": save}
        return Markup(
            to_html(picture, config, include_plotlyjs=False, full_html=False, div_id=name)
        )


def flops_key(shades: dict[float, str]) -> list[tuple[Cell, str]]:
    """Return the label and colour of each budget."""
    return [(number(budget, 3) + " FLOPs" * (i == 0), c)
            for i, (budget, c) in enumerate(shades.items())]  # fmt: skip
