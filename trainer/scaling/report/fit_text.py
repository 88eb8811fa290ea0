"""A fit as text for the terminal: the law, its uncertainty, its backtests, and the prediction.

Invariant: everything that makes the numbers doubtful is printed with them.
"""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from forescale.ground.console import table
from forescale.pages.document import Cell, grid, number, percent, span
from forescale.scaling.analysis.backtest import GROUPS, METHODS, MINIMA, RIVALS, Scores
from forescale.scaling.analysis.forecast import Forecast, Score
from forescale.scaling.analysis.prediction import Prediction
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.analysis.weights import effective
from forescale.scaling.forecasting.predictor import LAW, LEVEL, LINE

_DISTANCE = {1: "one budget", 2: "two budgets"}
_AHEAD = {1: "One budget ahead", 2: "Two budgets ahead"}


def show(study: StudyFit, console: Console, where: str) -> None:
    """Print the fit. where: how to call the runs."""
    fit, job = study.fit, study.job
    p = study.points
    console.print(f"[bold]{escape(where)}[/]: {len(p)} runs, {escape(study.form.source)}")
    columns = (("parameters N", p.parameters), ("tokens D", p.tokens), ("FLOPs C", p.flops))
    ranges = [f"{n} {x.min():.3g} to {x.max():.3g}" for n, x in columns if x is not None]
    console.print(f"{', '.join(ranges)}; loss {p.loss.min():.4g} to {p.loss.max():.4g}")
    _show_prediction(study, console)
    for line in skill_lines(study.skill):
        console.print(line, soft_wrap=True)
    first, *others = study.doubts or ["No reason was found to doubt these numbers."]
    console.print(f"[yellow]First doubt:[/] {escape(first)}" if study.doubts else first,
                  soft_wrap=True)  # fmt: skip
    console.print()
    console.print(grid(parameter_rows(study)))
    c = fit.certificate
    verdict = "certified" if c.holds else "[red]not certified[/]"
    console.print(
        f"Objective {fit.value:.10g}, {verdict}: scaled gradient {c.scaled_gradient:.1e}, "
        f"{len(c.minima)} minima from {sum(b.starts for b in c.minima) + c.failed_starts} starts; "
        f"{study.replicates.uncertified} of {job.bootstraps} resampled fits are not certified",
        soft_wrap=True,
    )
    if study.weights is not None:
        w, noise = study.weights, study.noise
        known = f"from {noise.freedom} repeats" if noise.freedom else "assumed"
        console.print(
            f"Weights ({job.weights}): the largest is {w.max() / w.min():.3g} times the smallest; "
            f"the effective number of runs is {effective(w):.1f}; noise of a run {noise.at:.2%}, "
            f"{known}",
            soft_wrap=True,
        )
    if study.allocation is not None:
        a, (low, high) = study.allocation
        console.print(f"By the law, N* grows as C^{a:.4f} ({low:.4f} to {high:.4f})")
    _show_isoflop(study, console)
    _show_backtests(study, console)
    _show_sensitivity(study, console)
    console.print("\nMost influential runs: " + ", ".join(n for n, _ in study.influence()))
    for doubt in others:
        console.print(f"[yellow]Doubt:[/] {escape(doubt)}", soft_wrap=True)
    for note in study.notes:
        console.print(f"Note: {escape(note)}", soft_wrap=True)


def _show_prediction(study: StudyFit, console: Console) -> None:
    if (f := study.predict()) is None:
        return
    level = f"{study.job.level:.0%}"
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
        f"{f.outer[1]:.4f}. {best}{doubt_of(study, f)}",
        soft_wrap=True,
    )


def show_score(forecasts: Sequence[Forecast], score: Score, console: Console) -> None:
    """Print the forecasts beside the observed losses, and their score."""
    console.print(grid(forecast_rows(forecasts)))
    n = len(score.errors)
    console.print(
        f"{n} of {len(forecasts)} forecasts have an observed loss: {score.inside} inside the "
        f"interval, {score.inside_50} inside the 50% interval; {len(score.abandoned)} runs have no "
        "record yet. The hash chain of the forecasts is intact.",
        soft_wrap=True,
    )
    if n:
        skill = ", ".join(f"{name} {value:+.2f}" for name, value in score.skill.items())
        line = (
            f"Interval score {score.interval_score:.4f}; skill against simpler predictions: {skill}"
        )
        console.print(line, soft_wrap=True)


