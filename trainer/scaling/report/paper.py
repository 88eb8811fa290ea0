"""The main pictures of a report as files for papers: PNG of 300 dpi and SVG, a column wide.

    a plotly figure of strokes -> axes, lines, bands, dots, error bars of matplotlib

Invariant: drawn from the page's own figures, so that neither can show what the other doesn't, in
the same colours; the same study makes the same bytes. Knows what strokes draw, and nothing else.
"""

import html
import math
import re
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import plotly.graph_objects as go
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FuncFormatter,
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from forescale.scaling.report.sections import Cell, Section
from forescale.scaling.report.style import FAINT, INK
from forescale.storage import write_file

MAIN = ("isoflop", "optimum", "envelope", "forecasts", "basin")  # sections
FORMATS = ("png", "svg")
_WIDTH, _HEIGHT = 3.4, 2.5  # inches: a column of two; of one panel
_DPI = 300
_POINTS = 0.6  # a pixel of the page, drawn at this width
_PIXELS = 100.0  # of the page an inch, where a picture's height is its number of rows
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 7.5,
    "axes.linewidth": 0.6, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#eceef0", "grid.linewidth": 0.6,
    "legend.fontsize": 7, "legend.frameon": False, "svg.hashsalt": "forescale",
}  # fmt: skip
_SHAPES = {"circle": "o", "diamond": "D", "square": "s", "triangle-up": "^", "x": "X", "star": "*"}
_DASHES = {"solid": "-", "dash": (0, (5, 2.5)), "dot": ":", "dashdot": "-."}
_LARGE = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def write_pictures(sections: Iterable[Section], folder: Path) -> list[Path]:
    """Of the MAIN sections that have any, as NAME.png and NAME.svg; the panels of one section stand
    below each other."""
    made = []
    for section in sections:
        panels = [p for _, p, _ in section.pictures if isinstance(p, go.Figure)]
        if section.name in MAIN and panels:
            for form, data in drawn(panels, section.key).items():
                path = folder / f"{section.name}.{form}"
                write_file(path, data)
                made.append(path)
    return made


