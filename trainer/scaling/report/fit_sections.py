"""The sections of a fit without pictures: the law, its uncertainty, its backtests, the prediction.

The page of a report and the terminal show the same sections.

Invariant: everything that makes the numbers doubtful is shown with them.
"""

import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from forescale.pages.document import Cell, Section, number, percent, span
from forescale.scaling.analysis.backtest import MINIMA, Scores
from forescale.scaling.analysis.forecast import Forecast, rivals
from forescale.scaling.analysis.prediction import WORTHLESS, Prediction
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.config import StudyJob
from forescale.scaling.fitting.isoflop import IsoFlop
from forescale.scaling.fitting.laws import DATA_CONSTRAINED
from forescale.scaling.forecasting.predictor import BANDS, COMBINED, LAW, LINE, band_name, band_of
from forescale.scaling.report.rate_sections import rate_rows
from forescale.scaling.study.directory import TARGET

Ends = Sequence[float]
NO_TARGET = "No target is given (target.flops, target.parameters, target.tokens)."
_SAME = 0.05  # of log N D: a run whose size is rounded is still the target
_UNTRIED = 2.0  # times as far as the farthest backtest, from where a prediction is untested
SYMBOLS = (
    "N: model parameters. D: training tokens. C: training compute in FLOPs. L: loss. A star, as in "
    "N*, marks the best value for a given compute."
)


def terminal_sections(study: StudyFit, forecasts: Sequence[Forecast] = ()) -> list[Section]:
    """Return the sections that `study fit` prints. Raises UserError for a target too far away."""
    f = study.predict()
    forecast = of_target(forecasts, study.job, f)
    sensitivity = [] if study.sensitivity is None else [sensitivity_section(study)]
    parabolas = Section("isoflop", "IsoFLOP parabolas", after=parabola_lines(study))
    parabolas.absent = "" if parabolas.after else "The table has no budgets, or its tokens repeat."
    reasons, notes = doubts(study)
    return [
        answer(study, f, forecast), reasons, history(study, f), parameters(study),
        certificate(study), parabolas, backtests(study), *sensitivity, influence(study), notes,
    ]  # fmt: skip


def of_target(
    forecasts: Sequence[Forecast], job: StudyJob, f: Prediction | str | None
) -> Forecast | None:
    """Return the newest forecast of the job's target, by its name in the study; None if there is
    none, or if its N D is not that of today's prediction."""
    names = {job.target.run, None if job.input else TARGET} - {None}
    for forecast in reversed(forecasts):
        target = forecast.facts["target"]
        if target["run"] in names:
            n_d = f.parameters * f.tokens if isinstance(f, Prediction) else math.nan
            away = abs(math.log(target["parameters"] * target["tokens"] / n_d))
            return None if away > _SAME else forecast  # NaN by a law of C alone
    return None


def ranges(study: StudyFit) -> Markup:
    """Return the number of runs and the ranges of their columns."""
    p = study.points
    columns = {"N": p.parameters, "D": p.tokens, "C": p.flops, "loss": p.loss}
    each = [
        Markup("{} {}").format(name, span((x.min(), x.max()), 4))
        for name, x in columns.items()
        if x is not None
    ]
    return Markup("; ").join([f"{len(p)} runs", *each]) + "."


