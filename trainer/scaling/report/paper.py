"""The main figures of a report as files for papers: PNG with 300 dpi and SVG, one column wide.

    the traces of a plotly figure (style.py) -> matplotlib's lines, bands, dots, error bars

Invariant: they are drawn from the page's own figures, in the same colours, so that both show the
same. The same study gives the same bytes. This file knows the traces of style.py and nothing else.
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
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import (
    FuncFormatter,
    LogFormatterSciNotation,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
)

from forescale.monitor.report.colours import FAINT, INK
from forescale.monitor.report.sections import Cell
from forescale.scaling.report.sections import Section
from forescale.storage import write_file

MAIN = ("isoflop", "optimum", "envelope", "task", "forecasts", "response")  # sections
FORMATS = ("png", "svg")
_WIDTH, _HEIGHT = 3.4, 2.5  # inches: one of two columns; height of a panel
_DPI = 300
_LETTERS, _MARK = 60, 5  # of the font in a line of a key; as wide as a mark and its gap
_POINTS = 0.6  # points per pixel of the page
_PIXELS = 100.0  # of the page, per inch, for figures whose height is their number of rows
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 7.5,
    "axes.linewidth": 0.6, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "axes.grid": True, "axes.axisbelow": True, "grid.color": "#eceef0", "grid.linewidth": 0.6,
    "legend.fontsize": 7, "legend.frameon": False, "svg.hashsalt": "forescale",
}  # fmt: skip
_SHAPES = {"circle": "o", "diamond": "D", "square": "s", "triangle-up": "^", "x": "X", "star": "*"}
_DASHES: dict[str, Any] = {"solid": "-", "dash": (0, (5, 2.5)), "dot": ":", "dashdot": "-."}
_LARGE = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def write_pictures(sections: Iterable[Section], folder: Path) -> list[Path]:
    """Write the figures of the MAIN sections as NAME.png and NAME.svg, and return their paths. The
    figures of one section are drawn below each other."""
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
    """Return the drawn panels by format. key: labels (HTML) and their colours."""
    with matplotlib.rc_context(_STYLE):
        heights = [_height(p) for p in panels]
        handles = [*_key(key), *_marked(panels).values()]
        columns = _columns([str(h.get_label()) for h in handles])
        rows = math.ceil(len(handles) / columns)
        size = (_WIDTH, sum(heights) + 0.16 * rows)
        figure = Figure(size, layout="constrained")
        FigureCanvasAgg(figure)
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
        for axes, panel in zip(grid[:, 0], panels, strict=True):
            _panel(axes, panel)
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=columns,
                          handletextpad=0.4, columnspacing=1.0)  # fmt: skip
        return {form: _saved(figure, form) for form in FORMATS}


def _columns(labels: Sequence[str]) -> int:
    """Return how many columns of entries fit below a figure: three at most, and one for names as
    long as those of several recipes at once."""
    longest = max(map(len, labels), default=0) + _MARK
    return max(1, min(3, len(labels), _LETTERS // longest))


def _key(key: Sequence[tuple[Cell, str]]) -> list[Line2D]:
    """The entries of the colours."""
    style: dict[str, Any] = {"marker": "o", "linestyle": "", "markersize": 4}
    return [Line2D([], [], color=_colour(c), label=_text(t), **style) for t, c in key]


def _marked(panels: Sequence[go.Figure]) -> dict[str, Artist]:
    """An entry for each name of a trace: lines, bands, diamonds, the star."""
    found = dict[str, Artist]()
    traces = [trace for panel in panels for trace in panel.data]
    if any(str(s).endswith("-open") for t in traces for s in _each(t.marker.symbol or "", 1)):
        hollow: dict[str, Any] = {
            "marker": "o",
            "markerfacecolor": "none",
            "markeredgecolor": INK,
            "markersize": 4,
        }
        found["not used"] = Line2D([], [], linestyle="", label="not used", **hollow)
    for trace in (trace for trace in traces if trace.name):
        if trace.fill == "toself":
            colour = _colour(trace.fillcolor)
            found[trace.name] = Patch(facecolor=colour, linewidth=0, label=trace.name)
        elif trace.mode == "lines":
            style: dict[str, Any] = {
                "color": _colour(trace.line.color),
                "linewidth": _POINTS * trace.line.width,
            }
            dash = _DASHES[trace.line.dash or "solid"]
            found[trace.name] = Line2D([], [], label=trace.name, linestyle=dash, **style)
        else:
            mark = trace.marker
            found[trace.name] = Line2D(
                [], [], linestyle="", marker=_SHAPES[mark.symbol], label=trace.name,
                markerfacecolor=_colour(mark.color), markeredgecolor=_colour(mark.line.color),
                markersize=_POINTS * mark.size, markeredgewidth=_POINTS * mark.line.width,
            )  # fmt: skip
    return found


def _saved(figure: Figure, form: str) -> bytes:
    into = BytesIO()
    moment = {"Date": None} if form == "svg" else None
    figure.savefig(into, format=form, dpi=_DPI, metadata=moment)
    return into.getvalue()


def _height(panel: go.Figure) -> float:
    """Inches. The height of a figure with named rows is proportional to the page's."""
    rows = panel.layout.yaxis.ticktext
    return _HEIGHT if rows is None else max(1.6, 0.75 * panel.layout.height / _PIXELS)


