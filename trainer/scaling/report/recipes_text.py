"""The compute multipliers of recipes as text for the terminal.

Invariant: everything that makes the numbers doubtful is printed with them.
"""

import numpy as np
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape

from forescale.pages.document import Cell, grid, number, span
from forescale.scaling.analysis.multipliers import Candidate, Multipliers, Place
from forescale.scaling.analysis.ratio import Ratio
from forescale.scaling.analysis.recipe_cells import RecipeCell


def show_recipes(results: Multipliers, console: Console) -> None:
    """Print the multiplier of each recipe at each budget, its mean and trend, and the doubts."""
    console.print(head_of(results) + "\n", soft_wrap=True)
    console.print(grid(multiplier_rows(results)))
    console.print()
    console.print(grid(rate_rows(results)))
    console.print("\n" + read_as(results), soft_wrap=True)
    for one in results.candidates:
        console.print(
            f"[bold]{escape(one.name)}[/]: {escape(verdict(one, results))}", soft_wrap=True
        )
    for doubt in results.doubts:
        console.print(f"[yellow]Note:[/] {escape(doubt)}", soft_wrap=True)


def head_of(results: Multipliers) -> str:
    """Return what was compared with what, as a sentence."""
    cells = results.of(results.base)
    runs = sum(len(c.logs) + len(c.fresh) for c in results.cells)
    noise = f"{results.noise.sd:.2%}" if results.noise.free else "unknown"
    return (
        f"{len(results.candidates)} recipes against {results.base}, which has {len(cells)} budgets "
        f"from {cells[0].flops:.3g} to {cells[-1].flops:.3g} FLOPs; {runs} runs at tuned learning "
        f"rates; noise of a run by its seed {noise}."
    )


def read_as(results: Multipliers) -> str:
    """Return what a multiplier means, and how far these reach."""
    low, high = (x.flops for x in (results.of(results.base)[0], results.of(results.base)[-1]))
    return (
        f"Multiplier: the compute that {results.base} needs for the recipe's loss, over the "
        f"recipe's; above 1 the recipe needs less. Shown for small models, {low:.2g} to {high:.2g} "
        "FLOPs. The trend of a recipe hints at larger models and proves nothing about them."
    )


def verdict(one: Candidate, results: Multipliers) -> str:
    """Return in a sentence what is shown about a recipe at its highest budget."""
    top, level = one.top, f"{results.job.level:.0%}"
    at = f"at {top.cell.budget:.3g} FLOPs"
    if not results.noise.free:
        text = f"{number_of(top)} times {at}; without repeated runs nothing is shown."
    elif top.multiplier.includes_one:
        text = f"no difference from {results.base} is shown {at} ({level}: {span_of(top)})."
    else:
        less = "less" if top.multiplier.low > 1 else "more"
        text = f"needs {less} compute than {results.base} {at}: {number_of(top)} ({level}: "
        text += f"{span_of(top)})."
    if (fresh := top.confirmed) is not None:
        holds = "confirm it" if fresh.low > 1 else "do not confirm it"
        text += f" Fresh seeds {holds}: {fresh_of(top)} ({interval(fresh)})."
    return f"{text} {trend_of(one, results)}".strip()


def trend_of(one: Candidate, results: Multipliers) -> str:
    """Return whether the multiplier changes with compute, as a sentence; empty if unknown."""
    if one.trend is None or not results.noise.free:
        return ""
    by = f"{one.trend.value:.3g} times a decade ({interval(one.trend)})"
    if one.trend.includes_one:
        return f"No trend is shown: {by}."
    return f"It {'grows' if one.trend.value > 1 else 'shrinks'} with compute: {by}."


def number_of(place: Place) -> str:
    """Return a multiplier, or the bound that the base's budgets give it."""
    return _bounded(place.multiplier, place.reach)


def fresh_of(place: Place) -> str:
    """Return the multiplier of fresh seeds alone, or its bound; empty without fresh seeds."""
    return "" if place.confirmed is None else _bounded(place.confirmed, place.reach)


def _bounded(ratio: Ratio, reach: tuple[float, float]) -> str:
    if ratio.value == np.inf:
        return f"> {reach[1]:.3g}"
    return f"{ratio.value:.3g}" if ratio.value else f"< {reach[0]:.3g}"


def span_of(place: Place) -> str:
    """Return the interval of a multiplier; an end that the base's budgets don't show is open."""
    return interval(place.multiplier)


def interval(ratio: Ratio) -> str:
    """Return an interval as text."""
    if not ratio.low and ratio.high == np.inf:
        return "unknown"
    low = f"{ratio.low:.3g}" if ratio.low else "no lower end"
    return f"{low} to {ratio.high:.3g}" if ratio.high < np.inf else f"{low} to no upper end"


def multiplier_rows(results: Multipliers) -> list[list[Cell]]:
    """Return a row for each cell of the base, and for each recipe and budget its multiplier."""
    level = f"{results.job.level:.0%}"
    rows: list[list[Cell]] = [["recipe", "C", "loss", "multiplier", level, "fresh seeds", level]]
    for c in results.of(results.base):
        rows.append([c.recipe, number(c.flops, 4), number(np.exp(c.log_loss)), "", "", "", ""])
    for one in results.candidates:
        for p in one.places:
            cells = [number(p.cell.flops, 4), number(np.exp(p.cell.log_loss))]
            fresh = ["", ""] if p.confirmed is None else _ratio(p.confirmed)
            if p.confirmed is not None and not 0 < p.confirmed.value < np.inf:
                fresh[0] = fresh_of(p)
            value = _ratio(p.multiplier)
            if not 0 < p.multiplier.value < np.inf:
                value[0] = number_of(p)
            rows.append([one.name, *cells, *value, *fresh])
        for label, ratio in (("mean", one.mean), ("a decade", one.trend)):
            if ratio is not None:
                rows.append([one.name, label, "", *_ratio(ratio), "", ""])
    return rows


def _ratio(ratio: Ratio) -> list[Cell]:
    if not 0 < ratio.low <= ratio.high < np.inf:
        return [number(ratio.value), interval(ratio)]
    return [number(ratio.value), span((ratio.low, ratio.high))]


def rate_rows(results: Multipliers) -> list[list[Cell]]:
    """Return a row for each cell: the learning rates that were tried, and the best one."""
    rows: list[list[Cell]] = [
        ["recipe", "C", "tried", "taken", "bracketed", "runs", "diverged"],
    ]
    for name in (results.base, *(c.name for c in results.candidates)):
        rows += [_tuning(c) for c in results.of(name)]
    return rows


def _tuning(c: RecipeCell) -> list[Cell]:
    answers = {True: "yes", False: "no: at the edge", None: "no: fewer than three"}
    tried = Markup(", ").join(number(rate, 2) for rate in c.rates)
    bracketed = answers[c.is_bracketed]
    return [c.recipe, number(c.flops, 4), tried, number(c.learning_rate, 2), bracketed,
            str(len(c.logs)), str(c.diverged)]  # fmt: skip
