"""The loss of runs as a picture for papers and READMEs: SVG, or PNG where matplotlib is installed.

The picture is laid out once, as a list of simple shapes in pixels; `svg` and `png` only paint them.

Invariant: the same rows give the same SVG, byte by byte, on any machine and with any libraries.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from xml.sax.saxutils import escape

import numpy as np

from forescale.console import visible
from forescale.monitor.report.axes import Axis, axis_of, loss_axis, texts
from forescale.monitor.report.colours import FAINT, FONT, GRID, INK, SOFT
from forescale.monitor.report.curves import Array, Line
from forescale.monitor.report.events import LOOKS
from forescale.monitor.report.panels import Drawn, look

WIDTH, HEIGHT = 720, 330
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 30, 42
_MEDIAN = 25  # points of the running median
_DOTS = 1500  # pale dots of one run, at most
_LETTER = 6.6  # pixels that a letter takes, about


@dataclass(frozen=True)
class Stroke:
    """A line through points (n, 2)."""

    points: Array
    colour: str
    width: float
    dash: str = ""


@dataclass(frozen=True)
class Dots:
    """Filled circles at points (n, 2)."""

    points: Array
    colour: str
    radius: float
    opacity: float = 1.0


@dataclass(frozen=True)
class Text:
    """A text; anchor: "start", "middle" or "end" of it is at x; y is its base line."""

    x: float
    y: float
    text: str
    colour: str = INK
    anchor: str = "start"
    turned: bool = False


@dataclass
class Picture:
    """All shapes, the first ones below the others; those of `inside` end at the frame."""

    shapes: list[Stroke | Dots | Text] = field(default_factory=list)
    inside: list[Stroke | Dots] = field(default_factory=list)


def laid_out(runs: Sequence[Drawn], x: str) -> Picture:
    """Return the training and held-out losses of runs over x. A run without a step is in the key
    alone."""
    lines = [line for run in runs for line in _lines(run)]
    across = axis_of(x, max((_last(line, x) for line in lines), default=1.0), WIDTH / 110)
    down = loss_axis(lines, x)
    px, py = _place(across, _LEFT, WIDTH - _RIGHT), _place(down, HEIGHT - _BOTTOM, _TOP)
    made = Picture()
    _frame(made, across, down, px, py)
    for i, run in enumerate(runs):
        _events(made, run, x, px)
        _curves(made, run, i, x, px, py)
    _key(made, runs)
    return made


def _lines(run: Drawn) -> list[Line]:
    found = [run.curves.lines["loss"]] if "loss" in run.curves.lines else []
    scores = run.curves.scores.get("validation", {})
    return found + ([scores["loss"]] if "loss" in scores else [])


def _last(line: Line, x: str) -> float:
    values = line.x[x][np.isfinite(line.x[x])]
    return float(values.max()) if len(values) else 0.0


def _place(axis: Axis, begin: float, end: float) -> Callable[[Array], Array]:
    return lambda v: begin + (v - axis.low) / (axis.high - axis.low) * (end - begin)


def _frame(made: Picture, across: Axis, down: Axis, px, py) -> None:
    foot = HEIGHT - _BOTTOM
    for value, text in zip(down.ticks, texts(down), strict=True):
        at = float(py(np.array(value)))
        made.shapes.append(Stroke(np.array([[_LEFT, at], [WIDTH - _RIGHT, at]]), GRID, 1))
        made.shapes.append(Text(_LEFT - 6, at + 4, text, anchor="end"))
    made.shapes.append(Stroke(np.array([[_LEFT, foot], [WIDTH - _RIGHT, foot]]), FAINT, 1))
    for value, text in zip(across.ticks, texts(across), strict=True):
        at = float(px(np.array(value)))
        made.shapes.append(Stroke(np.array([[at, foot], [at, foot + 4]]), FAINT, 1))
        half = len(text) * _LETTER / 2
        made.shapes.append(Text(min(at, WIDTH - 2 - half), foot + 18, text, anchor="middle"))
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    made.shapes.append(Text(middle, HEIGHT - 6, across.title, SOFT, "middle"))
    made.shapes.append(Text(14, (_TOP + foot) / 2, down.title, SOFT, "middle", turned=True))


def _events(made: Picture, run: Drawn, x: str, px) -> None:
    for e in run.events:
        if e.step is None or e.sort == "note":
            continue
        at = float(px(np.array(run.curves.at(e.step).get(x, math.nan))))
        if math.isfinite(at):
            ends = np.array([[at, _TOP], [at, HEIGHT - _BOTTOM]])
            made.inside.append(Stroke(ends, LOOKS[e.sort][1], 1, "3 3"))


def _curves(made: Picture, run: Drawn, number: int, x: str, px, py) -> None:
    colour, dash = look(number)
    for dropped in run.curves.dropped:
        made.inside.append(Stroke(_points(dropped, x, px, py), colour, 1, "1.5 2.5"))
    if (line := run.curves.lines.get("loss")) is not None:
        every = -(-len(line.y) // _DOTS)
        made.inside.append(Dots(_points(line, x, px, py)[::every], colour, 0.9, 0.35))
        middle = Line(line.x, running_median(line.y, _MEDIAN))
        made.inside.append(Stroke(_points(middle, x, px, py), colour, 1.7, dash))
    if (held := run.curves.scores.get("validation", {}).get("loss")) is not None:
        points = _points(held, x, px, py)
        made.inside.append(Dots(points, "#ffffff", 4.4))
        made.inside.append(Dots(points, colour, 3.2))


def _points(line: Line, x: str, px, py) -> Array:
    return np.stack([px(line.x[x]), py(line.y)], axis=1)


def _key(made: Picture, runs: Sequence[Drawn]) -> None:
    """What colours, dots and lines mean, on one line above the frame."""
    at, y = float(_LEFT), 16
    many = len(runs) > 1
    entries = [(visible(run.label) if many else "training", i) for i, run in enumerate(runs)]
    for label, i in entries:
        text = label if len(label) <= 24 else label[:23] + "…"
        if at + 24 + len(text) * _LETTER > WIDTH - 280:
            made.shapes.append(Text(at, y, f"and {len(runs) - i} more", SOFT))
            at += 90
            break
        colour, dash = look(i)
        made.shapes.append(Stroke(np.array([[at, y - 4.0], [at + 18, y - 4.0]]), colour, 2, dash))
        made.shapes.append(Text(at + 23, y, text))
        at += 23 + len(text) * _LETTER + 16
    if any(run.curves.scores for run in runs):
        colour = INK if many else look(0)[0]
        made.shapes.append(Dots(np.array([[at + 4, y - 4.0]]), colour, 3.2))
        made.shapes.append(Text(at + 13, y, "held-out text"))
        at += 13 + 13 * _LETTER + 16
    sorts = {e.sort for run in runs for e in run.events if e.step is not None}
    for sort in [sort for sort in LOOKS if sort in sorts and sort != "note"]:
        _, colour, word = LOOKS[sort]
        if at + 8 + len(word) * _LETTER > WIDTH:
            break
        made.shapes.append(Stroke(np.array([[at, y - 11.0], [at, y + 3.0]]), colour, 1, "3 3"))
        made.shapes.append(Text(at + 7, y, word))
        at += 7 + len(word) * _LETTER + 16


def running_median(values: Array, window: int) -> Array:
    """Return the running median over `window` points, centred. At the beginning, where the loss
    falls fast, over fewer points around each; at the end over those that are left. NaN stays NaN,
    and is in no median."""
    count = len(values)
    made = np.full(count, np.nan)
    for i in range(count):
        if np.isfinite(values[i]):
            reach = min(window // 2, i)
            made[i] = np.nanmedian(values[i - reach : i + reach + 1])
    return made


def svg(picture: Picture) -> bytes:
    """Return the picture as SVG."""
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    font = escape(FONT, {'"': "&quot;"})
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="{font}" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>',
        f'<clipPath id="frame"><rect x="{_LEFT}" y="{_TOP}" width="{WIDTH - _LEFT - _RIGHT + 5}" '
        f'height="{HEIGHT - _TOP - _BOTTOM}"/></clipPath>',
        *map(_shape, picture.shapes),
        '<g clip-path="url(#frame)" stroke-linejoin="round">',
        *map(_shape, picture.inside),
        "</g>",
        "</svg>",
    ]
    return ("\n".join(line for line in lines if line) + "\n").encode()


def _shape(shape: Stroke | Dots | Text) -> str:
    if isinstance(shape, Text):
        turn = f' transform="rotate(-90 {shape.x:g} {shape.y:g})"' if shape.turned else ""
        at = f'x="{shape.x:.1f}" y="{shape.y:.1f}" text-anchor="{shape.anchor}"{turn}'
        return f'<text {at} fill="{shape.colour}">{escape(visible(shape.text))}</text>'
    known = shape.points[np.isfinite(shape.points).all(axis=1)]
    if isinstance(shape, Dots):  # as one path of round ends: a fifth of the bytes of circles
        d = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in known)
        width = f'stroke-width="{2 * shape.radius:g}" stroke-linecap="round"'
        thin = f' opacity="{shape.opacity:g}"' if shape.opacity < 1 else ""
        return f'<path d="{d}" stroke="{shape.colour}" {width}{thin}/>' if d else ""
    d = path(shape.points)
    dash = f' stroke-dasharray="{shape.dash}"' if shape.dash else ""
    stroke = f'stroke="{shape.colour}" stroke-width="{shape.width:g}"{dash}'
    return f'<path d="{d}" fill="none" {stroke}/>' if d else ""


def path(points: Array) -> str:
    """Return points (n, 2) as the path of an SVG; where one is not finite, the line has a gap."""
    made, is_open = [], False
    for x, y in points.tolist():
        if not (math.isfinite(x) and math.isfinite(y)):
            is_open = False
            continue
        made.append(f"{'L' if is_open else 'M'}{x:.1f} {y:.1f}")
        is_open = True
    return "".join(made)


def png(picture: Picture) -> bytes:
    """Return the picture as PNG, at twice its pixels. Raises ModuleNotFoundError without
    matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    figure = Figure((WIDTH / 100, HEIGHT / 100), dpi=200)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
    axes.set_axis_off()
    frame = Rectangle(
        (_LEFT, _TOP), WIDTH - _LEFT - _RIGHT + 5, HEIGHT - _TOP - _BOTTOM, transform=axes.transData
    )
    inside = [(shape, frame) for shape in picture.inside]
    for order, (shape, clip) in enumerate([*((s, None) for s in picture.shapes), *inside]):
        _paint(axes, shape, clip, order)
    into = BytesIO()
    figure.savefig(into, format="png", metadata={"Software": None})
    return into.getvalue()


def _paint(axes, shape: Stroke | Dots | Text, clip, order: int) -> None:
    point = 72 / 100  # points of a pixel
    if isinstance(shape, Text):
        words = visible(shape.text).replace("$", r"\$")
        side = {"start": "left", "middle": "center", "end": "right"}[shape.anchor]
        axes.text(shape.x, shape.y, words, color=shape.colour, ha=side, va="baseline",
                  rotation=90 if shape.turned else 0, rotation_mode="anchor",
                  fontsize=12 * point, zorder=order)  # fmt: skip
        return
    if isinstance(shape, Dots):
        own = {"marker": "o", "linestyle": "", "markersize": 2 * shape.radius * point,
               "markeredgewidth": 0, "alpha": shape.opacity}  # fmt: skip
    else:
        own = {"linewidth": shape.width * point}
        if shape.dash:
            own["linestyle"] = (0, [float(part) for part in shape.dash.split()])
    (drawn,) = axes.plot(*shape.points.T, color=shape.colour, zorder=order, **own)
    if clip is not None:
        drawn.set_clip_path(clip)
