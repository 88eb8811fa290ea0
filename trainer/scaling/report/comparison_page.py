"""The picture of a comparison, as a page and as files for papers: both curves, and the multiplier.

    loss         over C: a line and the band of the resampled fits for each side, a dot a run
    multiplier   over the C of the first side, with its interval; a line at 1

Invariant: the numbers of the comparison, nothing smoothed; the same comparison gives the same
bytes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from forescale.pages.document import Cell, Section, code, render
from forescale.pages.figure import (
    BAND,
    FAINT,
    INK,
    OTHER,
    OTHER_BAND,
    TARGET,
    TARGET_BAND,
    Axis,
    Figure,
    Trace,
    band,
    dots,
    line,
    star,
)
from forescale.scaling.analysis.comparison import Comparison, Place, Side
from forescale.scaling.analysis.ratio import Ratio
from forescale.scaling.fitting.points import Array, spent
from forescale.scaling.report.answers_text import path_of, place_rows, trend_of
from forescale.scaling.report.fit_page import write_report

COLOURS = (OTHER, TARGET)  # of A and of B
_BANDS = (OTHER_BAND, TARGET_BAND)
_NAME = "compare"
_FINE = 61
_FAR = 1e3  # a target's C further beyond the runs than this doesn't widen the axis


def write(comparison: Comparison, path: Path, command: Sequence[str]) -> list[Path]:
    """Write the page, and the picture as PNG and SVG in the folder beside it; return the paths."""
    pictures = {_NAME: sections(comparison, command)[0]}
    return write_report(path, page(comparison, command), pictures)


def page(comparison: Comparison, command: Sequence[str]) -> str:
    """Return the comparison as one HTML page. command: the command line that comparison it."""
    return render(
        title=f"{comparison.a.name} and {comparison.b.name}",
        intro=comparison.summary,
        lead=[path_of(comparison)],
        sections=sections(comparison, command),
    )


def sections(comparison: Comparison, command: Sequence[str]) -> list[Section]:
    """Return the sections of the page: doubts, picture, numbers, the two laws, the command."""
    level = f"{comparison.level:.0%}"
    curves, multipliers = panels(comparison)
    trend = [text] if (text := trend_of(comparison)) is not None else []
    notes: list[Cell] = [*comparison.notes]
    return [
        Section("curves", "Loss against compute, and the compute multiplier", [
            ("loss", curves,
             f"Lines: the loss of each law along its path, with the {level} band of its resampled "
             "fits. Dots: the runs. Hollow: a run that the law is not fitted to; those above all "
             "others are beyond the edge."),
            ("multiplier", multipliers,
             f"How many times less compute {comparison.b.name} needs than {comparison.a.name} for "
             f"the same loss, with its {level} interval. Below 1 it needs more. Star: the target."),
        ], key=key(comparison), after=trend),
        Section("notes", "Reasons for doubt", after=notes,
                absent="" if notes else "No reason was found to doubt the numbers."),
        Section("numbers", "In numbers", rows=place_rows(comparison), head=True),
        Section("laws", "The two laws", rows=_laws(comparison), head=True),
        Section("provenance", "Where the numbers come from",
                rows=[["Command", code(" ".join(command))]]),
    ]  # fmt: skip


def key(comparison: Comparison) -> list[tuple[Cell, str]]:
    """Return the name and the colour of both sides."""
    return [
        (side.name, colour)
        for side, colour in zip((comparison.a, comparison.b), COLOURS, strict=True)
    ]


def panels(comparison: Comparison) -> list[Figure]:
    """Return the figure of both curves and that of the multiplier."""
    return [_curves(comparison), _multipliers(comparison)]


def _curves(comparison: Comparison) -> Figure:
    low, high = _span(comparison)
    grid = np.geomspace(low, high, _FINE)
    sides = (comparison.a, comparison.b)
    lines = [side.loss(grid) for side in sides]
    losses = np.concatenate([*lines, *(side.study.points.loss for side in sides)])
    figure = Figure(
        Axis("C (FLOPs)", log=True, power=True, ends=(low, high)),
        Axis("loss", log=True, ends=(float(losses.min()) / 1.02, float(losses.max()) * 1.02)),
    )
    for side, loss, colour, shade in zip(sides, lines, COLOURS, _BANDS, strict=True):
        texts = [f"{side.name}\nC {c:.4g}\nloss {x:.5g}" for c, x in zip(grid, loss, strict=True)]
        figure.add(band(grid, side.band(grid), shade), line(grid, loss, colour, texts=texts))
        figure.add(_runs(side, colour))
    return figure


def _runs(side: Side, colour: str) -> Trace:
    study = side.study
    c, loss = spent(study.all_points), study.all_points.loss
    names = study.table.get("name", study.table.index)
    texts = [f"{name}\n{side.name}\nC {x:.4g}\nloss {y:.5g}"
             for name, x, y in zip(names, c, loss, strict=True)]  # fmt: skip
    return dots(c, loss, [colour], texts, ~study.is_fitted)


def _multipliers(comparison: Comparison) -> Figure:
    target = comparison.target
    places = comparison.places + [p for p in (target,) if p is not None]
    every = np.array([x for p in places for x in _finite(p.multiplier)] + [1.0])
    low, high = _span(comparison)
    figure = Figure(
        Axis(f"C of {comparison.a.name} (FLOPs)", log=True, power=True, ends=(low, high)),
        Axis("compute multiplier", log=True),
    )
    figure.add(line(np.array([low, high]), np.ones(2), FAINT, "dash"))
    if comparison.places:
        x = np.array([p.flops[0] for p in comparison.places])
        least, value, most = _clipped(comparison.places, every)
        figure.add(band(x, np.stack((least, most)), BAND))
        figure.add(line(x, value, INK, texts=[_text(p) for p in comparison.places]))
    if target is not None:
        least, value, most = _clipped([target], every)
        ends = float(least[0]), float(most[0])
        figure.add(star(target.flops[0], float(value[0]), _text(target), ends))
    return figure


def _span(comparison: Comparison) -> tuple[float, float]:
    """Return the ends of the axis of C: all runs, and the target."""
    every = [c for side in (comparison.a, comparison.b) for c in side.ends]
    if comparison.target is not None:
        every += [c for c in comparison.target.flops if c < max(every) * _FAR]
    return min(every) / 1.3, max(every) * 1.3


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
    return f"loss {place.loss:.5g}\nmultiplier {m.value:.4g}\n{m.low:.4g} to {m.high:.4g}"


def _laws(comparison: Comparison) -> list[list[Cell]]:
    rows: list[list[Cell]] = [["", "runs", "law", "parameters", "certified"]]
    for side in (comparison.a, comparison.b):
        values = ", ".join(f"{k} {v:.5g}" for k, v in side.study.fit.values.items())
        holds = "yes" if side.study.fit.certificate.holds else "no"
        rows.append([side.name, str(len(side.study.points)), side.study.form.name, values, holds])
    return rows
