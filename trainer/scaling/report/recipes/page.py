"""`study report` of recipes: one page of their compute multipliers, and the pictures for papers.

    multipliers   a row a recipe, a dot and an interval a budget, a line at 1; every recipe that was
                  tried, the losers too
    loss          the base's curve, and the loss of each recipe at its own compute

Invariant: as in html.py and paper.py: the numbers of the comparison, nothing smoothed, nothing
loaded from elsewhere, the same comparison gives the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from forescale.monitor.report.colours import FAINT, INK, LINES
from forescale.monitor.report.rendering import render
from forescale.monitor.report.sections import Cell, number, span
from forescale.scaling.analysis.multipliers import Candidate, Multipliers, Place
from forescale.scaling.analysis.ratio import Ratio
from forescale.scaling.analysis.recipe_cells import RecipeCell
from forescale.scaling.report import style
from forescale.scaling.report.evidence import StudyEvidence
from forescale.scaling.report.html import beside
from forescale.scaling.report.provenance import RECORDS, as_csv, provenance
from forescale.scaling.report.recipes.terminal import (
    fresh_of,
    head_of,
    interval,
    number_of,
    read_as,
    span_of,
    verdict,
)
from forescale.scaling.report.sections import Section, flops_key
from forescale.storage import write_file

_TEMPLATE = Path(__file__).parents[1] / "report.html.j2"
_APART = 0.5  # of a row's height, over which its budgets are spread
_ROW, _MARGIN = 46, 130  # pixels of a row; of axis and title together
_FINE = 61


def write(made: Multipliers, table: pd.DataFrame, path: Path, command: Sequence[str]) -> list[Path]:
    """Write the page, and beside it the pictures as PNG and SVG and the records; return the
    paths."""
    from forescale.scaling.report.paper import drawn  # matplotlib is slow to import

    folder = beside(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_file(path, page(made, table, command).encode())
    write_file(folder / RECORDS, as_csv(table))
    paths = [path, folder / RECORDS]
    for name, figure, key in (
        ("multipliers", multipliers(made), _budgets_key(made)),
        ("loss", curves(made), _recipes_key(made)),
    ):
        for form, data in drawn([figure], key).items():
            paths.append(folder / f"{name}.{form}")
            write_file(paths[-1], data)
    return paths


def page(made: Multipliers, table: pd.DataFrame, command: Sequence[str]) -> str:
    """Return the page as HTML. table: the records; command: the command line that made it."""
    return render(
        _TEMPLATE, title=f"Recipes against {made.base}", source=head_of(made),
        lead=[read_as(made)], sections=sections(made, table, command),
        plotly=Markup(get_plotlyjs()),
    )  # fmt: skip


def sections(made: Multipliers, table: pd.DataFrame, command: Sequence[str]) -> list[Section]:
    """Return the sections: answers, pictures, doubts, numbers, learning rates, origin."""
    level, doubts = f"{made.job.level:.0%}", list[Cell](made.doubts)
    return [
        Section("answer", "Answer", rows=[[c.name, verdict(c, made)] for c in made.candidates]),
        Section("multipliers", "Compute multipliers", [
            ("multiplier", multipliers(made),
             f"How many times less compute a recipe needs than {made.base} for the same loss, with "
             f"{level} intervals. At the left of the line it needs more. Star: fresh seeds alone. "
             f"A line without a dot: {made.base} never has that loss, and its end is all that is "
             "shown."),
        ], key=_budgets_key(made)),
        Section("curves", "Loss against compute", [
            ("loss", curves(made),
             f"Line: {made.base}, as its multipliers are read from it. Dots: the mean loss at the "
             "tuned learning rate. Below the line a recipe needs less compute."),
        ], key=_recipes_key(made)),
        Section("notes", "Reasons for doubt", after=doubts,
                absent="" if doubts else "No reason was found to doubt the numbers."),
        Section("numbers", "In numbers", rows=_numbers(made), head=True),
        Section("rates", "How each recipe was tuned", rows=_rates(made), head=True),
        provenance("", StudyEvidence(table), made.where, command),
    ]  # fmt: skip


def _colours(made: Multipliers) -> dict[str, str]:
    return {c.name: LINES[i % len(LINES)] for i, c in enumerate(made.candidates)}


def _recipes_key(made: Multipliers) -> list[tuple[Cell, str]]:
    return [(made.base, INK), *_colours(made).items()]


def _shades(made: Multipliers) -> dict[float, str]:
    budgets = {p.cell.budget for c in made.candidates for p in c.places}
    return style.shades(np.array(sorted(budgets)))


def _budgets_key(made: Multipliers) -> list[tuple[Cell, str]]:
    return flops_key(_shades(made))


def multipliers(made: Multipliers) -> go.Figure:
    """Return the figure of all multipliers: a row a recipe, best first."""
    candidates, shades = made.candidates, _shades(made)
    every = [x for c in candidates for p in c.places for x in _finite(p)] + [1.0]
    low, high = min(every) / 1.15, max(every) * 1.15
    of_x = {**style.logarithmic([low, high]), "range": np.log10([low, high]).tolist()}
    names = [c.name for c in candidates]
    height = _MARGIN + _ROW * len(names)
    figure = style.axes("compute multiplier", "", of_x, style.ordinal(names, down=True), height)
    figure.add_trace(style.line(np.ones(2), np.array([-0.6, len(names) - 0.4]), FAINT, "dash"))
    offsets = dict(zip(shades, np.linspace(-_APART / 2, _APART / 2, len(shades)), strict=True))
    for row, one in enumerate(candidates):
        for p in one.places:
            at, colour = row + offsets[p.cell.budget], shades[p.cell.budget]
            ends = np.clip([[p.multiplier.low], [p.multiplier.high]], low, high)
            figure.add_trace(style.segments(ends, [at], colour, 2.0))
            if 0 < p.multiplier.value < np.inf:
                x, is_open = np.array([p.multiplier.value]), np.array([False])
                text = [_text(one, p)]
                figure.add_trace(style.dots(x, np.array([at]), [colour], is_open, text))
            if p.confirmed is not None:
                figure.add_trace(_star(one, p.confirmed, at, (low, high)))
    return figure


def _star(one: Candidate, fresh: Ratio, at: float, ends: tuple[float, float]) -> go.Scatter:
    text = f"<b>{style.wrapped(one.name)}</b><br>fresh seeds {fresh.value:.4g}<br>{interval(fresh)}"
    made: go.Scatter = style.star(float(np.clip(fresh.value, *ends)), at, text)
    made.name = "fresh seeds"
    return made


def _finite(place: Place) -> list[float]:
    fresh = [] if place.confirmed is None else [place.confirmed.value]
    m = place.multiplier
    return [x for x in (m.low, m.value, m.high, *fresh) if 0 < x < np.inf]


def _text(one: Candidate, p: Place) -> str:
    return (
        f"<b>{style.wrapped(one.name)}</b><br>C {p.cell.flops:.4g}<br>multiplier {number_of(p)}<br>"
        f"{span_of(p)}"
    )


def curves(made: Multipliers) -> go.Figure:
    """Return the figure of the base's curve and the loss of each recipe."""
    log_c, colours = made.curve.log_flops, _colours(made)
    losses = np.exp(np.linspace(made.curve.log_losses[0], made.curve.log_losses[-1], _FINE))
    at = np.exp(made.curve.log_compute(np.log(losses)))
    is_on = np.isfinite(at)
    seen = np.exp([c.log_loss for c in made.cells])
    of_x = style.logarithmic(np.exp(log_c), power=True)
    figure = style.axes("C (FLOPs)", "loss", of_x, style.logarithmic(seen))
    figure.add_trace(style.line(at[is_on], losses[is_on], INK))
    for name in (made.base, *colours):
        cells = made.of(name)
        x, y = np.array([c.flops for c in cells]), np.exp([c.log_loss for c in cells])
        text = [f"<b>{style.wrapped(name)}</b><br>C {c.flops:.4g}<br>loss {np.exp(c.log_loss):.5g}"
                f"<br>{len(c.logs)} runs" for c in cells]  # fmt: skip
        colour = [colours.get(name, INK)] * len(cells)
        figure.add_trace(style.dots(x, y, colour, np.zeros(len(cells), bool), text))
    return figure