def forecast_rows(forecasts: Sequence[Forecast]) -> list[list[Cell]]:
    """Return a row for each forecast, with the observed loss if there is one."""
    level = f"{forecasts[0].facts['level']:.0%}"
    rows: list[list[Cell]] = [
        ["forecast", "run", "beyond", "predicted", f"{level} interval", "observed", "to predicted",
         "written"]
    ]  # fmt: skip
    for forecast in forecasts:
        f, outcome = forecast.facts, forecast.outcome
        out: list[Cell] = ["pending", ""]
        if outcome:
            out = [number(outcome["loss"]), percent(outcome["loss"] / f["loss"] - 1, sign="+")]
        beyond = Markup("{} x").format(number(f["target"]["extrapolation_factor"], 3))
        ends = span(f["interval"])
        rows.append([forecast.id, f["target"]["run"], beyond, number(f["loss"]), ends, *out,
                     f["time"]])  # fmt: skip
    return rows


def show_scores(scores: Sequence[Scores], console: Console) -> None:
    """Print the scores of all methods over all tables, then those of each table apart."""
    apart = [one for one in scores if one.table is not None]
    count = len({one.table for one in apart})
    tables = f"{count} tables" if count > 1 else "1 table"
    console.print(
        f"Forecasts at every origin of {tables}. An origin knows the runs of its budgets, three or "
        "more, and nothing beyond them.",
        soft_wrap=True,
    )
    for ahead, words in _AHEAD.items():
        if pooled := [one for one in scores if one.table is None and one.ahead == ahead]:
            console.print(f"\n[bold]{words}[/]")
            console.print(_pooled(pooled))
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


def _pooled(scores: Sequence[Scores]) -> Table:
    skills = [f"vs {rival}" for rival in RIVALS]
    columns = table("method", "forecasts", "error", "bias", *GROUPS, "score", *skills,
                 left=("method",))  # fmt: skip
    for one in scores:
        score = "-" if one.interval_score is None else f"{one.interval_score:.2%}"
        inside = (_inside(one, group) for group in GROUPS)
        skill = (f"{one.skill[r]:+.2f}" if r in one.skill else "-" for r in RIVALS)
        errors = f"{one.median:.2%}", f"{one.bias:+.2%}"
        columns.add_row(one.method, str(one.count), *errors, *inside, score, *skill)
    return columns


def _apart(scores: Sequence[Scores]) -> Table:
    columns = table("table", "ahead", "forecasts", *METHODS, "bias", *GROUPS, "vs line",
                 left=("table",))  # fmt: skip
    by = {(one.table, one.ahead, one.method): one for one in scores}
    for one in scores:
        if one.method != LEVEL:
            continue
        beside = (by.get((one.table, one.ahead, method)) for method in METHODS)
        errors = ("-" if other is None else f"{other.median:.2%}" for other in beside)
        inside = (_inside(one, group) for group in GROUPS)
        cells = escape(one.table or ""), str(one.ahead), str(one.count)
        columns.add_row(*cells, *errors, f"{one.bias:+.2%}", *inside, f"{one.skill[LINE]:+.2f}")
    return columns


def _inside(one: Scores, group: str) -> str:
    shares = one.coverage.get(group)
    return f"{shares.inner:.0%} {shares.outer:.0%}" if shares and shares.count else "-"


def _show_backtests(study: StudyFit, console: Console) -> None:
    """Print the errors of laws fitted to the cheap budgets, at the more expensive ones."""
    if not study.backtests:
        if "budget" in study.table:
            count = study.table["budget"].nunique()
            console.print(
                f"\nNo backtests: {count} budgets are too few to fit some and predict the others; "
                "run four or more. Until then, the interval beyond them comes from a prior.",
                soft_wrap=True,
            )
        return
    level = f"{study.job.level:.0%}"
    console.print()
    console.print(grid(backtest_rows(study)))
    resampled = np.concatenate([r.inside_resampled for r in study.backtests])
    calibrated = np.concatenate([r.inside_calibrated for r in study.backtests])
    console.print(
        f"Of {len(resampled)} predicted runs, {resampled.mean():.0%} are inside the {level} "
        f"interval of resampling alone, and {calibrated.mean():.0%} inside the interval calibrated "
        "by earlier backtests.",
        soft_wrap=True,
    )


