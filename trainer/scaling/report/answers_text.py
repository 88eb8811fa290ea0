"""Prints the answers of `study compare`, `rates` and `profile` in the terminal.

Invariant: everything that makes the numbers doubtful is printed with them.
"""

from collections.abc import Sequence

from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from forescale.ground.console import table
from forescale.pages.document import Cell, grid, number, percent, span
from forescale.scaling.analysis.comparison import Comparison, Place
from forescale.scaling.analysis.ratio import Ratio
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.design.rate_laws import BATCH, SYMBOLS, RateLaw, RateLaws
from forescale.scaling.fitting.profile import Profile


def show_comparison(comparison: Comparison, console: Console) -> None:
    """Print the multiplier over the range and at the target, and what makes it doubtful."""
    for letter, side in (("A", comparison.a), ("B", comparison.b)):
        low, high = side.ends
        high_loss, low_loss = side.losses
        verdict = "certified" if side.study.fit.certificate.holds else "[red]not certified[/]"
        console.print(
            f"{letter} [bold]{escape(side.name)}[/]: {len(side.study.points)} runs, C {low:.3g} to "
            f"{high:.3g}, {escape(side.study.form.name)}, {verdict}; along its path the loss falls "
            f"from {high_loss:.4g} to {low_loss:.4g}",
            soft_wrap=True,
        )
    console.print(path_of(comparison) + "\n", soft_wrap=True)
    console.print(grid(place_rows(comparison)))
    console.print(
        "Multiplier: the compute that A needs for the loss over that of B. Loss of B: relative to "
        "the loss of A, at A's compute.",
        soft_wrap=True,
    )
    if comparison.mean is not None:
        console.print(f"\n[bold]Over the common range[/]: {escape(comparison.summary)}",
                      soft_wrap=True)  # fmt: skip
        if (text := trend_of(comparison)) is not None:
            console.print(escape(text), soft_wrap=True)
    else:
        console.print("\nNo loss is reached by both within the compute of their runs.")
    if comparison.target is not None and comparison.predictions is not None:
        verdict = escape(comparison.verdict(comparison.target.multiplier))
        console.print(f"[bold]At the target[/]: {verdict}", soft_wrap=True)
        for side, f in zip((comparison.a, comparison.b), comparison.predictions, strict=True):
            console.print(
                f"  {escape(side.name)}, trained with it: loss {f.loss:.4f}, "
                f"{comparison.level:.0%} interval {f.outer[0]:.4f} to {f.outer[1]:.4f}",
                soft_wrap=True,
            )
    for note in comparison.notes:
        console.print(f"[yellow]Note:[/] {escape(note)}", soft_wrap=True)


def path_of(comparison: Comparison) -> str:
    """Return along which runs the two are compared, as a sentence."""
    if (ratio := comparison.a.path.ratio) is not None:
        return f"Compared at {ratio:.4g} tokens per parameter, those of the target."
    return "Compared along the compute-optimal runs of each."


def trend_of(comparison: Comparison) -> str | None:
    """Return whether the multiplier changes with scale, as a sentence; None without a range."""
    if (trend := comparison.trend) is None:
        return None
    first, last = (
        place.multiplier.value for place in (comparison.places[0], comparison.places[-1])
    )
    moves = f"from {first:.3g} at the highest loss to {last:.3g} at the lowest"
    if trend.includes_one:
        return f"It goes {moves}; a multiplier that stays the same is inside the interval."
    return f"It goes {moves}: it changes with scale, so quote it at the scale that you need."


def place_rows(comparison: Comparison) -> list[list[Cell]]:
    """Return a row for each loss of the range, the mean of all, and the target: the compute of
    both, the multiplier, and the loss of B relative to that of A at equal compute."""
    level = f"{comparison.level:.0%}"
    flops = [f"C of {comparison.a.name}", f"C of {comparison.b.name}"]
    rows: list[list[Cell]] = [["loss", *flops, "multiplier", level, "loss of B", level]]
    rows += [[number(place.loss), *_cells(place)] for place in comparison.places]
    if comparison.mean is not None:
        rows.append(["mean of the range", "", "", *_ratio(comparison.mean), "", ""])
    if (target := comparison.target) is not None:
        loss = Markup("{} (target)").format(number(target.loss))
        rows.append([loss, *_cells(target)])
    return rows