def drawn(panels: Sequence[go.Figure], key: Sequence[tuple[Cell, str]] = ()) -> dict[str, bytes]:
    """By format. key: what which colour stands for, as HTML."""
    with matplotlib.rc_context(_STYLE):
        heights = [_height(p) for p in panels]
        rows = math.ceil(len(key) / 3)
        size = (_WIDTH, sum(heights) + 0.16 * rows)
        figure = Figure(size, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
        for axes, panel in zip(grid[:, 0], panels, strict=True):
            _panel(axes, panel)
        if key:
            style: dict[str, Any] = {"marker": "o", "linestyle": "", "markersize": 4}
            handles = [Line2D([], [], color=_colour(c), label=_text(t), **style) for t, c in key]
            figure.legend(handles=handles, loc="outside lower center", ncols=min(3, len(key)),
                          handletextpad=0.1, columnspacing=1.0)  # fmt: skip
        return {form: _saved(figure, form) for form in FORMATS}


def _saved(figure: Figure, form: str) -> bytes:
    into = BytesIO()
    moment = {"Date": None} if form == "svg" else None
    figure.savefig(into, format=form, dpi=_DPI, metadata=moment)
    return into.getvalue()


def _height(panel: go.Figure) -> float:
    """Inches. A picture of named rows is as high as the page's, in proportion."""
    rows = panel.layout.yaxis.ticktext
    return _HEIGHT if rows is None else max(1.6, 0.75 * panel.layout.height / _PIXELS)


def _panel(axes: Axes, panel: go.Figure) -> None:
    layout = panel.layout
    axes.set_xlabel(_text(layout.xaxis.title.text))
    if layout.yaxis.ticktext is None:
        axes.set_ylabel(_text(layout.title.text))
    else:  # beside names there is no room
        axes.set_title(_text(layout.title.text), loc="left", fontsize=7.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for order, trace in enumerate(panel.data):
        _trace(axes, trace, 2 + 0.01 * order)
    if layout.xaxis.zeroline:
        axes.axvline(0, color=FAINT, linewidth=0.8, zorder=1)
    if layout.yaxis.zeroline:
        axes.axhline(0, color=FAINT, linewidth=0.8, zorder=1)
    _scale(axes, "x", layout.xaxis)
    _scale(axes, "y", layout.yaxis)


def _trace(axes: Axes, trace: go.Scatter, order: float) -> None:
    x, y = np.array(trace.x, dtype=float), np.array(trace.y, dtype=float)
    if trace.fill == "toself":
        axes.fill(x, y, color=_colour(trace.fillcolor), linewidth=0, zorder=order)
    elif trace.mode == "lines":
        style = {"color": _colour(trace.line.color), "linewidth": _POINTS * trace.line.width}
        dash = _DASHES[trace.line.dash or "solid"]
        axes.plot(x, y, linestyle=dash, solid_capstyle="butt", zorder=order, **style)
    elif trace.mode == "markers":
        _markers(axes, trace, x, y, order)
    else:
        raise TypeError(f"{trace.type}, {trace.mode} is no stroke")


def _markers(axes: Axes, trace: go.Scatter, x: Any, y: Any, order: float) -> None:
    mark = trace.marker
    colours, edges = _each(mark.color, len(x)), _each(mark.line.color, len(x))
    if trace.error_y.array is not None:
        ends = [trace.error_y.arrayminus, trace.error_y.array]
        colour = _colour(trace.error_y.color)
        axes.errorbar(x, y, ends, fmt="none", color=colour, elinewidth=1.0, capsize=2, zorder=order)
    for i, symbol in enumerate(_each(mark.symbol, len(x))):
        shape, _, hollow = symbol.partition("-open")
        hollow = symbol.endswith("-open")
        face = "none" if hollow else _colour(colours[i])
        axes.plot(x[i], y[i], linestyle="", marker=_SHAPES[shape], markerfacecolor=face,
                  markeredgecolor=_colour(edges[i]), markersize=_POINTS * mark.size,
                  markeredgewidth=_POINTS * mark.line.width, zorder=order)  # fmt: skip


def _each(value: Any, count: int) -> list[Any]:
    return [value] * count if isinstance(value, str) else list(value)


def _scale(axes: Axes, which: str, told: Any) -> None:
    """The page's scale, range and ticks, for the width of a column."""
    axis, is_log = getattr(axes, f"{which}axis"), told.type == "log"
    getattr(axes, f"set_{which}scale")("log" if is_log else "linear")
    if told.range is not None:
        ends = [10.0**e if is_log else e for e in told.range]
        getattr(axes, f"set_{which}lim")(*ends)
    if told.tickvals is not None:
        axis.set_ticks(list(told.tickvals), [_text(word) for word in told.ticktext])
        axis.set_minor_locator(NullLocator())
    elif is_log:
        _logarithmic(axis, told)
    else:
        axis.set_major_locator(MaxNLocator(6))
    if told.showgrid is False:
        axis.grid(False)


def _logarithmic(axis: Any, told: Any) -> None:
    axis.set_minor_formatter(NullFormatter())
    if told.dtick is None:  # a narrow range, such as of losses
        axis.set_major_locator(MaxNLocator(6))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
        axis.set_minor_locator(NullLocator())
        return
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    steps = (1.0,) if decades > 2 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    powers = LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(99, 99))
    large = FuncFormatter(lambda value, _: _rounded(value))
    axis.set_major_formatter(powers if told.exponentformat == "power" else large)


def _rounded(value: float) -> str:
    for size, letter in _LARGE:
        if value >= size * (1 - 1e-9):
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _colour(text: str) -> str:
    """Of the web, #abcdef, rgb(1, 2, 3) or rgba(1, 2, 3, 0.4), as #rrggbbaa."""
    if not text.startswith("rgb"):
        return to_hex(text, keep_alpha=True)
    r, g, b, *a = (float(x) for x in re.findall(r"[\d.]+", text))
    return to_hex((r / 255, g / 255, b / 255, a[0] if a else 1.0), keep_alpha=True)


def _text(words: str | None) -> str:
    """HTML as matplotlib reads text: a dollar is one, powers are raised."""
    bare = re.sub(r"<(?!/?sup>)[^>]*>", "", words or "").replace("$", r"\$")
    raised = re.sub(r"<sup>(.*?)</sup>", r"$^{\1}$", bare)
    return html.unescape(raised.replace("−", "-"))
