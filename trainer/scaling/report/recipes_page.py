"""`study report` of recipes: one page of their compute multipliers, and the pictures for papers.

    multipliers   a row for each recipe that was tried, a dot and an interval for each budget, a
                  line at 1
    loss          the base's curve, and the loss of each recipe at its own compute

Invariant: the numbers of the comparison, nothing smoothed; the same comparison gives the same
bytes.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from forescale.pages.document import Cell, Section, render
from forescale.pages.figure import (
    FAINT,
    INK,
    LINES,
    Axis,
    Figure,
    dots,
    line,
    ordinal,
    segments,
    shades,
    star,
)
from forescale.scaling.analysis.multipliers import Candidate, Multipliers, Place
from forescale.scaling.report.evidence import StudyEvidence
from forescale.scaling.report.fit_figures import flops_key
from forescale.scaling.report.fit_page import write_report
from forescale.scaling.report.provenance import provenance
from forescale.scaling.report.recipes_text import (
    head_of,
    interval,
    multiplier_rows,
    number_of,
    rate_rows,
    read_as,
    span_of,
    verdict,
)

_APART = 0.5  # of a row's height, over which its budgets are spread
_ROW, _MARGIN = 46, 130  # pixels of a row; of axis and title together
_FINE = 61


def write(
    results: Multipliers, table: pd.DataFrame, path: Path, command: Sequence[str]
) -> list[Path]:
    """Write the page, and beside it the pictures as PNG and SVG and the records; return the
    paths."""
    by_name = {s.name: s for s in sections(results, table, command)}
    pictures = {"multipliers": by_name["multipliers"], "loss": by_name["curves"]}
    return write_report(path, page(results, table, command), pictures, table)


def page(results: Multipliers, table: pd.DataFrame, command: Sequence[str]) -> str:
    """Return the page as HTML. table: the records; command: the command line that results it."""
    return render(
        title=f"Recipes against {results.base}",
        intro=head_of(results),
        lead=[read_as(results)],
        sections=sections(results, table, command),
    )


def sections(results: Multipliers, table: pd.DataFrame, command: Sequence[str]) -> list[Section]:
    """Return the sections: answers, pictures, doubts, numbers, learning rates, origin."""
    answers: list[list[Cell]] = [[c.name, verdict(c, results)] for c in results.candidates]
    level, doubts = f"{results.job.level:.0%}", list[Cell](results.doubts)
    return [
        Section("answer", "Answer", rows=answers),
        Section("multipliers", "Compute multipliers", [
            ("multiplier", multipliers(results),
             f"How many times less compute a recipe needs than {results.base} for the same loss, "
             f"with {level} intervals. Left of the line it needs more. Star: fresh seeds alone. A "
             f"line without a dot: {results.base} never has that loss; only a bound is known."),
        ], key=_budgets_key(results)),
        Section("curves", "Loss against compute", [
            ("loss", curves(results),
             f"Line: the losses of {results.base}, from which multipliers are read. Dots: the mean "
             "loss at the tuned learning rate. Below the line a recipe needs less compute."),
        ], key=_recipes_key(results)),
        Section("notes", "Reasons for doubt", after=doubts,
                absent="" if doubts else "No reason was found to doubt the numbers."),
        Section("numbers", "In numbers", rows=multiplier_rows(results), head=True),
        Section("rates", "How each recipe was tuned", rows=rate_rows(results), head=True),
        provenance("", StudyEvidence(table), results.where, command),
    ]  # fmt: skip


def _colours(results: Multipliers) -> dict[str, str]:
    return {c.name: LINES[i % len(LINES)] for i, c in enumerate(results.candidates)}


def _recipes_key(results: Multipliers) -> list[tuple[Cell, str]]:
    return [(results.base, INK), *_colours(results).items()]


def _budget_shades(results: Multipliers) -> dict[float, str]:
    budgets = {p.cell.budget for c in results.candidates for p in c.places}
    return shades(np.array(sorted(budgets)))


def _budgets_key(results: Multipliers) -> list[tuple[Cell, str]]:
    return flops_key(_budget_shades(results))


def multipliers(results: Multipliers) -> Figure:
    """Return the figure of all multipliers: a row for each recipe, the best one first."""
    candidates, colours = results.candidates, _budget_shades(results)
    every = [x for c in candidates for p in c.places for x in _finite(p)] + [1.0]
    low, high = min(every) / 1.15, max(every) * 1.15
    names = [c.name for c in candidates]
    height = _MARGIN + _ROW * len(names)
    across = Axis("compute multiplier", log=True, ends=(low, high))
    figure = Figure(across, ordinal("", names, down=True), height)
    figure.add(line(np.ones(2), np.array([-0.6, len(names) - 0.4]), FAINT, "dash"))
    offsets = dict(zip(colours, np.linspace(-_APART / 2, _APART / 2, len(colours)), strict=True))
    for row, one in enumerate(candidates):
        for p in one.places:
            at, colour = row + offsets[p.cell.budget], colours[p.cell.budget]
            ends = np.clip([[p.multiplier.low], [p.multiplier.high]], low, high)
            figure.add(segments(ends, [at], colour, 2.0))
            if 0 < p.multiplier.value < np.inf:
                x = np.array([p.multiplier.value])
                figure.add(dots(x, np.array([at]), [colour], [_text(one, p)]))
            if (fresh := p.confirmed) is not None:
                text = f"{one.name}\nfresh seeds {fresh.value:.4g}\n{interval(fresh)}"
                middle = float(np.clip(fresh.value, low, high))
                figure.add(star(middle, at, text, name="fresh seeds"))
    return figure


def _finite(place: Place) -> list[float]:
    fresh = [] if place.confirmed is None else [place.confirmed.value]
    m = place.multiplier
    return [x for x in (m.low, m.value, m.high, *fresh) if 0 < x < np.inf]


def _text(one: Candidate, p: Place) -> str:
    return f"{one.name}\nC {p.cell.flops:.4g}\nmultiplier {number_of(p)}\n{span_of(p)}"


def curves(results: Multipliers) -> Figure:
    """Return the figure of the base's curve and the loss of each recipe."""
    curve, colours = results.curve, _colours(results)
    losses = np.exp(np.linspace(curve.log_losses[0], curve.log_losses[-1], _FINE))
    at = np.exp(curve.log_compute(np.log(losses)))
    is_on = np.isfinite(at)
    figure = Figure(Axis("C (FLOPs)", log=True, power=True), Axis("loss", log=True))
    figure.add(line(at[is_on], losses[is_on], INK))
    for name in (results.base, *colours):
        cells = results.of(name)
        x, y = np.array([c.flops for c in cells]), np.exp([c.log_loss for c in cells])
        texts = [f"{name}\nC {c.flops:.4g}\nloss {np.exp(c.log_loss):.5g}\n{len(c.logs)} runs"
                 for c in cells]  # fmt: skip
        figure.add(dots(x, y, [colours.get(name, INK)], texts))
    return figure
