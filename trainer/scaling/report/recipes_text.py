"""The compute multipliers of recipes as text for the terminal.

Invariant: everything that makes the numbers doubtful is printed with them.
"""

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from forescale.console import table
from forescale.scaling.analysis.multipliers import Candidate, Multipliers, Place
from forescale.scaling.analysis.ratio import Ratio
from forescale.scaling.analysis.recipe_cells import RecipeCell


def show_recipes(results: Multipliers, console: Console) -> None:
    """Print the multiplier of each recipe at each budget, its mean and trend, and the doubts."""
    console.print(head_of(results) + "\n", soft_wrap=True)
    console.print(_table(results))
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


def _table(results: Multipliers) -> Table:
    level = f"{results.job.level:.0%}"
    names = ("recipe", "C", "loss", "rate", "runs", "multiplier", level, "fresh")
    grid = table(*names, left=("recipe",))
    for c in results.of(results.base):
        grid.add_row(escape(c.recipe), *_cells(c), "", "", "")
    for one in results.candidates:
        for p in one.places:
            numbers = (number_of(p), span_of(p), fresh_of(p))
            grid.add_row(escape(one.name), *_cells(p.cell), *numbers)
        if one.mean is not None:
            grid.add_row("", "", "", "", "mean", f"{one.mean.value:.3g}", interval(one.mean), "")
    return grid


def _cells(c: RecipeCell) -> tuple[str, str, str, str]:
    mark = "" if c.is_bracketed else "?"
    return (
        f"{c.flops:.3g}", f"{np.exp(c.log_loss):.4f}", f"{c.learning_rate:.2g}{mark}",
        f"{len(c.logs)}",
    )  # fmt: skip