def answer(
    study: StudyFit, f: Prediction | str | None, forecast: Forecast | None = None
) -> Section:
    """Return the prediction, what the backtest says of its distance, and the first doubt.

    f: the prediction, or why there is none; forecast: the one that was written before the target's
    run, whose loss stands in place of today's.
    """
    rows, after = list[list[Cell]](), list[Cell]()
    if forecast is not None:
        facts = forecast.facts
        rows += _losses(facts["loss"], facts["interval"], facts["interval_50"], facts["level"])
        rows.insert(1, ["Observed", observed(forecast)])
        text = f"Predicted on {facts.get('time', '-')}, before the run, in forecast {forecast.id}."
        if isinstance(f, Prediction):
            text += f" The runs of today would predict {f.loss:.5g}."
        after.append(text)
    elif isinstance(f, Prediction):
        rows += _losses(f.loss, f.outer, f.inner, study.job.level)
    else:
        law = [Markup("{} = {}").format(s, number(x, 4)) for s, x in study.fit.values.items()]
        rows += [["Loss", f or NO_TARGET], ["Law", Markup(", ").join(law)]]
    if isinstance(f, Prediction):
        star = "*" * bool(f.sizes)
        names = (f"N{star}, parameters", f"D{star}, tokens")
        for i, (name, value) in enumerate(zip(names, (f.parameters, f.tokens), strict=True)):
            if np.isfinite(value):  # not by a law of C alone
                ends = Markup(" ({})").format(span(f.sizes[i], 3)) if f.sizes else ""
                rows.append([name, Markup("{}{}").format(number(value, 4), ends)])
        for name, value in f.settings.items():
            ends = Markup(" ({}), the best").format(span(f.best[name], 3)) if name in f.best else ""
            rows.append([name.replace("_", " "), Markup("{}{}").format(number(value, 3), ends)])
        if f.repetition:
            epochs, u = (number(f.repetition[k], 3) for k in ("epochs", "unique_tokens"))
            rows.append(["Epochs", Markup("{} of {} unique tokens").format(epochs, u)])
            after += _repetition(study, f)
        compute = Markup("{} FLOPs, {} times the most expensive run")
        factor = number(f.extrapolation_factor, 4)
        rows.append(["Compute", compute.format(number(f.flops, 4), factor)])
        rows += rate_rows(study, f)
    after.append(verdict(study, f.extrapolation_factor if isinstance(f, Prediction) else 1.0))
    if study.doubts:
        first, *others = study.doubts
        after.append(f"First doubt: {first}" + f" ({len(others)} more below)" * bool(others))
    else:
        after.append("No reason was found to doubt the numbers.")
    return Section("prediction", "Answer", rows=rows, after=after, strong=True)


def _repetition(study: StudyFit, f: Prediction) -> list[Cell]:
    """Return what repeated tokens cost the target, and where more epochs bring nothing."""
    facts, level = f.repetition, study.job.level
    cost: Cell = "Nothing is repeated: the target has unique tokens enough."
    if lost := facts["lost"]:
        cost = Markup("Repetition costs {} of the loss ({}), beside the same run on fresh tokens.")
        cost = cost.format(number(-f.loss * math.expm1(-lost), 3), percent(math.expm1(lost)))
    source: Cell = "both as published by Muennighoff et al. 2023, not of these runs"
    if study.form is DATA_CONSTRAINED:
        ends = study.replicates.interval(level)[:, 5]
        source = Markup("R*_D of these runs ({:.0%}: {}), R*_N as published").format(
            level, span(ends, 3)
        )
    text = (
        "Beyond {} epochs, which the best run has at {} FLOPs, a repeated token is worth less than "
        "{:.0%} of a fresh one, so that more epochs bring next to nothing (R*_D {}, R*_N {}: {})."
    )
    end, flops, r_d, r_n = (number(facts[k], 3) for k in ("epochs_end", "flops_end", "R_D", "R_N"))
    return [cost, Markup(text).format(end, flops, WORTHLESS, r_d, r_n, source)]


def _losses(loss: float, outer: Ends, inner: Ends, level: float) -> list[list[Cell]]:
    return [["Loss", number(loss)], [f"{level:.0%} interval", span(outer)],
            ["50% interval", span(inner)]]  # fmt: skip


def observed(forecast: Forecast) -> Cell:
    """Return the observed loss of a forecast with its error and whether it was inside."""
    if (outcome := forecast.outcome) is None:
        return "not yet"
    facts, loss = forecast.facts, outcome["loss"]
    low, high = facts["interval"]
    side = "inside" if low <= loss <= high else "outside"
    return Markup("{}, {} from the predicted loss, {} the {} interval").format(
        number(loss), percent(loss / facts["loss"] - 1, sign="+"), side, f"{facts['level']:.0%}"
    )


