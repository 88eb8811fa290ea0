"""Compute multipliers of recipes: the sections for the terminal and the page, and the pictures.

    multipliers   a row for each recipe that was tried, a dot and an interval for each budget, a
                  line at 1
    loss          the base's curve, and the loss of each recipe at its own compute

Invariant: the numbers of the comparison, nothing smoothed; the same comparison gives the same
bytes. Everything that makes the numbers doubtful is shown with them.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from markupsafe import Markup

from forescale.pages import figure as chart
from forescale.pages.document import Cell, Section, number, render
from forescale.scaling.analysis.multipliers import Candidate, Multipliers
from forescale.scaling.analysis.ratio import Ratio
from forescale.scaling.analysis.recipe_cells import RecipeCell
from forescale.scaling.report.comparison_page import ratio_cells
from forescale.scaling.report.evidence import StudyEvidence
from forescale.scaling.report.fit_figures import flops_key
from forescale.scaling.report.fit_page import write_report
from forescale.scaling.report.fit_sections import reasons
from forescale.scaling.report.provenance import provenance

_COSTS = {"seconds": "seconds", "parameters": "parameters", "bytes": "bytes of text"}
_APART = 0.5  # of a row's height, over which its budgets are spread
_ROW, _MARGIN = 46, 130  # pixels of a row; of axis and title together
_FINE = 61


def write(
    results: Multipliers, table: pd.DataFrame, path: Path, command: Sequence[str]
) -> list[Path]:
    """Write the page, and beside it the pictures as PNG and SVG and the records; return the
    paths."""
    html, (_, multiplier, loss, *_) = page(results, table, command)
    return write_report(path, html, {"multipliers": multiplier, "loss": loss}, table)


def page(
    results: Multipliers, table: pd.DataFrame, command: Sequence[str]
) -> tuple[str, list[Section]]:
    """Return the page as HTML, and its sections. table: the records; command: the command line."""
    answer, *numbers = recipe_sections(results)
    lead, answer.after = answer.after, []  # above all sections
    origin = provenance("", StudyEvidence(table), results.where, command)
    sections = [answer, *_pictures(results), *numbers, origin]
    title, intro = f"Recipes against {results.base}", head_of(results)
    return render(title=title, intro=intro, lead=lead, sections=sections), sections


def head_of(results: Multipliers) -> str:
    """Return what was compared with what, as a sentence."""
    cells = results.of(results.base)
    runs = sum(map(len, (y for c in results.cells for y in (c.logs, c.fresh))))
    noise = f"{results.noise.sd:.2%}" if results.noise.free else "unknown"
    return (
        f"{len(results.candidates)} recipes against {results.base}, which has {len(cells)} budgets "
        f"from {cells[0].flops:.3g} to {cells[-1].flops:.3g} FLOPs; {runs} runs at the best "
        f"settings; noise of a run by its seed {noise}."
    )


def recipe_sections(results: Multipliers) -> list[Section]:
    """Return the sections without pictures: answers, doubts, numbers, learning rates."""
    base, level = results.of(results.base), f"{results.job.level:.0%}"
    meaning = (
        f"Multiplier: the compute that {results.base} needs for the recipe's loss, over the "
        f"recipe's; above 1 the recipe needs less. Shown for small models, {base[0].flops:.2g} to "
        f"{base[-1].flops:.2g} FLOPs. The trend of a recipe hints at larger models and proves "
        "nothing about them. Fresh seeds: of both, each at its best of the settings tried. The "
        "other intervals don't know how lucky a search was."
    )
    costs = [_COSTS[name] for name in results.costs]
    columns = ["recipe", "C", "N x D/N", "loss", "multiplier", level, *costs, "fresh seeds", level]
    rows: list[list[Cell]] = [[*columns]]
    for c in base:
        at = [number(c.flops, 4), _size(c), number(np.exp(c.log_loss))]
        rows.append([c.recipe, *at, *[""] * (len(columns) - 4)])
    rates: list[list[Cell]] = [
        ["recipe", "C", "tried", "taken", "bracketed", "seeds", "diverged of all"]
    ]
    for one in results.candidates:
        for p in one.places:
            fresh = _cells(p.confirmed, p.confirmed_reach)
            cells = [number(p.cell.flops, 4), _size(p.cell), number(np.exp(p.cell.log_loss))]
            values = [p.others[name].value for name in results.costs]
            others = [number(x) if 0 < x < np.inf else "-" for x in values]
            rows.append([one.name, *cells, *_cells(p.multiplier, p.reach), *others, *fresh])
        for label, ratio in (("mean", one.mean), ("trend per tenfold C", one.trend)):
            if ratio is not None:
                rows.append([one.name, label, "", "", *_cells(ratio), *[""] * (len(costs) + 2)])
    if results.costs:
        meaning += (
            f" The other multipliers are what {results.base} needs of {', '.join(costs)} for the "
            "same loss, divided by what the recipe has, without intervals."
        )
    if "seconds" in results.costs:
        meaning += (
            " Seconds are those of the median step times the steps, on the machine of these runs "
            "and at their small sizes; other work beside them, and another machine, change them."
        )
    bracketed = {True: "yes", False: "no: at the edge", None: "no: fewer than three"}
    for name in (results.base, *(c.name for c in results.candidates)):
        for c in results.of(name):
            ends = number(c.rates[0], 2), number(c.rates[-1], 2)
            rates.append([
                c.recipe, number(c.flops, 4), Markup("{}, {} to {}").format(len(c.rates), *ends),
                number(c.learning_rate, 2), bracketed[c.is_bracketed], str(len(c.logs)),
                str(c.diverged),
            ])  # fmt: skip
    answers: list[list[Cell]] = [[c.name, _verdict(c, results)] for c in results.candidates]
    return [
        Section("answer", "Answer", rows=answers, after=[meaning]),
        reasons(results.doubts),
        Section("numbers", "In numbers", rows=rows, head=True),
        Section("rates", "How each recipe was tuned", rows=rates, head=True),
    ]


def _size(c: RecipeCell) -> str:
    """Return N and D/N of a cell, as far as its table has them."""
    if c.ratio is None:
        return ""
    return f"{c.size:,.0f} x {c.ratio:.3g}"


def _verdict(one: Candidate, results: Multipliers) -> str:
    """Return in a sentence what is shown about a recipe at its highest budget, and its trend."""
    top, level = one.top, f"{results.job.level:.0%}"
    known = top.confirmed or top.multiplier
    reach = top.confirmed_reach if top.confirmed else top.reach
    value, ends = _value(known, reach), _interval(known)
    at = f"at {top.cell.budget:.3g} FLOPs{', by fresh seeds' if top.confirmed else ''}"
    if not results.noise.free:
        text = f"{value} times {at}; without repeated runs nothing is shown."
    elif known.includes_one:
        text = f"is not shown to differ from {results.base} {at} ({level}: {ends})."
    else:
        less = "less" if known.low > 1 else "more"
        text = f"needs {less} compute than {results.base} {at}: {value} ({level}: {ends})."
    if one.trend is None or not results.noise.free:
        return text
    by = f"{one.trend.value:.3g} times per tenfold compute, by searches ({_interval(one.trend)})"
    if one.trend.includes_one:
        return f"{text} No trend is shown: {by}."
    return f"{text} Its gain {'grows' if one.trend.value > 1 else 'shrinks'} with compute: {by}."


def _value(ratio: Ratio, reach: tuple[float, float]) -> str:
    """Return a multiplier, or the bound that the base's budgets give it."""
    if np.isnan(ratio.value):
        return "unknown"
    if ratio.value == np.inf:
        return f"> {reach[1]:.3g}"
    return f"{ratio.value:.3g}" if ratio.value else f"< {reach[0]:.3g}"


