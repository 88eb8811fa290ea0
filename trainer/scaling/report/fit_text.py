"""Prints a fit in the terminal: the law, its uncertainty, its backtests, and the prediction.

Invariant: everything that makes the numbers doubtful is printed with them.
"""

from collections.abc import Sequence

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from forescale.console import table
from forescale.scaling.analysis.backtest import GROUPS, METHODS, RIVALS, Scores
from forescale.scaling.analysis.forecast import Forecast, Score
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.analysis.weights import effective
from forescale.scaling.forecasting.predictor import LEVEL, LINE
from forescale.scaling.report.words import doubt_of, skill_lines

_AHEAD = {1: "One budget ahead", 2: "Two budgets ahead"}


def show(made: StudyFit, console: Console, where: str) -> None:
    """Print the fit. where: how to call the runs."""
    fit, job = made.fit, made.job
    p = made.points
    console.print(f"[bold]{escape(where)}[/]: {len(p)} runs, {escape(made.form.source)}")
    columns = (("parameters N", p.parameters), ("tokens D", p.tokens), ("FLOPs C", p.flops))
    ranges = [f"{n} {x.min():.3g} to {x.max():.3g}" for n, x in columns if x is not None]
    console.print(f"{', '.join(ranges)}; loss {p.loss.min():.4g} to {p.loss.max():.4g}")
    _show_prediction(made, console)
    for line in skill_lines(made.skill):
        console.print(line, soft_wrap=True)
    first, *others = made.doubts or ["No reason was found to doubt these numbers."]
    console.print(f"[yellow]First doubt:[/] {escape(first)}" if made.doubts else first,
                  soft_wrap=True)  # fmt: skip
    console.print()
    console.print(_parameters(made))
    c = fit.certificate
    verdict = "certified" if c.holds else "[red]not certified[/]"
    console.print(
        f"Objective {fit.value:.10g}, {verdict}: scaled gradient {c.scaled_gradient:.1e}, "
        f"{len(c.minima)} minima from {sum(b.starts for b in c.minima) + c.failed_starts} starts; "
        f"{made.replicates.uncertified} of {job.bootstraps} resampled fits are not certified",
        soft_wrap=True,
    )
    if made.weights is not None:
        w, noise = made.weights, made.noise
        known = f"from {noise.freedom} repeats" if noise.freedom else "assumed"
        console.print(
            f"Weights ({job.weights}): the largest is {w.max() / w.min():.3g} times the smallest; "
            f"the effective number of runs is {effective(w):.1f}; noise of a run {noise.at:.2%}, "
            f"{known}",
            soft_wrap=True,
        )
    if made.allocation is not None:
        a, (low, high) = made.allocation
        console.print(f"By the law, N* grows as C^{a:.4f} ({low:.4f} to {high:.4f})")
    _show_isoflop(made, console)
    _show_backtests(made, console)
    _show_sensitivity(made, console)
    console.print("\nMost influential runs: " + ", ".join(n for n, _ in made.influence()))
    for doubt in others:
        console.print(f"[yellow]Doubt:[/] {escape(doubt)}", soft_wrap=True)
    for note in made.notes:
        console.print(f"Note: {escape(note)}", soft_wrap=True)


def _show_prediction(made: StudyFit, console: Console) -> None:
    if (f := made.predict()) is None:
        return
    level = f"{made.job.level:.0%}"
    best = ""
    if f.sizes is not None:
        (low_n, high_n), (low_d, high_d) = f.sizes
        best = (
            f"Best at {f.flops:.4g} FLOPs: N* {f.parameters:.4g} ({low_n:.3g} to {high_n:.3g}), "
            f"D* {f.tokens:.4g} ({low_d:.3g} to {high_d:.3g}). "
        )
    console.print(
        f"[bold]Prediction[/] for N {f.parameters:.4g}, D {f.tokens:.4g}, "
        f"{f.extrapolation_factor:.2g} times the compute of the largest run: loss {f.loss:.4f}; "
        f"50% interval {f.inner[0]:.4f} to {f.inner[1]:.4f}, {level} interval {f.outer[0]:.4f} to "
        f"{f.outer[1]:.4f}. {best}{doubt_of(made, f)}",
        soft_wrap=True,
    )


