"""The elements of all figures: axes, lines, bands, dots, in one style.

Invariant: no figure needs more than 320 pixels of width; so no legend, and no axis title at its
side.
"""

import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.colors import sample_colorscale

from forescale.monitor.report.colours import FAINT, FONT, GRID, INK, TARGET
from forescale.scaling.fitting.points import Array

BAND, OTHER_BAND = "rgba(31,35,40,0.14)", "rgba(33,110,160,0.18)"
WIDE, NARROW = "rgba(194,65,12,0.10)", "rgba(194,65,12,0.16)"
_DARK, _LIGHT = 0.0, 0.86  # ends of the colour scale; lighter is invisible on white
_ROOM = 0.06  # log loss that an axis shows at least above the highest minimum of a budget
_DECADES = 2.0  # an axis with more decades has numbers at powers of ten only
_NARROW = 5.0  # an axis of less than this ratio may have one number of 1, 2, 5, 10 ... or none
_LINE = 34  # characters per line of hover text, so that it fits a phone


def axes(x: str, y: str, of_x: dict[str, Any], of_y: dict[str, Any], height: int = 430):
    """Return an empty figure. x, y: titles with units; of_x, of_y: more settings of the axes."""
    plain = {
        "gridcolor": GRID, "linecolor": FAINT, "zeroline": False, "ticks": "outside",
        "tickcolor": FAINT, "automargin": True, "showline": True, "ticklen": 4,
    }  # fmt: skip
    figure = go.Figure()
    figure.update_layout(
        template="none", height=height, showlegend=False, dragmode=False, hovermode="closest",
        font={"family": FONT, "size": 12, "color": INK},
        margin={"l": 44, "r": 14, "t": 34, "b": 48},
        hoverlabel={"align": "left", "bgcolor": "#fff", "font": {"size": 12, "color": INK}},
        title={"text": escape(y), "font": {"size": 12}, "x": 0, "xref": "container", "xanchor":
               "left", "y": 1, "yanchor": "top", "pad": {"l": 6, "t": 8}},
        xaxis={**plain, "title": {"text": escape(x), "standoff": 8}, "nticks": 8, **of_x},
        yaxis={**plain, **of_y},
    )  # fmt: skip
    return figure


def logarithmic(*values: Array | Sequence[float], power: bool = False) -> dict[str, Any]:
    """Return a logarithmic axis for these values. power: write 10^21, not 7B."""
    every = np.concatenate([np.ravel(v) for v in values])
    ratio = np.nanmax(every) / np.nanmin(every)
    minor = {"minor": {"ticks": "outside", "ticklen": 2, "dtick": "D1", "tickcolor": FAINT}}
    form = {"type": "log", "exponentformat": "power" if power else "B"}
    if ratio < _NARROW and not power:
        return form  # round numbers, wherever they lie
    return form | ({"dtick": 1} | minor if np.log10(ratio) > _DECADES else {"dtick": "D2"})


def clipped(losses: Array, lowest: Array) -> dict[str, Any]:
    """Return a logarithmic axis of losses that ends a little above the minima of the budgets,
    where the picture is decided, or at the highest loss below that. lowest: the minima, (B,)."""
    low, high = float(lowest.min()), float(lowest.max())
    room = 0.25 * np.log(high / low) + _ROOM
    top = min(float(np.max(losses)), high * float(np.exp(room)))
    ends = np.log10([low * np.exp(-0.1 * room), top * np.exp(0.1 * room)])
    return {"type": "log", "range": ends.tolist()}


def ordinal(labels: Sequence[str], down: bool = False) -> dict[str, Any]:
    """Return an axis with these labels at 0, 1, ...; down: the first one on top."""
    ends = (len(labels) - 0.4, -0.6) if down else (-0.6, len(labels) - 0.4)
    ticks = {"tickvals": list(range(len(labels))), "ticktext": [escape(x) for x in labels]}
    return {**ticks, "range": list(ends), "showgrid": False, "fixedrange": True}


