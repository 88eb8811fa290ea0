"""The picture of a comparison, as a page and as files for papers: both curves, and the multiplier.

    loss         over C: a line and the band of the resampled fits for each side, a dot a run
    multiplier   over the C of the first side, with its interval; a line at 1

Invariant: as in html.py and paper.py: the numbers of the comparison, nothing smoothed, nothing
loaded from elsewhere, the same comparison gives the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from forescale.monitor.report import colours
from forescale.monitor.report.rendering import render
from forescale.monitor.report.sections import Cell, number, span
from forescale.scaling.analysis.comparison import Comparison, Place, Side
from forescale.scaling.analysis.ratio import Ratio
from forescale.scaling.fitting.points import Array, spent
from forescale.scaling.report import style
from forescale.scaling.report.answers import path_of, trend_of
from forescale.scaling.report.html import beside
from forescale.scaling.report.sections import Section
from forescale.storage import write_file

COLOURS = (colours.OTHER, colours.TARGET)  # of A and of B
_BANDS = (style.OTHER_BAND, "rgba(194,65,12,0.18)")
_NAME = "compare"
_FINE = 61
_FAR = 1e3  # a target's C further beyond the runs than this doesn't widen the axis
_TEMPLATE = Path(__file__).with_name("report.html.j2")


def write(made: Comparison, path: Path, command: Sequence[str]) -> list[Path]:
    """Write the page, and the picture as PNG and SVG in the folder beside it; return the paths."""
    from forescale.scaling.report.paper import drawn  # matplotlib is slow to import

    folder = beside(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, page(made, command).encode())
    paths = [path]
    for form, data in drawn(panels(made), key(made)).items():
        paths.append(folder / f"{_NAME}.{form}")
        write_file(paths[-1], data)
    return paths


def page(made: Comparison, command: Sequence[str]) -> str:
    """Return the comparison as one HTML page. command: the command line that made it."""
    title = f"{made.a.name} and {made.b.name}"
    return render(
        _TEMPLATE, title=title, source=made.summary, lead=[path_of(made)],
        sections=sections(made, command), plotly=Markup(get_plotlyjs()),
    )  # fmt: skip


def sections(made: Comparison, command: Sequence[str]) -> list[Section]:
    """Return the sections of the page: doubts, picture, numbers, the two laws, the command."""
    level = f"{made.level:.0%}"
    curves, multipliers = panels(made)
    trend = [text] if (text := trend_of(made)) is not None else []
    notes: list[Cell] = [*made.notes]
    return [
        Section("curves", "Loss against compute, and the compute multiplier", [
            ("loss", curves,
             f"Lines: the loss of each law along its path, with the {level} band of its resampled "
             "fits. Dots: the runs. Hollow: a run that the law is not fitted to; those above all "
             "others are beyond the edge."),
            ("multiplier", multipliers,
             f"How many times less compute {made.b.name} needs than {made.a.name} for the same "
             f"loss, with its {level} interval. Below 1 it needs more. Star: the target."),
        ], key=key(made), after=trend),
        Section("notes", "Reasons for doubt", after=notes,
                absent="" if notes else "No reason was found to doubt the numbers."),
        Section("numbers", "In numbers", rows=_numbers(made), head=True),
        Section("laws", "The two laws", rows=_laws(made), head=True),
        Section("provenance", "Where the numbers come from",
                rows=[["Command", Markup("<code>{}</code>").format(" ".join(command))]]),
    ]  # fmt: skip


def key(made: Comparison) -> list[tuple[Cell, str]]:
    """Return the name and the colour of both sides."""
    return [(side.name, colour) for side, colour in zip((made.a, made.b), COLOURS, strict=True)]


def panels(made: Comparison) -> list[go.Figure]:
    """Return the figure of both curves and that of the multiplier."""
    return [_curves(made), _multipliers(made)]


def _curves(made: Comparison) -> go.Figure:
    ends = _span(made)
    grid = np.geomspace(ends[0], ends[1], _FINE)
    sides = (made.a, made.b)
    lines = [side.loss(grid) for side in sides]
    seen = np.concatenate([*lines, *(side.made.points.loss for side in sides)])
    of_c = {**style.logarithmic(grid, power=True), "range": np.log10(ends).tolist()}
    of_loss = {"type": "log", "range": np.log10([seen.min() / 1.02, seen.max() * 1.02]).tolist()}
    figure = style.axes("C (FLOPs)", "loss", of_c, of_loss)
    for side, loss, colour, shade in zip(sides, lines, COLOURS, _BANDS, strict=True):
        figure.add_trace(style.band(grid, side.band(grid), shade))
        text = [f"{style.wrapped(side.name)}<br>C {c:.4g}<br>loss {x:.5g}"
                for c, x in zip(grid, loss, strict=True)]  # fmt: skip
        figure.add_trace(style.line(grid, loss, colour, text=text))
        figure.add_trace(_runs(side, colour))
    return figure


def _runs(side: Side, colour: str) -> go.Scatter:
    made = side.made
    c, loss = spent(made.all_points), made.all_points.loss
    names = made.table.get("name", made.table.index)
    text = [f"<b>{style.wrapped(str(n))}</b><br>{style.wrapped(side.name)}<br>C {x:.4g}<br>"
            f"loss {y:.5g}" for n, x, y in zip(names, c, loss, strict=True)]  # fmt: skip
    return style.dots(c, loss, [colour] * len(c), ~made.is_fitted, text)


def _multipliers(made: Comparison) -> go.Figure:
    shown = made.places + [p for p in (made.target,) if p is not None]
    every = np.array([x for p in shown for x in _finite(p.multiplier)] + [1.0])
    grid = _span(made)
    of_c = {**style.logarithmic(grid, power=True), "range": np.log10(grid).tolist()}
    figure = style.axes(
        f"C of {made.a.name} (FLOPs)", "compute multiplier", of_c, style.logarithmic(every)
    )
    figure.add_trace(style.line(grid, np.ones(2), colours.FAINT, "dash"))
    if made.places:
        x = np.array([p.flops[0] for p in made.places])
        low, value, high = _clipped(made.places, every)
        figure.add_trace(style.band(x, np.stack((low, high)), style.BAND))
        figure.add_trace(style.line(x, value, colours.INK, text=[_text(p) for p in made.places]))
    if (target := made.target) is not None:
        low, value, high = _clipped([target], every)
        ends = float(low[0]), float(high[0])
        figure.add_trace(style.star(target.flops[0], float(value[0]), _text(target), ends))
    return figure


def _span(made: Comparison) -> Array:
    """Return the ends of the axis of C, (2,): all runs, and the target."""
    every = [c for side in (made.a, made.b) for c in side.ends]
    if made.target is not None:
        every += [c for c in made.target.flops if c < max(every) * _FAR]
    return np.array([min(every) / 1.3, max(every) * 1.3])


def _finite(ratio: Ratio) -> list[float]:
    return [x for x in (ratio.low, ratio.value, ratio.high) if 0 < x < np.inf]


def _clipped(places: Sequence[Place], every: Array) -> tuple[Array, Array, Array]:
    """Return low ends, values and high ends; an unbounded end is drawn to the edge of the rest."""
    ratios = [p.multiplier for p in places]
    rows = np.array([(r.low, r.value, r.high) for r in ratios])
    low, value, high = np.clip(rows, every.min() / 1.5, every.max() * 1.5).T
    return low, value, high


def _text(place: Place) -> str:
    m = place.multiplier
    return f"loss {place.loss:.5g}<br>multiplier {m.value:.4g}<br>{m.low:.4g} to {m.high:.4g}"


def _numbers(made: Comparison) -> list[list[Cell]]:
    level = f"{made.level:.0%}"
    head: list[Cell] = ["loss", f"C of {made.a.name}", f"C of {made.b.name}", "multiplier", level]
    rows = [head]
    for place in made.places:
        rows.append(
            [number(place.loss), *(number(c) for c in place.flops), *_ratio(place.multiplier)]
        )
    if made.mean is not None:
        rows.append(["mean of the range", "", "", *_ratio(made.mean)])
    if (t := made.target) is not None:
        loss = Markup("{} (target)").format(number(t.loss))
        rows.append([loss, *(number(c) for c in t.flops), *_ratio(t.multiplier)])
    return rows


def _ratio(ratio: Ratio) -> list[Cell]:
    if not 0 < ratio.low <= ratio.high < np.inf:
        high = number(ratio.high) if ratio.high < np.inf else "no upper end"
        return [number(ratio.value), Markup("{} to {}").format(number(ratio.low), high)]
    return [number(ratio.value), span((ratio.low, ratio.high))]


def _laws(made: Comparison) -> list[list[Cell]]:
    rows: list[list[Cell]] = [["", "runs", "law", "parameters", "certified"]]
    for side in (made.a, made.b):
        values = ", ".join(f"{k} {v:.5g}" for k, v in side.made.fit.values.items())
        holds = "yes" if side.made.fit.certificate.holds else "no"
        rows.append([side.name, str(len(side.made.points)), side.made.form.name, values, holds])
    return rows
