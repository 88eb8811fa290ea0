"""Charts as plain data: two axes and the traces on them.

    chart.js     draws a figure in a page, as wide as the page is
    picture.py   draws the same figure as PNG or SVG

Invariant: a figure needs no more than 320 pixels of width, so it has no legend inside and no title
beside its y axis. All texts are plain: who draws them escapes them.
"""

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

INK, FAINT, TARGET, OTHER = "#1f2328", "#b4bac2", "#c2410c", "#216ea0"
SOFT, GRID = "#59636e", "#eceef0"
# Colours of lines, in the order of their use: Okabe and Ito's, darker for lines on white. A
# colour-blind reader can tell them apart.
LINES = ("#0b5cad", "#c2410c", "#00805c", "#a0478a", "#8a6d00", "#2a8fbd", "#1f2328", "#7a4b2a")
BAND, OTHER_BAND, TARGET_BAND = f"{INK}24", f"{OTHER}2e", f"{TARGET}2e"  # transparent
WIDE, NARROW = f"{TARGET}1a", f"{TARGET}29"
# Viridis, from its dark to its light end.
_VIRIDIS = np.array([[68, 1, 84], [72, 40, 120], [62, 73, 137], [49, 104, 142], [38, 130, 142],
                     [31, 158, 137], [53, 183, 121], [110, 206, 88], [181, 222, 43],
                     [253, 231, 37]])  # fmt: skip
_LIGHTEST = 0.86  # of the colour scale: what is lighter is invisible on white
_MARGIN = 0.04  # of an axis, around the data
_ROOM = 0.06  # log loss that an axis shows at least above the highest minimum of a budget
_DIGITS = 6
_LINE = 40  # characters of a line of a point's text, so that it fits a phone


@dataclass(frozen=True)
class Axis:
    """One axis. title: with its unit; log: logarithmic; power: numbers are powers of ten (10^21,
    not 7B); percent: numbers are fractions, written in %; ends: None for those of the data, high
    first for an axis that runs down; ticks: (value, text), None for round numbers; zero: there is a
    line at 0; grid: ticks have lines across the figure."""

    title: str = ""
    log: bool = False
    power: bool = False
    percent: bool = False
    ends: tuple[float, float] | None = None
    ticks: Sequence[tuple[float, str]] | None = None
    zero: bool = False
    grid: bool = True