def shades(budgets: Array) -> dict[float, str]:
    """Return the colour of each budget (FLOPs), darker if more expensive."""
    distinct = np.unique(np.asarray(budgets, dtype=float))
    places = np.linspace(_LIGHT, _DARK, len(distinct)) if len(distinct) > 1 else [_DARK]
    return dict(zip(map(float, distinct), sample_colorscale("Viridis", list(places)), strict=True))


def line(
    x: Array, y: Array, colour: str, dash: str = "solid", text: Sequence[str] = (), name: str = ""
):  # fmt: skip
    """Return a line. text: hover text of its points; without, the line has none; name: what the
    key of a figure for papers calls it; without, the key leaves it out. So in all functions."""
    style = {"color": colour, "width": 1.6, "dash": dash}
    shown = {"text": text, **hover()} if len(text) else {"hoverinfo": "skip"}
    return go.Scatter(x=x, y=y, mode="lines", line=style, name=name, **shown)


def band(x: Array, ends: Array, colour: str, name: str = ""):
    """Return a filled band. ends: (2, m), low and high."""
    there_and_back = np.concatenate((x, x[::-1])), np.concatenate((ends[0], ends[1][::-1]))
    return go.Scatter(
        x=there_and_back[0], y=there_and_back[1], fill="toself", fillcolor=colour, mode="lines",
        line={"width": 0}, hoverinfo="skip", name=name,
    )  # fmt: skip


def segments(ends: Array, at: Sequence[float], colour: str, width: float):
    """Return horizontal lines from ends[0] to ends[1], (2, n), at the heights `at`."""
    gaps = np.full(len(at), np.nan)
    x, y = np.stack((*ends, gaps), axis=1).ravel(), np.stack((at, at, gaps), axis=1).ravel()
    style = {"color": colour, "width": width}
    return go.Scatter(x=x, y=y, mode="lines", line=style, hoverinfo="skip")


def dots(
    x: Array, y: Array, colours: Iterable[str], hollow: Array, text: Sequence[str],
    shape: str = "circle",
):  # fmt: skip
    """Return the dots of runs. hollow: (n,) of bool; shape: a plotly symbol."""
    colours = list(colours)
    mark = {
        "size": 7, "opacity": 0.9, "symbol": np.where(hollow, f"{shape}-open", shape).tolist(),
        "color": colours, "line": {"width": 1.4, "color": colours},
    }  # fmt: skip
    return go.Scatter(x=x, y=y, mode="markers", marker=mark, text=list(text), **hover())


def bars(lengths: Sequence[float], colour: str, text: Sequence[str]):
    """Return horizontal bars at 0, 1, ..."""
    at = list(range(len(lengths)))
    hidden = {"textposition": "none", "orientation": "h", "marker": {"color": colour}}
    return go.Bar(x=list(lengths), y=at, hovertext=list(text), **hidden, hoverinfo="text")


def marks(x: Sequence[float], y: Sequence[float], text: Sequence[str], name: str = ""):
    """Return diamonds, for vertices."""
    mark = {"symbol": "diamond", "size": 9, "color": "#fff", "line": {"width": 1.6, "color": INK}}
    return go.Scatter(x=x, y=y, mode="markers", marker=mark, text=list(text), name=name, **hover())


def star(x: float, y: float, text: str, ends: tuple[float, float] | None = None):
    """Return a star, for the target. ends: an interval of y."""
    mark = {
        "symbol": "star",
        "size": 15,
        "color": TARGET,
        "line": {"width": 1, "color": "#fff"},
    }
    error: dict[str, Any] = {}
    if ends:
        sides = {"array": [ends[1] - y], "arrayminus": [y - ends[0]]}
        error = {"error_y": {"type": "data", "symmetric": False, "color": TARGET, **sides}}
    return go.Scatter(
        x=[x], y=[y], mode="markers", marker=mark, text=[text], name="target", **hover(), **error
    )


def hover() -> dict[str, str]:
    """Return the settings for hover text."""
    return {"hovertemplate": "%{text}<extra></extra>"}


def wrapped(text: str) -> str:
    """Return the text in short lines, escaped, so that plotly reads no markup in it."""
    return "<br>".join(escape(part) for part in textwrap.wrap(text, _LINE)) or ""