def _cells(place: Place) -> list[Cell]:
    losses = place.loss_ratio
    change, low, high = (percent(x - 1, sign="+") for x in (losses.value, losses.low, losses.high))
    ends = Markup("{} to {}").format(low, high)
    return [*(number(c, 4) for c in place.flops), *_ratio(place.multiplier), change, ends]


def _ratio(ratio: Ratio) -> list[Cell]:
    if not 0 < ratio.low <= ratio.high < float("inf"):
        high = number(ratio.high) if ratio.high < float("inf") else "no upper end"
        return [number(ratio.value), Markup("{} to {}").format(number(ratio.low), high)]
    return [number(ratio.value), span((ratio.low, ratio.high))]


def show_rates(laws: RateLaws, console: Console, where: str) -> None:
    """Print the laws of the best learning rate and batch, their values for the target, refusals."""
    console.print(f"[bold]{escape(where)}[/]: {len(laws.optima)} sweeps with an optimum inside")
    console.print()
    level = f"{laws.job.level:.0%}"
    console.print(_rate_laws([law for law in (laws.rate, laws.batch) if law], laws.job.level))
    if laws.cost is not None:
        console.print(
            f"At twice the best learning rate the loss is {laws.cost:.2%} higher (median)."
        )
    for name, (value, low, high) in laws.target.items():
        unit = " tokens" if name == BATCH else ""
        console.print(
            f"[bold]For the target[/]: best {name} {value:.3g}{unit}, {level} interval "
            f"{low:.3g} to {high:.3g}",
            soft_wrap=True,
        )
    for one in laws.refused:
        console.print(
            f"  no optimum at N {one.at['parameters']:.3g}, D {one.at['tokens']:.3g}: {one.why}",
            soft_wrap=True,
        )
    for note in laws.notes:
        console.print(f"[yellow]Note:[/] {escape(note)}", soft_wrap=True)


def _rate_laws(laws: Sequence[RateLaw], level: float) -> Table:
    """Return a row for each law: its coefficient and its exponents with intervals."""
    names = [f"exponent of {SYMBOLS[c]}" for c in laws[0].columns]
    ends = [column for name in names for column in (name, f"{level:.0%} interval")]
    columns = table("best", "sweeps", "k", *ends, "scatter", left=("best",))
    for law in laws:
        cells = [
            cell
            for value, low, high in law.exponents(level).values()
            for cell in (f"{value:.3f}", f"{low:.3f} to {high:.3f}")
        ]
        count = str(law.freedom + len(law.columns) + 1)
        columns.add_row(law.quantity, count, f"{law.k:.4g}", *cells, f"{law.scatter:.1%}")
    return columns


def show_profiles(
    profiles: Sequence[Profile], study: StudyFit, console: Console, where: str
) -> None:
    """Print each profile interval beside that of the resampled fits, and what stays open."""
    level = f"{study.job.level:.0%}"
    console.print(
        f"[bold]{escape(where)}[/]: {len(study.points)} runs, {escape(study.form.source)}"
    )
    low, high = study.replicates.interval(study.job.level)
    rows = table("", "value", f"{level} low", "high", "resampled low", "high", left=("",))
    for one in profiles:
        i = study.form.symbols.index(one.symbol)
        ends = ("open" if end is None else f"{end:.5g}" for end in (one.low, one.high))
        rows.add_row(one.symbol, f"{one.value:.5g}", *ends, f"{low[i]:.5g}", f"{high[i]:.5g}")
    console.print(rows)
    for one in profiles:
        sides = [side for side, end in (("below", one.low), ("above", one.high)) if end is None]
        if sides:
            console.print(
                f"[yellow]Note:[/] {one.symbol} is open {' and '.join(sides)}: to the end of its "
                "range the fit is not clearly worse, so these runs don't determine it there.",
                soft_wrap=True,
            )
    for note in (*study.doubts, *study.notes):
        console.print(f"[yellow]Note:[/] {escape(note)}", soft_wrap=True)