@dataclass
class Trace:
    """Something that is drawn, at points (n,).

    kind: "line"; "band" from y to high; "dots"; "bars" from x to high, at heights y
    colours: one for all points, or one for each; texts: of each point, its first line is its
    title; name: its entry in the key of a picture, "" for none; label: a text on a line
    shapes, hollow: of each dot: circle, square, diamond, triangle, cross or star
    edge: the colour of a dot's border; ends: an interval of y at the first dot
    """

    kind: Literal["line", "band", "dots", "bars"]
    x: Array
    y: Array
    colours: Sequence[str]
    high: Array | None = None
    width: float = 1.6
    dash: Literal["", "dash", "dot", "dashdot"] = ""
    texts: Sequence[str] = ()
    name: str = ""
    label: str = ""
    shapes: Sequence[str] = ("circle",)
    hollow: Sequence[bool] = ()
    size: float = 7.0
    edge: str = ""
    ends: tuple[float, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the trace for chart.js, without what is empty."""
        facts: dict[str, Any] = {}
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                facts[name] = rounded(value)
            elif value:
                facts[name] = list(value) if isinstance(value, tuple) else value
        return facts


@dataclass
class Figure:
    """A chart. height: pixels in a page."""

    x: Axis
    y: Axis
    height: int = 430
    traces: list[Trace] = field(default_factory=list)

    def add(self, *traces: Trace) -> "Figure":
        """Add traces, above the others, and return the figure."""
        self.traces += traces
        return self

    def ends(self, side: Literal["x", "y"]) -> tuple[float, float]:
        """Return the ends of an axis: its own, or those of the data with a margin."""
        axis = self.x if side == "x" else self.y
        if axis.ends is not None:
            return axis.ends
        values = [np.zeros(0)]
        for trace in self.traces:
            values.append(np.asarray(getattr(trace, side), dtype=float))
            if trace.high is not None and (trace.kind == "bars") == (side == "x"):
                values.append(trace.high)
            if trace.ends is not None and side == "y":
                values.append(np.array(trace.ends))
        every = np.concatenate(values)
        every = every[np.isfinite(every) & ((every > 0) | (not axis.log))]
        if not len(every):
            return (1.0, 10.0) if axis.log else (0.0, 1.0)
        every = np.log(every) if axis.log else every
        low, high = float(every.min()), float(every.max())
        room = (high - low) * _MARGIN or abs(high) * _MARGIN or _MARGIN
        if axis.log:
            return float(np.exp(low - room)), float(np.exp(high + room))
        return low - room, high + room

    def as_dict(self) -> dict[str, Any]:
        """Return the figure for chart.js."""
        x = vars(self.x) | {"ends": self.ends("x")}
        y = vars(self.y) | {"ends": self.ends("y")}
        traces = [trace.as_dict() for trace in self.traces]
        return {"x": x, "y": y, "height": self.height, "traces": traces}


def rounded(values: Iterable[float]) -> list[float | None]:
    """Return numbers with six digits, whole ones whole; None for what is not finite."""
    numbers: list[float | None] = []
    for value in map(float, values):
        if not np.isfinite(value):
            numbers.append(None)
            continue
        whole = float(f"{value:.12g}")  # a step or a number of tokens stays whole
        is_whole = whole.is_integer() and abs(whole) < 2**53
        numbers.append(int(whole) if is_whole else float(f"{value:.{_DIGITS}g}"))
    return numbers


def clipped(title: str, losses: Array, lowest: Array) -> Axis:
    """Return a logarithmic axis of losses. It ends a little above the minima of the budgets, (B,),
    or at the highest loss if that is lower."""
    low, high = float(lowest.min()), float(lowest.max())
    room = 0.25 * np.log(high / low) + _ROOM
    top = min(float(np.max(losses)), high * float(np.exp(room)))
    return Axis(title, log=True, ends=(low * np.exp(-0.1 * room), top * np.exp(0.1 * room)))


def ordinal(title: str, labels: Sequence[str], down: bool = False) -> Axis:
    """Return an axis with these labels at 0, 1, ...; down: the first one is on top."""
    ends = (len(labels) - 0.4, -0.6) if down else (-0.6, len(labels) - 0.4)
    return Axis(title, ends=ends, ticks=[*enumerate(labels)], grid=False)


def viridis(places: Iterable[float]) -> list[str]:
    """Return colours of the scale Viridis. places: 0 is its dark end, 1 its light one."""
    at = np.linspace(0, 1, len(_VIRIDIS))
    columns = [np.interp(list(places), at, channel) for channel in _VIRIDIS.T]
    return [f"#{int(r):02x}{int(g):02x}{int(b):02x}" for r, g, b in zip(*columns, strict=True)]


def shades(budgets: Array) -> dict[float, str]:
    """Return the colour of each budget (FLOPs), darker if more expensive."""
    distinct = np.unique(np.asarray(budgets, dtype=float))
    places = np.linspace(_LIGHTEST, 0.0, len(distinct)) if len(distinct) > 1 else [0.0]
    return dict(zip(map(float, distinct), viridis(places), strict=True))


def line(x: Array, y: Array, colour: str, dash: Any = "", **options: Any) -> Trace:
    """Return a line. options: fields of Trace."""
    return Trace("line", np.asarray(x), np.asarray(y), [colour], dash=dash, **options)


def band(x: Array, ends: Array, colour: str, name: str = "") -> Trace:
    """Return a filled band. ends: (2, n), low and high."""
    return Trace("band", np.asarray(x), ends[0], [colour], high=ends[1], width=0.0, name=name)


def segments(ends: Array, at: Sequence[float], colour: str, width: float) -> Trace:
    """Return horizontal lines from ends[0] to ends[1], (2, n), at the heights `at`."""
    gaps = np.full(len(at), np.nan)
    x, y = np.stack((*ends, gaps), axis=1).ravel(), np.stack((at, at, gaps), axis=1).ravel()
    return line(x, y, colour, width=width)


def dots(
    x: Array, y: Array, colours: Iterable[str], texts: Sequence[str],
    hollow: Array | None = None, shape: str = "circle",
) -> Trace:  # fmt: skip
    """Return the dots of runs. hollow: (n,) of bool; None: none is."""
    empty = np.zeros(len(x), dtype=bool) if hollow is None else hollow
    return Trace("dots", np.asarray(x), np.asarray(y), list(colours), texts=list(texts),
                 shapes=[shape], hollow=[bool(h) for h in empty])  # fmt: skip


def marks(x: Sequence[float], y: Sequence[float], texts: Sequence[str], name: str = "") -> Trace:
    """Return white diamonds, for vertices."""
    return Trace("dots", np.array(x), np.array(y), ["#ffffff"], texts=list(texts), name=name,
                 shapes=["diamond"], size=9, edge=INK)  # fmt: skip


def star(
    x: float, y: float, text: str, ends: tuple[float, float] | None = None, name: str = "target"
) -> Trace:
    """Return a star. ends: an interval of y."""
    return Trace("dots", np.array([x]), np.array([y]), [TARGET], texts=[text], name=name,
                 shapes=["star"], size=15, edge="#ffffff", ends=ends)  # fmt: skip


def bars(starts: Array, lengths: Array, colour: str, texts: Sequence[str]) -> Trace:
    """Return horizontal bars at the heights 0, 1, ..."""
    at = np.arange(len(lengths), dtype=float)
    return Trace("bars", starts, at, [colour], high=starts + lengths, texts=list(texts))


def wrapped(text: str) -> str:
    """Return a sentence in lines that fit a phone."""
    return "\n".join(textwrap.wrap(text, _LINE))
