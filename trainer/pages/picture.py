"""Figures as pictures for papers and READMEs: PNG with 300 dpi, and SVG.

Invariant: a picture shows the figure of the page, in the same colours. The same figure gives the
same bytes. This file alone imports matplotlib.
"""

import html
import math
import re
from collections.abc import Sequence
from io import BytesIO
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure as Canvas
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import (
    FuncFormatter,
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
)

from forescale.ground.console import visible
from forescale.pages.document import Cell
from forescale.pages.figure import FAINT, GRID, INK, Axis, Figure, Trace

FORMATS = ("png", "svg")
COLUMN = (3.4, 2.5)  # inches: one of two columns; the height of a figure
_DPI = 300
_LETTERS, _MARK = 17.6, 5  # of the font in an inch of a key; as wide as a mark and its gap
_POINTS = 0.6  # points of a pixel of the page
_PIXELS = 100.0  # of the page, per inch, for figures whose height is their number of rows
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 7.5,
    "axes.linewidth": 0.6, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "grid.linewidth": 0.6,
    "legend.fontsize": 7, "legend.frameon": False, "svg.hashsalt": "forescale",
}  # fmt: skip
_SHAPES = {"circle": "o", "diamond": "D", "square": "s", "triangle": "^", "cross": "X", "star": "*"}
_DASHES: dict[str, Any] = {"": "-", "dash": (0, (5, 2.5)), "dot": ":", "dashdot": "-."}
_LARGE = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def pictures(
    figures: Sequence[Figure],
    key: Sequence[tuple[Cell, str]] = (),
    size: tuple[float, float] = COLUMN,
    forms: Sequence[str] = FORMATS,
) -> dict[str, bytes]:
    """Return figures, drawn below each other, by format. key: labels and their colours; size:
    inches, the width of the picture and the height of a figure."""
    with matplotlib.rc_context(_STYLE):
        # With a row for each label, heights are proportional to the page's.
        heights = [size[1] if figure.y.ticks is None else max(1.6, 0.75 * figure.height / _PIXELS)
                   for figure in figures]  # fmt: skip
        handles: list[Artist] = [
            Line2D([], [], color=colour, label=_text(label), marker="o", linestyle="", markersize=4)
            for label, colour in key
        ]
        handles += _names(figures).values()
        longest = max((len(str(handle.get_label())) for handle in handles), default=0) + _MARK
        most = min(3 if size[0] == COLUMN[0] else 6, len(handles))
        columns = max(1, min(most, int(size[0] * _LETTERS) // longest))
        rows = math.ceil(len(handles) / columns)
        canvas = Canvas((size[0], sum(heights) + 0.16 * rows), layout="constrained")
        FigureCanvasAgg(canvas)
        grid = canvas.subplots(len(figures), 1, squeeze=False, height_ratios=heights)
        for axes, figure in zip(grid[:, 0], figures, strict=True):
            _draw(axes, figure)
        if handles:
            canvas.legend(handles=handles, loc="outside lower center", ncols=columns,
                          handletextpad=0.4, columnspacing=1.0)  # fmt: skip
        images = {form: BytesIO() for form in forms}
        for form, image in images.items():
            metadata = {"Date": None} if form == "svg" else None
            canvas.savefig(image, format=form, dpi=_DPI, metadata=metadata)
        return {form: image.getvalue() for form, image in images.items()}


def _names(figures: Sequence[Figure]) -> dict[str, Artist]:
    """Return an entry for each name of a trace, and one for hollow dots."""
    entries = dict[str, Artist]()
    traces = [trace for figure in figures for trace in figure.traces]
    if any(any(trace.hollow) for trace in traces):
        entries["not used"] = Line2D(
            [], [], linestyle="", label="not used", marker="o", markerfacecolor="none",
            markeredgecolor=INK, markersize=4,
        )  # fmt: skip
    for trace in (trace for trace in traces if trace.name and trace.name not in entries):
        label, colour = _text(trace.name), trace.colours[0]
        if trace.kind in ("band", "bars"):
            entries[trace.name] = Patch(facecolor=colour, linewidth=0, label=label)
        elif trace.kind == "line":
            entries[trace.name] = Line2D([], [], label=label, **_line(trace))
        else:
            shape = trace.shapes[0]
            entries[trace.name] = Line2D([], [], label=label, **_dot(trace, shape, colour, False))
    return entries


def _draw(axes: Axes, figure: Figure) -> None:
    axes.set_xlabel(_text(figure.x.title))
    if figure.y.ticks is None:
        axes.set_ylabel(_text(figure.y.title))
    else:  # no room beside the names
        axes.set_title(_text(figure.y.title), loc="left", fontsize=7.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for number, trace in enumerate(figure.traces):
        colour, order = trace.colours[0], 2 + 0.01 * number
        if trace.kind == "line":
            axes.plot(trace.x, trace.y, solid_capstyle="butt", zorder=order, **_line(trace))
        elif trace.kind == "dots":
            _dots(axes, trace, order)
        elif trace.kind == "band":
            assert trace.high is not None
            axes.fill_between(trace.x, trace.y, trace.high, color=colour, linewidth=0, zorder=order)
        else:
            assert trace.high is not None
            axes.barh(trace.y, trace.high - trace.x, 0.65, trace.x, color=colour, zorder=order)
    if figure.x.zero:
        axes.axvline(0, color=FAINT, linewidth=0.8, zorder=1)
    if figure.y.zero:
        axes.axhline(0, color=FAINT, linewidth=0.8, zorder=1)
    _scale(axes, "x", figure.x, figure.ends("x"))
    _scale(axes, "y", figure.y, figure.ends("y"))


def _line(trace: Trace) -> dict[str, Any]:
    dash, width = _DASHES[trace.dash], _POINTS * trace.width
    return {"color": trace.colours[0], "linewidth": width, "linestyle": dash}


def _dot(trace: Trace, shape: str, colour: str, hollow: bool) -> dict[str, Any]:
    return {
        "linestyle": "", "marker": _SHAPES[shape], "markersize": _POINTS * trace.size,
        "markerfacecolor": "none" if hollow else colour, "markeredgecolor": trace.edge or colour,
        "markeredgewidth": _POINTS * trace.width if trace.width else 0,
    }  # fmt: skip


def _dots(axes: Axes, trace: Trace, order: float) -> None:
    """Draw dots, all of one look at once."""
    if trace.ends is not None:
        y = float(trace.y[0])
        ends = [[y - trace.ends[0]], [trace.ends[1] - y]]
        axes.errorbar(trace.x[:1], [y], ends, fmt="none", color=trace.colours[0], elinewidth=1.0,
                      capsize=2, zorder=order)  # fmt: skip
    looks: dict[tuple[str, str, bool], list[int]] = {}
    for i in range(len(trace.x)):
        shape, colour = _at(trace.shapes, i, "circle"), _at(trace.colours, i, INK)
        looks.setdefault((shape, colour, _at(trace.hollow, i, False)), []).append(i)
    for (shape, colour, hollow), rows in looks.items():
        look_of = _dot(trace, shape, colour, hollow)
        axes.plot(trace.x[rows], trace.y[rows], zorder=order, **look_of)


def _at(values: Sequence[Any], i: int, default: Any) -> Any:
    """Return the value of point i, of a list with one value for each point or for all."""
    return values[i if len(values) > 1 else 0] if values else default


def _scale(axes: Axes, side: str, axis: Axis, ends: tuple[float, float]) -> None:
    """Set the scale, the range and the ticks of an axis."""
    ruler: Any = getattr(axes, f"{side}axis")
    getattr(axes, f"set_{side}scale")("log" if axis.log else "linear")
    getattr(axes, f"set_{side}lim")(*ends)
    if axis.ticks is not None:
        values, texts = zip(*axis.ticks, strict=True)
        ruler.set_ticks(values, [_text(text) for text in texts])
        ruler.set_minor_locator(NullLocator())
    elif axis.log:
        _logarithmic(ruler, axis.power, max(ends) / min(ends))
    else:
        ruler.set_major_locator(MaxNLocator(6))
        plain = FuncFormatter(_power if axis.power else _short)
        ruler.set_major_formatter(PercentFormatter(1.0, 0) if axis.percent else plain)
    if not axis.grid:
        ruler.grid(False)


def _logarithmic(ruler: Any, power: bool, ratio: float) -> None:
    ruler.set_minor_formatter(NullFormatter())
    ruler.set_major_formatter(FuncFormatter(_short))
    if ratio < 5 and not power:  # such as of losses: 1, 2 and 5 may all lie outside
        ruler.set_major_locator(MaxNLocator(6))
        ruler.set_minor_locator(NullLocator())
        return
    steps = (1.0,) if ratio > 100 else (1.0, 2.0, 5.0)
    ruler.set_major_locator(LogLocator(subs=steps, numticks=12))
    if power:
        powers = LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(99, 99))
        ruler.set_major_formatter(powers)


def _short(value: float, _: object = None) -> str:
    for size, letter in _LARGE:
        if abs(value) >= size * (1 - 1e-9):
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _power(value: float, _: object = None) -> str:
    mantissa, power = f"{value:.3g}".partition("e")[::2] if value else ("0", "")
    head = "" if mantissa == "1" else rf"{mantissa} \times "
    return f"${head}10^{{{int(power)}}}$" if power else mantissa


def _text(text: Cell) -> str:
    """Return a text for matplotlib: dollars are escaped, HTML is text with powers raised."""
    if not isinstance(text, Markup):
        return visible(text).replace("$", r"\$")
    bare = re.sub(r"<(?!/?sup>)[^>]*>", "", text).replace("$", r"\$")
    raised = re.sub(r"<sup>(.*?)</sup>", r"$^{\1}$", bare)
    return html.unescape(raised.replace("−", "-"))