def verdict(study: StudyFit, factor: float) -> str:
    """Return in a sentence how far off such predictions were, at the backtests' distance that is
    nearest to the target's. factor: its compute over that of the most expensive run."""
    rows = study.earlier
    lowest = None if rows is None else rows[rows["group"] == MINIMA]
    if lowest is None or (lowest["method"] != study.method).all():
        return no_backtests(study)
    bands = lowest["band"].unique()
    near = lowest[lowest["band"] == min(bands, key=lambda band: abs(band - band_of(factor)))]
    scored, line = (
        near[near["method"] == m].set_index(["origin", "beyond"]) for m in (study.method, LINE)
    )
    error, of_line = (
        float(each["error"].abs().mean()) for each in (scored, line.loc[scored.index])
    )
    low, high = scored.index.levels[1].min(), scored.index.get_level_values(1).max()
    held = f"{int(scored['inside_90'].sum())} of {len(scored)} were inside the 90% interval"
    ends = " to ".join(dict.fromkeys(f"{x:.3g}" for x in (low, high)))
    some, verb = ("predictions", "were") if len(scored) > 1 else ("prediction", "was")
    at = f"{len(scored)} {some} at {ends} times"
    off = f"{verb} off by {error:.2%} on average, a straight line through the last two budgets by "
    off += f"{of_line:.2%}; {held}"
    if error > of_line:
        off += ", but the line was better"
        if factor > 1:
            off += f": it predicts {rivals(study.points, factor)[LINE]['loss']:.4g}"
    if factor > _UNTRIED * high:
        return (
            f"No backtest reaches the target, {factor:.4g} times the compute of the runs; the "
            f"nearest, {at} the known compute, {off}."
        )
    return f"Backtest: {at} the known compute {off}."


def history(study: StudyFit, f: Prediction | str | None) -> Section:
    """Return what the intervals rest on, and how far off such predictions would have been."""
    after = [_basis(study, f)] if isinstance(f, Prediction) else list[Cell]()
    if isinstance(f, Prediction) and len(f.optima) > 1:
        each = Markup(", ").join(
            Markup("{} by the {}").format(number(n, 4), name) for name, n in f.optima.items()
        )
        after.append(Markup("N* is the geometric mean of {}.").format(each))
    after += skill_lines(study.skill) or [no_backtests(study)]
    return Section("backtests", "Backtests: predictions of more expensive runs", after=after)


def _basis(study: StudyFit, f: Prediction) -> Markup:
    """Return what the intervals of a prediction rest on."""
    if f.method == COMBINED:
        parts = Markup(", ").join(
            Markup("{} {} ({:.0%})").format(name, number(loss), weight)
            for name, (loss, weight) in f.parts.items()
        )
        return Markup(
            "It continues the lowest losses of the budgets in several ways (weights in brackets) "
            "and adds what a run loses off the optimum: {}. Weights and widths come from the "
            "errors of {}. The law in the table below predicts {}."
        ).format(
            parts, f"{f.origins} earlier forecasts" if f.origins else "a prior alone", number(f.law)
        )
    source = "a prior alone" if study.discrepancy.is_prior else f"{f.origins} backtests"
    return Markup(
        "By the law. Its error of {} per decade beyond the runs comes from {}; resampling alone "
        "would give {}."
    ).format(percent(study.discrepancy.per_decade, 1), source, span(f.resampled))


