"""The metrics of tasks: links, predictions, and the figures of a metric over loss and over compute.

Invariant: figures show the numbers of the TaskFit; a run without the metric has no dot. Everything
that makes the numbers doubtful is shown with them.
"""

from collections.abc import Sequence

import numpy as np

from forescale.pages import figure as chart
from forescale.pages.document import Cell, Section, number, percent, span
from forescale.scaling.analysis.backtest import BEST
from forescale.scaling.analysis.forecast import TaskScore
from forescale.scaling.analysis.task_fit import LAST_VALUE, LINE, OUTCOME, TWO_STEPS, TaskFit
from forescale.scaling.fitting.points import Array, spent
from forescale.scaling.forecasting.predictor import BANDS, band_name
from forescale.scaling.report.fit_figures import Figures, Picture
from forescale.scaling.report.fit_sections import NO_TARGET, inside, times
from forescale.scaling.report.score_sections import change

_KINDS = {"accuracy": "accuracy", "error": "share of errors", "loss": "loss"}
_GRID = 61
_INTERVAL = (
    "The intervals are for one new run: they have the doubt of its loss, that of the link, and the "
    "scatter of runs around the link."
)


def task_section(one: TaskFit | str, figures: Figures | None = None) -> Section:
    """Return the section of a task. one: its fit, or why there is none; figures: those of the law;
    None for a section without pictures."""
    section = Section("task", "Metric of the task")
    if isinstance(one, str):
        section.absent = f"The metric can't be fitted: {one}"
        return section
    level, kind = f"{one.job.level:.0%}", _KINDS[one.job.metric]
    section.title = f"Metric of the task: {one.name} ({kind})"
    if figures is not None:
        section.pictures = [
            ("metric-by-loss", _by_loss(one, figures),
             "Each dot is a run. The line is the link from its loss to the metric; grey: the "
             f"{level} band of its resampled fits. Star: the target."),
            ("metric-by-compute", _by_compute(one, figures),
             "Dotted line: the metric that the law's loss and the link predict for the best N and "
             f"D of each compute. Shaded: the 50% and {level} intervals of one new run, with the "
             "doubt of its loss, of the link, and the scatter of runs. Runs off the best N and D "
             "are worse than the line. Star: the target."),
        ]  # fmt: skip
    section.rows = [["Prediction", prediction_of(one)]]
    if (p := one.chained) is not None:
        section.rows += [["Value", number(p.value)], ["50% interval", span(p.inner)],
                         [f"{level} interval", span(p.outer)]]  # fmt: skip
    section.rows.append(["Link", one.link.form.source])
    low, high = one.replicates.interval(one.job.level)
    for i, (symbol, value) in enumerate(one.link.values.items()):
        section.rows.append([symbol, number(value, 4) + " (" + span((low[i], high[i]), 4) + ")"])
    scatter = percent(float(one.residuals.std())) + f" in {len(one.outcomes)} runs"
    section.rows.append(["Scatter around the link", scatter])
    section.after = [*[_INTERVAL] * (p is not None), *_skill_lines(one), *one.doubts]
    return section


def forecast_sections(scores: Sequence[TaskScore]) -> list[Section]:
    """Return the predicted metrics beside those observed since, if forecasts have any."""
    rows: list[list[Cell]] = [
        ["forecast", "run", "task", "predicted", "interval", "observed", "inside"]
    ]
    for one in scores:
        observed = "-" if one.observed is None else _value(one.observed, one.metric)
        is_inside = {None: "-", True: "yes", False: "no"}[one.inside]
        rows.append([one.forecast, one.run, one.column, _value(one.predicted, one.metric),
                     _span(one.interval, one.metric), observed, is_inside])  # fmt: skip
    return [Section("metrics", "Forecasts of metrics", rows=rows, head=True)] if scores else []


def _value(number: float, metric: str) -> str:
    """Return a metric for reading: a share as a percentage. metric: its kind."""
    return f"{number:.4f}" if metric == "loss" else f"{number:.1%}"


def _span(ends: tuple[float, float], metric: str) -> str:
    return " to ".join(_value(end, metric) for end in ends)