def _panel(axes: Axes, panel: go.Figure) -> None:
    layout = panel.layout
    axes.set_xlabel(_text(layout.xaxis.title.text))
    if layout.yaxis.ticktext is None:
        axes.set_ylabel(_text(layout.title.text))
    else:  # no room beside the names
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
        raise TypeError(f"a trace of {trace.type}, {trace.mode} can't be drawn for papers")


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


def _scale(axes: Axes, which: str, given: Any) -> None:
    """Set the page's scale, range and ticks, for the width of a column."""
    axis, is_log = getattr(axes, f"{which}axis"), given.type == "log"
    getattr(axes, f"set_{which}scale")("log" if is_log else "linear")
    if given.range is not None:
        ends = [10.0**e if is_log else e for e in given.range]
        getattr(axes, f"set_{which}lim")(*ends)
    if given.tickvals is not None:
        axis.set_ticks(list(given.tickvals), [_text(label) for label in given.ticktext])
        axis.set_minor_locator(NullLocator())
    elif is_log:
        _logarithmic(axis, given)
    else:
        axis.set_major_locator(MaxNLocator(6))
    if given.showgrid is False:
        axis.grid(False)


def _logarithmic(axis: Any, given: Any) -> None:
    axis.set_minor_formatter(NullFormatter())
    if given.dtick is None:  # a narrow range, such as of losses
        axis.set_major_locator(MaxNLocator(6))
        axis.set_major_formatter(FuncFormatter(lambda value, _: _rounded(value)))
        axis.set_minor_locator(NullLocator())
        return
    low, high = axis.get_view_interval()
    decades = math.log10(high / low)
    steps = (1.0,) if decades > 2 else (1.0, 2.0, 5.0)
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    powers = LogFormatterSciNotation(labelOnlyBase=False, minor_thresholds=(99, 99))
    large = FuncFormatter(lambda value, _: _rounded(value))
    axis.set_major_formatter(powers if given.exponentformat == "power" else large)


def _rounded(value: float) -> str:
    for size, letter in _LARGE:
        if value >= size * (1 - 1e-9):
            return f"{value / size:.4g}{letter}"
    return f"{value:.4g}"


def _colour(text: str) -> str:
    """Convert #abcdef, rgb(1, 2, 3) or rgba(1, 2, 3, 0.4) to #rrggbbaa."""
    if not text.startswith("rgb"):
        return to_hex(text, keep_alpha=True)
    r, g, b, *a = (float(x) for x in re.findall(r"[\d.]+", text))
    return to_hex((r / 255, g / 255, b / 255, a[0] if a else 1.0), keep_alpha=True)


def _text(text: str | None) -> str:
    """Convert HTML to matplotlib's text: dollars escaped, powers raised."""
    bare = re.sub(r"<(?!/?sup>)[^>]*>", "", text or "").replace("$", r"\$")
    raised = re.sub(r"<sup>(.*?)</sup>", r"$^{\1}$", bare)
    return html.unescape(raised.replace("−", "-"))