def parameter_rows(study: StudyFit) -> list[list[Cell]]:
    """Return a row for each parameter of the law: value, error, interval, other fits."""
    low, high = study.replicates.interval(study.job.level)
    errors, level = study.replicates.errors, f"{study.job.level:.0%}"
    head: list[Cell] = ["", "value", "std. error", f"{level} low", "high", *map(str, study.others)]
    rows = [head]
    for i, (symbol, value) in enumerate(study.fit.values.items()):
        others = [other.values[symbol] for other in study.others.values()]
        cells = (value, errors[symbol], low[i], high[i], *others)
        rows.append([symbol, *(number(x) for x in cells)])
    return rows


def backtest_rows(study: StudyFit) -> list[list[Cell]]:
    """Return a row for each number of cheap budgets: how far off laws fitted to them are at the
    more expensive ones."""
    level = f"{study.job.level:.0%}"
    rows: list[list[Cell]] = [
        ["fitted budgets", "runs", "times their compute", "error", "bias",
         f"inside resampled {level}", f"inside calibrated {level}"]
    ]  # fmt: skip
    for r in study.backtests:
        rows.append([
            str(r.budgets), str(r.runs), span((r.factors.min(), r.factors.max()), 3),
            percent(float(np.sqrt(np.mean(r.errors**2)))),
            percent(float(np.mean(r.errors)), sign="+"),
            percent(r.inside_resampled.mean(), 0), percent(r.inside_calibrated.mean(), 0),
        ])  # fmt: skip
    return rows


def _show_sensitivity(study: StudyFit, console: Console) -> None:
    """Print how the law changes with the way to count N and C."""
    rows = study.sensitivity
    if rows is None:
        return
    console.print()
    if len(rows) == 1:
        console.print("The table counts N and C in one way only, so there is nothing to compare.")
        return
    level, exponents = f"{study.job.level:.0%}", study.form.exponents
    names = ["N counts", "C counts", "C ~ N^p D, p", "N* ~ C^a, a", f"{level} low", "high"]
    columns = table(*names, *exponents, "target's loss", left=("N counts", "C counts"))
    for row in rows:
        a = ["-"] * 3 if row.interval is None else [f"{row.allocation:.4f}"]
        a += [] if row.interval is None else [f"{x:.4f}" for x in row.interval]
        cells = [f"{row.values[s]:.4g}" for s in exponents]
        loss = "-" if row.loss is None else f"{row.loss:.4f}"
        counted = (escape(row.size), escape(row.cost), f"{row.compute_exponent:.3f}")
        columns.add_row(*counted, *a, *cells, loss)
    console.print(columns)


def _show_isoflop(study: StudyFit, console: Console) -> None:
    iso = study.isoflop
    if iso is None:
        return
    if isinstance(iso, str):
        console.print(f"IsoFLOP parabolas: {escape(iso)}", soft_wrap=True)
        return
    low, high = iso.tokens.interval(study.job.level)
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


def doubt_of(study: StudyFit, f: Prediction) -> str:
    """Return what the intervals of a prediction rest on."""
    if f.method == LEVEL:
        known = f"{f.origins} earlier forecasts" if f.origins else "a prior alone"
        return (
            "It continues the lowest losses of the budgets, and adds what a run loses off the "
            f"optimum; the widths come from the errors of {known}. The law alone predicts "
            f"{f.law:.4f}."
        )
    source = "a prior alone" if study.discrepancy.is_prior else f"{f.origins} backtests"
    return (
        f"By the law. Its error of {study.discrepancy.per_decade:.1%} per decade beyond the runs "
        f"comes from {source}; resampling alone would give {f.resampled[0]:.4f} to "
        f"{f.resampled[1]:.4f}."
    )


def skill_lines(scores: Sequence[Scores]) -> list[str]:
    """Return a sentence for each distance ahead: how far off such predictions would have been."""
    lines = []
    by = {(one.ahead, one.method): one for one in scores if one.table is None}
    for ahead, words in _DISTANCE.items():
        mine = by.get((ahead, LEVEL)) or by.get((ahead, LAW))
        line = by.get((ahead, LINE))
        if mine is None or line is None:
            continue
        held = mine.coverage[MINIMA]
        times = f"{mine.count} times" if mine.count > 1 else "once"
        lines.append(
            f"Backtest, {words} ahead, {times}: predictions by {mine.method} were off by "
            f"{mine.median:.2%} (median; mean {mine.bias:+.2%}) at the lowest loss of a budget, "
            f"a straight line through the last two budgets by {line.median:.2%} (skill "
            f"{mine.skill[LINE]:+.2f}); {round(held.outer * held.count)} of {held.count} were "
            "inside the 90% interval."
        )
    return lines