def show_score(found: Sequence[Forecast], made: Score, console: Console) -> None:
    """Print the forecasts beside the observed losses, and their score."""
    names = ("forecast", "run", "beyond", "predicted", "interval", "observed", "error")
    rows = table(*names, left=("run",))
    for forecast in found:
        f, o = forecast.facts, forecast.outcome
        ends = f"{f['interval'][0]:.4f} to {f['interval'][1]:.4f}"
        beyond = f"{f['target']['extrapolation_factor']:.3g} x"
        out = (f"{o['loss']:.4f}", f"{made.errors[forecast.id]:+.2%}") if o else ("-", "-")
        rows.add_row(
            forecast.id, escape(f["target"]["run"]), beyond, f"{f['loss']:.4f}", ends, *out
        )
    console.print(rows)
    n = len(made.errors)
    console.print(
        f"{n} of {len(found)} forecasts have an observed loss: {made.inside} inside the interval, "
        f"{made.inside_50} inside the 50% interval; {len(made.abandoned)} runs have no record yet. "
        "The hash chain of the forecasts is intact.",
        soft_wrap=True,
    )
    if n:
        skill = ", ".join(f"{name} {value:+.2f}" for name, value in made.skill.items())
        line = (
            f"Interval score {made.interval_score:.4f}; skill against simpler predictions: {skill}"
        )
        console.print(line, soft_wrap=True)


def show_scores(found: Sequence[Scores], console: Console) -> None:
    """Print the scores of all methods over all tables, then those of each table apart."""
    apart = [one for one in found if one.table is not None]
    count = len({one.table for one in apart})
    tables = f"{count} tables" if count > 1 else "1 table"
    console.print(
        f"Forecasts at every origin of {tables}. An origin knows the runs of its budgets, three or "
        "more, and nothing beyond them.",
        soft_wrap=True,
    )
    for ahead, words in _AHEAD.items():
        if own := [one for one in found if one.table is None and one.ahead == ahead]:
            console.print(f"\n[bold]{words}[/]")
            console.print(_pooled(own))
    if count > 1:
        console.print("\n[bold]Each table apart[/]: errors of all methods, then more of level")
        console.print(_apart(apart))
    console.print(
        "\nerror: median |log of predicted over observed loss| at the minima of budgets; bias: its "
        "mean with sign; minima, near, other: shares inside the 50 % and the 90 % interval, of "
        "minima, of runs within 1 % of their budget's minimum, and of other runs; score: of the "
        "90 % intervals at the minima, lower is better; vs: skill, 1 - mean |error| over that of "
        "the rival.",
        soft_wrap=True,
    )


def _pooled(found: Sequence[Scores]) -> Table:
    skills = [f"vs {rival}" for rival in RIVALS]
    made = table("method", "forecasts", "error", "bias", *GROUPS, "score", *skills,
                 left=("method",))  # fmt: skip
    for one in found:
        score = "-" if one.interval_score is None else f"{one.interval_score:.2%}"
        inside = (_inside(one, group) for group in GROUPS)
        skill = (f"{one.skill[r]:+.2f}" if r in one.skill else "-" for r in RIVALS)
        own = f"{one.median:.2%}", f"{one.bias:+.2%}"
        made.add_row(one.method, str(one.count), *own, *inside, score, *skill)
    return made


def _apart(found: Sequence[Scores]) -> Table:
    made = table("table", "ahead", "forecasts", *METHODS, "bias", *GROUPS, "vs line",
                 left=("table",))  # fmt: skip
    by = {(one.table, one.ahead, one.method): one for one in found}
    for one in found:
        if one.method != LEVEL:
            continue
        beside = (by.get((one.table, one.ahead, method)) for method in METHODS)
        errors = ("-" if other is None else f"{other.median:.2%}" for other in beside)
        inside = (_inside(one, group) for group in GROUPS)
        own = escape(one.table or ""), str(one.ahead), str(one.count)
        made.add_row(*own, *errors, f"{one.bias:+.2%}", *inside, f"{one.skill[LINE]:+.2f}")
    return made


def _inside(one: Scores, group: str) -> str:
    found = one.coverage.get(group)
    return f"{found.inner:.0%} {found.outer:.0%}" if found and found.count else "-"