def _interval(ratio: Ratio) -> str:
    """Return an interval; an end that the base's budgets don't show is open."""
    if not ratio.low and ratio.high == np.inf:
        return "unknown"
    low = f"{ratio.low:.3g}" if ratio.low else "no lower end"
    return f"{low} to {ratio.high:.3g}" if ratio.high < np.inf else f"{low} to no upper end"


def _cells(ratio: Ratio | None, reach: tuple[float, float] = (0.0, np.inf)) -> list[Cell]:
    if ratio is None:
        return ["", ""]
    value, ends = ratio_cells(ratio)
    ends = ends if ratio.low or ratio.high < np.inf else "unknown"
    return [value if 0 < ratio.value < np.inf else _value(ratio, reach), ends]


def _pictures(results: Multipliers) -> list[Section]:
    """Return the sections of the multipliers and of the losses."""
    level, colours = f"{results.job.level:.0%}", _colours(results)
    return [
        Section("multipliers", "Compute multipliers", [
            ("multiplier", multipliers(results),
             f"How many times less compute a recipe needs than {results.base} for the same loss, "
             f"with {level} intervals. Left of the line it needs more. Star: fresh seeds alone. A "
             f"line without a dot: {results.base} never has that loss; only a bound is known."),
        ], key=flops_key(_budget_shades(results))),
        Section("curves", "Loss against compute", [
            ("loss", curves(results),
             f"Line: the losses of {results.base}, from which multipliers are read. Dots: the mean "
             "loss at the tuned learning rate. Below the line a recipe needs less compute."),
        ], key=[(results.base, chart.INK), *colours.items()]),
    ]  # fmt: skip