def skill_lines(scores: Sequence[Scores]) -> list[str]:
    """Return a sentence for each distance: how far off such predictions would have been."""
    lines = []
    by = {(one.band, one.method): one for one in scores if (one.table, one.kind) == (None, None)}
    for band in range(len(BANDS) - 1):
        scored, line = by.get((band, COMBINED)) or by.get((band, LAW)), by.get((band, LINE))
        if scored and line:
            lines.append(
                f"Backtest, {band_name(band)} the compute, {times(scored.count)}: predictions by "
                f"{scored.method} were off by {scored.median:.2%} (median; mean {scored.bias:+.2%})"
                " at the lowest loss of a budget, a straight line through the last two budgets by "
                f"{line.median:.2%} (skill {scored.skill[LINE]:+.2f}); {inside(scored, MINIMA)}."
            )
    return lines


def times(count: int) -> str:
    """Return how often, in words."""
    return f"{count} times" if count > 1 else "once"


def inside(scored: Scores, group: str) -> str:
    """Return how many observed values of a group were inside their 90% interval."""
    c = scored.coverage[group]
    return f"{round(c.outer * c.count)} of {c.count} were inside the 90% interval"


def doubts(study: StudyFit) -> list[Section]:
    """Return all doubts, and what was done with the table."""
    return [
        reasons(study.doubts),
        Section("notes", "How the table was used", after=[*study.notes],
                absent="" if study.notes else "All rows of the table are used as they are."),
    ]  # fmt: skip


def reasons(doubts: Sequence[str]) -> Section:
    """Return the reasons to doubt the numbers of a page, or that none was found."""
    absent = "" if doubts else "No reason was found to doubt the numbers."
    return Section("doubts", "Reasons for doubt", after=[*doubts], absent=absent)


def parabola_lines(study: StudyFit) -> list[Cell]:
    """Return the power laws through the minima of the parabolas, and the refused budgets."""
    iso = study.isoflop
    if not isinstance(iso, IsoFlop):
        return [iso] if iso else []
    lines = list[Cell]()
    for name, law in (("N*", iso.parameters), ("D*", iso.tokens)):
        ends = law.interval(study.job.level)[:, 1]
        wide = Markup(" ({})").format(span(ends, 4)) if np.isfinite(ends).all() else ""
        text = "{} = {} C<sup>a</sup>, a = {}{}, through the minima of {} parabolas."
        lines.append(Markup(text).format(
            name, number(law.k, 4), number(law.a, 4), wide, len(iso.vertices)
        ))  # fmt: skip
    refused = Markup("No parabola at {} FLOPs: {}.")
    return lines + [refused.format(number(r.budget, 3), r.why) for r in iso.refusals]


def parameters(study: StudyFit) -> Section:
    """Return a row for each parameter of the law: value, error, interval, other fits."""
    low, high = study.replicates.interval(study.job.level)
    errors, level = study.replicates.errors, f"{study.job.level:.0%}"
    rows: list[list[Cell]] = [["", "value", "std. error", f"{level} low", "high", *study.others]]
    for i, (symbol, value) in enumerate(study.fit.values.items()):
        others = [other.values[symbol] for other in study.others.values()]
        rows.append([symbol, *map(number, (value, errors[symbol], low[i], high[i], *others))])
    text = "The last columns are fits of the same law with other objectives, and to all runs."
    after = list[Cell]([study.form.source, text])
    if study.allocation is not None:
        a, interval = study.allocation
        growth = Markup("N* grows as C<sup>a</sup>, a = {} ({}).")
        after.append(growth.format(number(a, 4), span(interval.tolist(), 4)))
    return Section("parameters", "Parameters of the law", rows=rows, head=True, after=after)