def _show_backtests(made: StudyFit, console: Console) -> None:
    """Print the errors of laws fitted to the cheap budgets, at the more expensive ones."""
    if not made.backtests:
        if "budget" in made.table:
            count = made.table["budget"].nunique()
            console.print(
                f"\nNo backtests: {count} budgets are too few to fit some and predict the others; "
                "run four or more. Until then, the interval beyond them comes from a prior.",
                soft_wrap=True,
            )
        return
    level = f"{made.job.level:.0%}"
    names = (
        "fitted budgets", "runs", "beyond", "error", "bias", f"inside {level} resampled",
        "calibrated",
    )  # fmt: skip
    found = table(*names)
    for r in made.backtests:
        error, bias = np.sqrt(np.mean(r.errors**2)), np.mean(r.errors)
        found.add_row(
            str(r.budgets),
            str(r.runs),
            f"{r.factors.min():.3g} to {r.factors.max():.3g} x",
            f"{error:.2%}",
            f"{bias:+.2%}",
            f"{r.inside_resampled.mean():.0%}",
            f"{r.inside_calibrated.mean():.0%}",
        )
    console.print()
    console.print(found)
    resampled = np.concatenate([r.inside_resampled for r in made.backtests])
    calibrated = np.concatenate([r.inside_calibrated for r in made.backtests])
    console.print(
        f"Of {len(resampled)} predicted runs, {resampled.mean():.0%} are inside the {level} "
        f"interval of resampling alone, and {calibrated.mean():.0%} inside the interval calibrated "
        "by earlier backtests.",
        soft_wrap=True,
    )


def _parameters(made: StudyFit) -> Table:
    low, high = made.replicates.interval(made.job.level)
    errors = made.replicates.errors
    names = ("", "value", "std. error", f"{made.job.level:.0%} low", "high", *made.others)
    found = table(*names, left=("",))
    for i, (symbol, value) in enumerate(made.fit.values.items()):
        others = [f"{other.values[symbol]:.5g}" for other in made.others.values()]
        cells = (value, errors[symbol], low[i], high[i])
        found.add_row(symbol, *(f"{x:.5g}" for x in cells), *others)
    return found


def _show_sensitivity(made: StudyFit, console: Console) -> None:
    """Print how the law changes with the way to count N and C."""
    rows = made.sensitivity
    if rows is None:
        return
    console.print()
    if len(rows) == 1:
        console.print("The table counts N and C in one way only, so there is nothing to compare.")
        return
    level, exponents = f"{made.job.level:.0%}", made.form.exponents
    names = ["N counts", "C counts", "C ~ N^p D, p", "N* ~ C^a, a", f"{level} low", "high"]
    found = table(*names, *exponents, "target's loss", left=("N counts", "C counts"))
    for row in rows:
        a = ["-"] * 3 if row.interval is None else [f"{row.allocation:.4f}"]
        a += [] if row.interval is None else [f"{x:.4f}" for x in row.interval]
        cells = [f"{row.values[s]:.4g}" for s in exponents]
        loss = "-" if row.loss is None else f"{row.loss:.4f}"
        counted = (escape(row.size), escape(row.cost), f"{row.compute_exponent:.3f}")
        found.add_row(*counted, *a, *cells, loss)
    console.print(found)


def _show_isoflop(made: StudyFit, console: Console) -> None:
    iso = made.isoflop
    if iso is None:
        return
    if isinstance(iso, str):
        console.print(f"IsoFLOP parabolas: {escape(iso)}", soft_wrap=True)
        return
    low, high = iso.tokens.interval(made.job.level)
    console.print(
        f"IsoFLOP parabolas: {len(iso.vertices)} budgets; D* = {iso.tokens.k:.4g} C^"
        f"{iso.tokens.a:.4f} ({low[1]:.4f} to {high[1]:.4f}), N* = {iso.parameters.k:.4g} C^"
        f"{iso.parameters.a:.4f}",
        soft_wrap=True,
    )
    for refused in iso.refusals:
        console.print(
            f"  no parabola at {refused.budget:.2g} FLOPs: {escape(refused.why)}", soft_wrap=True
        )