def _colours(results: Multipliers) -> dict[str, str]:
    return {c.name: chart.LINES[i % len(chart.LINES)] for i, c in enumerate(results.candidates)}


def _budget_shades(results: Multipliers) -> dict[float, str]:
    return chart.shades(np.array([p.cell.budget for c in results.candidates for p in c.places]))


def multipliers(results: Multipliers) -> chart.Figure:
    """Return the figure of all multipliers: a row for each recipe, the best one first."""
    candidates, colours = results.candidates, _budget_shades(results)
    ratios = [p.multiplier for c in candidates for p in c.places]
    every = [x for m in ratios for x in (m.low, m.value, m.high)]
    every += [p.confirmed.value for c in candidates for p in c.places if p.confirmed is not None]
    every = [x for x in every if 0 < x < np.inf] + [1.0]
    low, high = min(every) / 1.15, max(every) * 1.15
    names = [c.name for c in candidates]
    across = chart.Axis("compute multiplier", log=True, ends=(low, high))
    figure = chart.Figure(across, chart.ordinal("", names, down=True), _MARGIN + _ROW * len(names))
    figure.add(chart.line(np.ones(2), np.array([-0.6, len(names) - 0.4]), chart.FAINT, "dash"))
    offsets = dict(zip(colours, np.linspace(-_APART / 2, _APART / 2, len(colours)), strict=True))
    for row, one in enumerate(candidates):
        for p in one.places:
            m, at, colour = p.multiplier, row + offsets[p.cell.budget], colours[p.cell.budget]
            figure.add(chart.segments(np.clip([[m.low], [m.high]], low, high), [at], colour, 2.0))
            if 0 < m.value < np.inf:
                text = (f"{one.name}\nC {p.cell.flops:.4g}\nmultiplier {_value(m, p.reach)}\n"
                        f"{_interval(m)}")  # fmt: skip
                figure.add(chart.dots(np.array([m.value]), np.array([at]), [colour], [text]))
            if (fresh := p.confirmed) and not np.isnan(fresh.value):
                text = f"{one.name}\nfresh seeds {fresh.value:.4g}\n{_interval(fresh)}"
                middle = float(np.clip(fresh.value, low, high))
                figure.add(chart.star(middle, at, text, name="fresh seeds"))
    return figure


def curves(results: Multipliers) -> chart.Figure:
    """Return the figure of the base's curve and the loss of each recipe."""
    curve, colours = results.curve, _colours(results)
    losses = np.exp(np.linspace(curve.log_losses[0], curve.log_losses[-1], _FINE))
    at = np.exp(curve.log_compute(np.log(losses)))
    is_on = np.isfinite(at)
    figure = chart.Figure(
        chart.Axis("C (FLOPs)", log=True, power=True), chart.Axis("loss", log=True)
    )
    figure.add(chart.line(at[is_on], losses[is_on], chart.INK))
    for name in (results.base, *colours):
        cells = results.of(name)
        x, y = np.array([c.flops for c in cells]), np.exp([c.log_loss for c in cells])
        texts = [f"{name}\nC {c.flops:.4g}\nloss {np.exp(c.log_loss):.5g}\n{len(c.logs)} runs"
                 for c in cells]  # fmt: skip
        figure.add(chart.dots(x, y, [colours.get(name, chart.INK)], texts))
    return figure