def prediction_of(one: TaskFit) -> str:
    """Return the prediction as a sentence, or why there is none."""
    job, p = one.job, one.chained
    if one.unseen:
        return f"No prediction. {one.unseen}"
    if p is None:
        return NO_TARGET
    return (
        f"{_KINDS[job.metric]} {_value(p.value, job.metric)} at loss {p.loss.loss:.4f}; 50% "
        f"interval {_span(p.inner, job.metric)}, {job.level:.0%} interval "
        f"{_span(p.outer, job.metric)}."
    )


def _skill_lines(one: TaskFit) -> list[str]:
    """Return a sentence for each distance: how far off such predictions would have been."""
    lines, metric = [], one.job.metric
    by = {(s.band, s.method): s for s in one.skill if (s.table, s.kind) == (None, None)}
    for band in range(len(BANDS) - 1):
        if (scored := by.get((band, TWO_STEPS))) is not None:
            others = ", ".join(
                f"{name} by {change(by[band, rival].median, metric)} (skill "
                f"{scored.skill[rival]:+.2f})"
                for rival, name in (
                    (LINE, "a straight line in log C"), (LAST_VALUE, "the last value")
                )
            )  # fmt: skip
            lines.append(
                f"Backtest, {band_name(band)} the compute, {times(scored.count)}: off by "
                f"{change(scored.median, metric)} (median) at the best run of a budget, {others}; "
                f"{inside(scored, BEST)}."
            )
    return lines


def _by_loss(one: TaskFit, figures: Figures) -> Picture:
    """The metric of runs over their loss, with the link."""
    least = float(one.loss.min())
    if one.chained is not None:
        least = min(least, one.chained.loss.loss)
    x = np.geomspace(0.98 * least, float(one.loss.max()), _GRID)
    figure = _figure(chart.Axis(figures.loss, log=True), one)
    tail = (1 - one.job.level) / 2
    many = one.in_metric(one.link.form.predict(one.replicates.values, task_loss=x))
    figure.add(chart.band(x, np.quantile(many, [tail, 1 - tail], axis=0), chart.BAND))
    figure.add(chart.line(x, one.in_metric(one.link.predict(task_loss=x)), chart.INK, name="link"))
    loss = None if one.chained is None else one.chained.loss.loss
    return _with_runs(figure, one, figures, one.loss, loss)


def _by_compute(one: TaskFit, figures: Figures) -> Picture:
    """The metric of runs over their compute, with the prediction of the best runs."""
    if isinstance(figures.frontier, str):
        return figures.frontier
    if one.unseen:
        return one.unseen
    law, x = one.law, figures.grid
    curve = one.curve(law.predicted(figures.best(law.fit.vector, x), x))
    assert curve.outer is not None
    assert curve.inner is not None
    figure = _figure(chart.Axis(figures.c, log=True, power=True), one)
    figure.add(chart.band(x, curve.outer, chart.WIDE, f"{one.job.level:.0%} prediction"))
    figure.add(chart.band(x, curve.inner, chart.NARROW, "50% prediction"))
    figure.add(chart.line(x, curve.value, chart.TARGET, "dot", name="predicted"))
    flops = spent(law.all_points)[law.table[OUTCOME].notna().to_numpy()]
    target = None if one.chained is None else one.chained.loss.flops
    return _with_runs(figure, one, figures, flops, target)


def _figure(across: chart.Axis, one: TaskFit) -> chart.Figure:
    is_loss = one.job.metric == "loss"
    title = f"{one.name} ({_KINDS[one.job.metric]})"
    return chart.Figure(across, chart.Axis(title, log=is_loss, percent=not is_loss))


def _with_runs(
    figure: chart.Figure, one: TaskFit, figures: Figures, x: Array, target: float | None
) -> chart.Figure:
    """Add a dot for each run with the metric, in the colour of its budget, and the target's
    star. x: of the runs, (n,); target: of the star."""
    rows = one.law.table[one.law.table[OUTCOME].notna()]
    y, shades = one.in_metric(one.metric), figures.shades
    colours = [shades[float(b)] for b in rows["budget"]] if shades else [chart.INK]
    names = rows["name"].astype(str) if "name" in rows else [f"run {i}" for i in rows.index]
    texts = [
        f"{name}\nloss {loss:.5g}\nmetric {metric:.5g}"
        for name, loss, metric in zip(names, one.loss, y, strict=True)
    ]
    figure.add(chart.dots(x, y, colours, texts))
    if one.chained is not None and target is not None:
        figure.add(chart.star(target, one.chained.value, "target", one.chained.outer))
    return figure