def certificate(study: StudyFit) -> Section:
    """Return what shows that the fit is the global optimum."""
    c, fit = study.fit.certificate, study.fit
    minima = f"{len(c.minima)} from {sum(b.starts for b in c.minima) + c.failed_starts} starts"
    lost = f", {c.failed_starts} of which reached no minimum" if c.failed_starts else ""
    uncertified = f"{study.replicates.uncertified} of {study.job.bootstraps}"
    rows: list[list[Cell]] = [
        ["Global optimum", "yes" if c.holds else "; ".join(c.problems)],
        ["Objective", Markup("{} ({})").format(number(fit.value, 10), str(fit.objective))],
        ["Scaled gradient", number(c.scaled_gradient, 2)],
        ["Curvature", number(c.curvature, 4)],
        ["Minima", minima + lost],
        ["Parameters at a limit of their range", "; ".join(c.edges) or "none"],
        ["Method", c.method],
        ["Resampled fits that are not certified", uncertified],
    ]
    return Section("certificate", "Certificate of the fit", rows=rows)


def no_backtests(study: StudyFit) -> str:
    """Return why cheap budgets can't predict more expensive ones."""
    if "budget" not in study.table:
        return "No backtests: the table has no budgets."
    if (count := study.table["budget"].nunique()) < 4:
        return (
            f"No backtests: {count} budgets are too few to fit some and predict the others; run "
            "four or more. Until then, the interval beyond them comes from a prior."
        )
    return f"No backtests: the law {study.form.name} has none on these runs."


def backtests(study: StudyFit) -> Section:
    """Return a row for each number of cheap budgets: how far off laws fitted to them are at the
    more expensive ones."""
    section = Section("backtest-table", "Backtests of the law alone", head=True)
    if not study.backtests:
        section.absent = no_backtests(study)
        return section
    level = f"{study.job.level:.0%}"
    section.rows = [["fitted budgets", "runs", "times their compute", "error", "bias",
                     f"inside resampled {level}", f"inside calibrated {level}"]]  # fmt: skip
    for r in study.backtests:
        section.rows.append([
            str(r.budgets), str(r.runs), span((r.factors.min(), r.factors.max()), 3),
            percent(float(np.sqrt(np.mean(r.errors**2)))),
            percent(float(np.mean(r.errors)), sign="+"),
            percent(r.inside_resampled.mean(), 0), percent(r.inside_calibrated.mean(), 0),
        ])  # fmt: skip
    resampled = np.concatenate([r.inside_resampled for r in study.backtests])
    calibrated = np.concatenate([r.inside_calibrated for r in study.backtests])
    section.after = [
        f"Of {len(resampled)} predicted runs, {resampled.mean():.0%} are inside the {level} "
        f"interval of resampling alone, and {calibrated.mean():.0%} inside the calibrated one.",
        "Error (root mean square) and bias compare predicted with observed loss over all runs of "
        "the more expensive budgets. Resampled: the interval of resampling alone. Calibrated: the "
        "interval with noise and discrepancy.",
    ]
    return section


def sensitivity_section(study: StudyFit) -> Section:
    """Return how the law changes with the way to count N and C."""
    section = Section("sensitivity", "The law by other counts of N and C", head=True)
    rows, level, exponents = study.sensitivity or [], f"{study.job.level:.0%}", study.form.exponents
    if len(rows) < 2:
        section.absent = "The table counts N and C in one way only: there is nothing to compare."
        return section
    section.rows = [["N counts", "C counts", "C ~ N^p D, p", "N* ~ C^a, a", level, *exponents,
                     "target's loss"]]  # fmt: skip
    for row in rows:
        section.rows.append([
            row.size, row.cost, number(row.compute_exponent, 4),
            "-" if row.allocation is None else number(row.allocation, 4),
            "-" if row.interval is None else span(row.interval, 4),
            *(number(row.values[s], 4) for s in exponents),
            "-" if row.loss is None else number(row.loss),
        ])  # fmt: skip
    return section


def influence(study: StudyFit) -> Section:
    """Return the change of each parameter by the most influential runs."""
    rows: list[list[Cell]] = [["run", *study.form.symbols]]
    rows += [[name, *(number(moved[s], 3) for s in moved)] for name, moved in study.influence()]
    text = "The change of each parameter by including the run; the most influential run first."
    return Section("influence", "Most influential runs", rows=rows, head=True, after=[text])
