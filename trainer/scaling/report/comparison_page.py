"""A comparison of two recipes: its sections for the terminal and the page, and its picture.

    loss         over C: a line and the band of the resampled fits for each side, a dot a run
    multiplier   over the C of the first side, with its interval; a line at 1

Invariant: the numbers of the comparison, nothing smoothed; the same comparison gives the same
bytes. Everything that makes the numbers doubtful is shown with them.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from forescale.pages import figure as chart
from forescale.pages.document import Cell, Section, code, number, percent, render, span
from forescale.scaling.analysis.comparison import Comparison, Place
from forescale.scaling.analysis.ratio import Ratio
from forescale.scaling.fitting.points import spent
from forescale.scaling.report.fit_page import write_report
from forescale.scaling.report.fit_sections import reasons

COLOURS = (chart.OTHER, chart.TARGET)  # of A and of B
_FINE = 61
_FAR = 1e3  # a target's C further beyond the runs than this doesn't widen the axis


def write(comparison: Comparison, path: Path, command: Sequence[str]) -> list[Path]:
    """Write the page, and the picture as PNG and SVG in the folder beside it; return the paths."""
    html, sections = page(comparison, command)
    return write_report(path, html, {"compare": sections[0]})


def page(comparison: Comparison, command: Sequence[str]) -> tuple[str, list[Section]]:
    """Return the comparison as one HTML page, and its sections. command: the command line."""
    *numbers, notes = comparison_sections(comparison)
    origin = Section("provenance", "Where the numbers come from")
    origin.rows = [["Command", code(" ".join(command))]]
    sections = [_picture(comparison), notes, *numbers, origin]
    title, lead = f"{comparison.a.name} and {comparison.b.name}", [path_of(comparison)]
    return render(title=title, intro=comparison.summary, lead=lead, sections=sections), sections


def path_of(comparison: Comparison) -> str:
    """Return along which runs the two are compared, as a sentence."""
    if (ratio := comparison.a.path.ratio) is not None:
        return f"Compared at {ratio:.4g} tokens per parameter, those of the target."
    return "Compared along the compute-optimal runs of each."


def comparison_sections(comparison: Comparison) -> list[Section]:
    """Return the sections without pictures: numbers, the two laws, doubts."""
    level, sides = f"{comparison.level:.0%}", (comparison.a, comparison.b)
    flops = [f"C of {side.name}" for side in sides]
    rows: list[list[Cell]] = [["loss", *flops, "multiplier", level, "loss of B", level]]
    rows += [[number(place.loss), *_cells(place)] for place in comparison.places]
    after = list[Cell]([
        "Multiplier: the compute that A needs for the loss over that of B. Loss of B: relative to "
        "the loss of A, at A's compute."
    ])  # fmt: skip
    if comparison.mean is None:
        after.append("No loss is reached by both within the compute of their runs.")
    else:
        rows.append(["mean of the range", "", "", *ratio_cells(comparison.mean), "", ""])
        after.append(f"Over the common range: {comparison.summary}")
    if comparison.trend is not None:
        ends = [comparison.places[i].multiplier.value for i in (0, -1)]
        moves = f"from {ends[0]:.3g} at the highest loss to {ends[1]:.3g} at the lowest"
        after.append(
            f"It goes {moves}; a multiplier that stays the same is inside the interval."
            if comparison.trend.includes_one else
            f"It goes {moves}: it changes with scale, so quote it at the scale that you need."
        )  # fmt: skip
    if (target := comparison.target) is not None and comparison.predictions is not None:
        rows.append([Markup("{} (target)").format(number(target.loss)), *_cells(target)])
        after.append(f"At the target: {comparison.verdict(target.multiplier)}")
        for side, f in zip(sides, comparison.predictions, strict=True):
            text = Markup("{}, trained with the target's compute: loss {}, {} interval {}.")
            after.append(text.format(side.name, number(f.loss), level, span(f.outer)))
    laws: list[list[Cell]] = [["", "", "runs", "C", "loss along its path", "law", "parameters",
                               "certified"]]  # fmt: skip
    for letter, side in zip("AB", sides, strict=True):
        values = ", ".join(f"{k} {v:.5g}" for k, v in side.study.fit.values.items())
        holds = "yes" if side.study.fit.certificate.holds else "no"
        laws.append([letter, side.name, str(len(side.study.points)), span(side.ends, 3),
                     span(side.losses, 4), side.study.form.name, values, holds])  # fmt: skip
    return [
        Section("numbers", "In numbers", rows=rows, head=True, after=after),
        Section("laws", "The two laws", rows=laws, head=True, columns="words"),
        reasons(comparison.notes),
    ]


def _cells(place: Place) -> list[Cell]:
    losses = place.loss_ratio
    change, low, high = (percent(x - 1, sign="+") for x in (losses.value, losses.low, losses.high))
    ends = Markup("{} to {}").format(low, high)
    return [*(number(c, 4) for c in place.flops), *ratio_cells(place.multiplier), change, ends]


def ratio_cells(ratio: Ratio) -> list[Cell]:
    """Return a ratio and its interval."""
    ends = [number(ratio.low) if ratio.low else "no lower end",
            number(ratio.high) if ratio.high < np.inf else "no upper end"]  # fmt: skip
    return [number(ratio.value), Markup("{} to {}").format(*ends)]


def _picture(comparison: Comparison) -> Section:
    level = f"{comparison.level:.0%}"
    curves, multipliers = panels(comparison)
    names = [side.name for side in (comparison.a, comparison.b)]
    return Section("curves", "Loss against compute, and the compute multiplier", [
        ("loss", curves,
         f"Lines: the loss of each law along its path, with the {level} band of its resampled "
         "fits. Dots: the runs. Hollow: a run that the law is not fitted to; those above all "
         "others are beyond the edge."),
        ("multiplier", multipliers,
         f"How many times less compute {names[1]} needs than {names[0]} for the same loss, with "
         f"its {level} interval. Below 1 it needs more. Star: the target."),
    ], key=list(zip(names, COLOURS, strict=True)))  # fmt: skip


def panels(comparison: Comparison) -> list[chart.Figure]:
    """Return the figure of both curves and that of the multiplier."""
    every = [c for side in (comparison.a, comparison.b) for c in side.ends]
    if comparison.target is not None:
        every += [c for c in comparison.target.flops if c < max(every) * _FAR]
    low, high = min(every) / 1.3, max(every) * 1.3
    return [_curves(comparison, low, high), _multipliers(comparison, low, high)]


def _curves(comparison: Comparison, low: float, high: float) -> chart.Figure:
    grid = np.geomspace(low, high, _FINE)
    sides = (comparison.a, comparison.b)
    lines = [side.loss(grid) for side in sides]
    losses = np.concatenate([*lines, *(side.study.points.loss for side in sides)])
    figure = chart.Figure(
        chart.Axis("C (FLOPs)", log=True, power=True, ends=(low, high)),
        chart.Axis("loss", log=True, ends=(float(losses.min()) / 1.02, float(losses.max()) * 1.02)),
    )
    bands = (chart.OTHER_BAND, chart.TARGET_BAND)
    for side, loss, colour, shade in zip(sides, lines, COLOURS, bands, strict=True):
        texts = [f"{side.name}\nC {c:.4g}\nloss {x:.5g}" for c, x in zip(grid, loss, strict=True)]
        figure.add(
            chart.band(grid, side.band(grid), shade), chart.line(grid, loss, colour, texts=texts)
        )
        study = side.study
        c, y = spent(study.all_points), study.all_points.loss
        names = study.table.get("name", study.table.index)
        texts = [f"{name}\n{side.name}\nC {a:.4g}\nloss {b:.5g}"
                 for name, a, b in zip(names, c, y, strict=True)]  # fmt: skip
        figure.add(chart.dots(c, y, [colour], texts, ~study.is_fitted))
    return figure


def _multipliers(comparison: Comparison, low: float, high: float) -> chart.Figure:
    target = comparison.target
    places = comparison.places + [p for p in (target,) if p is not None]
    rows = np.array([(p.multiplier.low, p.multiplier.value, p.multiplier.high) for p in places])
    finite = np.append(rows[(rows > 0) & (rows < np.inf)], 1.0)
    rows = np.clip(rows, finite.min() / 1.5, finite.max() * 1.5)  # unbounded ends at the edge
    texts = [f"loss {p.loss:.5g}\nmultiplier {p.multiplier.value:.4g}\n{p.multiplier.low:.4g} to "
             f"{p.multiplier.high:.4g}" for p in places]  # fmt: skip
    figure = chart.Figure(
        chart.Axis(f"C of {comparison.a.name} (FLOPs)", log=True, power=True, ends=(low, high)),
        chart.Axis("compute multiplier", log=True),
    )
    figure.add(chart.line(np.array([low, high]), np.ones(2), chart.FAINT, "dash"))
    if count := len(comparison.places):
        x = np.array([p.flops[0] for p in comparison.places])
        figure.add(chart.band(x, rows[:count, ::2].T, chart.BAND))
        figure.add(chart.line(x, rows[:count, 1], chart.INK, texts=texts[:count]))
    if target is not None:
        least, value, most = map(float, rows[-1])
        figure.add(chart.star(target.flops[0], value, texts[-1], (least, most)))
    return figure