def _numbers(made: Multipliers) -> list[list[Cell]]:
    level = f"{made.job.level:.0%}"
    rows: list[list[Cell]] = [["recipe", "C", "loss", "multiplier", level, "fresh seeds", level]]
    for c in made.of(made.base):
        rows.append([c.recipe, number(c.flops, 4), number(np.exp(c.log_loss)), "", "", "", ""])
    for one in made.candidates:
        for p in one.places:
            own = [number(p.cell.flops, 4), number(np.exp(p.cell.log_loss))]
            fresh = ["", ""] if p.confirmed is None else _ratio(p.confirmed)
            if p.confirmed is not None and not 0 < p.confirmed.value < np.inf:
                fresh[0] = fresh_of(p)
            value = _ratio(p.multiplier)
            if not 0 < p.multiplier.value < np.inf:
                value[0] = number_of(p)
            rows.append([one.name, *own, *value, *fresh])
        for label, ratio in (("mean", one.mean), ("a decade", one.trend)):
            if ratio is not None:
                rows.append([one.name, label, "", *_ratio(ratio), "", ""])
    return rows


def _ratio(ratio: Ratio) -> list[Cell]:
    if not 0 < ratio.low <= ratio.high < np.inf:
        return [number(ratio.value), interval(ratio)]
    return [number(ratio.value), span((ratio.low, ratio.high))]


def _rates(made: Multipliers) -> list[list[Cell]]:
    rows: list[list[Cell]] = [
        ["recipe", "C", "tried", "taken", "bracketed", "runs", "diverged"],
    ]
    for name in (made.base, *(c.name for c in made.candidates)):
        rows += [_tuning(c) for c in made.of(name)]
    return rows


def _tuning(c: RecipeCell) -> list[Cell]:
    said = {True: "yes", False: "no: at the edge", None: "no: fewer than three"}
    tried = Markup(", ").join(number(rate, 2) for rate in c.rates)
    return [c.recipe, number(c.flops, 4), tried, number(c.learning_rate, 2), said[c.is_bracketed],
            str(len(c.logs)), str(c.diverged)]  # fmt: skip
