"""The section of a report about a task: the metric over the loss, and over compute.

Invariant: figures show the numbers of the TaskFit; a run without the metric has no dot.
"""

import numpy as np

from forescale.pages.document import Cell, Section, number, span
from forescale.pages.figure import (
    BAND,
    INK,
    NARROW,
    TARGET,
    WIDE,
    Axis,
    Figure,
    Trace,
    band,
    dots,
    line,
    star,
)
from forescale.scaling.analysis.task_fit import OUTCOME, TaskFit
from forescale.scaling.fitting.points import Array, spent
from forescale.scaling.report.fit_figures import Figures, Picture
from forescale.scaling.report.task_text import KINDS, prediction_of, skill_lines

_GRID = 61


def task_section(one: TaskFit | str, figures: Figures) -> Section:
    """Return the section of a task. one: its fit, or why there is none."""
    section = Section("task", "Metric of the task")
    if isinstance(one, str):
        section.absent = f"The metric can't be fitted: {one}"
        return section
    level = f"{one.job.level:.0%}"
    section.title = f"Metric of the task: {one.task.name}"
    section.pictures = [
        ("metric-by-loss", _by_loss(one, figures),
         "Each dot is a run. The line is the link from its loss to the metric; grey: the "
         f"{level} band of its resampled fits. Star: the target."),
        ("metric-by-compute", _by_compute(one, figures),
         "Dotted line: the metric that the law's loss and the link predict for the best N and D of "
         f"each compute. Shaded: the 50% and {level} intervals of one new run, with the doubt "
         "of its loss, of the link, and the scatter of runs. Runs off the best N and D are worse "
         "than the line. Star: the target."),
    ]  # fmt: skip
    section.rows = _rows(one)
    section.after = [*skill_lines(one.skill, one.job), *one.doubts]
    return section


def _rows(one: TaskFit) -> list[list[Cell]]:
    low, high = one.replicates.interval(one.job.level)
    p = one.chained
    rows: list[list[Cell]] = [["Prediction", prediction_of(one)]]
    if p is not None:
        rows += [
            ["Value", number(p.value)],
            ["50% interval", span(p.inner)],
            [f"{one.job.level:.0%} interval", span(p.outer)],
        ]
    rows.append(["Link", one.link.form.source])
    for i, (symbol, value) in enumerate(one.link.values.items()):
        rows.append([symbol, number(value, 4) + " (" + span((low[i], high[i]), 4) + ")"])
    return rows


def _by_loss(one: TaskFit, figures: Figures) -> Picture:
    """The metric of runs over their loss, with the link."""
    least = float(one.loss.min())
    if one.chained is not None:
        least = min(least, one.chained.loss.loss)
    x = np.geomspace(0.98 * least, float(one.loss.max()), _GRID)
    figure = Figure(Axis(figures.loss, log=True), _metric_axis(one))
    tail = (1 - one.job.level) / 2
    many = one.in_metric(one.link.form.predict(one.replicates.values, task_loss=x))
    figure.add(band(x, np.quantile(many, [tail, 1 - tail], axis=0), BAND))
    value = one.in_metric(one.link.predict(task_loss=x))
    figure.add(line(x, value, INK, name="link"))
    figure.add(_dots(one, one.loss, figures))
    if (p := one.chained) is not None:
        figure.add(star(p.loss.loss, p.value, "target", p.outer))
    return figure


def _by_compute(one: TaskFit, figures: Figures) -> Picture:
    """The metric of runs over their compute, with the prediction of the best runs."""
    if isinstance(figures.frontier, str):
        return figures.frontier
    if one.unseen:
        return one.unseen
    law, x = one.law, figures.grid
    curve = one.curve(law.predicted(figures.best(law.fit.vector, x), x))
    figure = Figure(Axis(figures.c, log=True, power=True), _metric_axis(one))
    level = f"{one.job.level:.0%}"
    assert curve.outer is not None
    assert curve.inner is not None
    figure.add(band(x, curve.outer, WIDE, f"{level} prediction"))
    figure.add(band(x, curve.inner, NARROW, "50% prediction"))
    figure.add(line(x, curve.value, TARGET, "dot", name="predicted"))
    figure.add(_dots(one, spent(law.all_points)[_with_metric(one)], figures))
    if (p := one.chained) is not None:
        figure.add(star(p.loss.flops, p.value, "target", p.outer))
    return figure


def _metric_axis(one: TaskFit) -> Axis:
    is_loss = one.job.metric == "loss"
    return Axis(f"{one.task.name} ({KINDS[one.job.metric]})", log=is_loss, percent=not is_loss)


def _with_metric(one: TaskFit) -> Array:
    """Return the mask of the law's runs that have the metric, (n,)."""
    has_metric: Array = one.law.table[OUTCOME].notna().to_numpy()
    return has_metric


def _dots(one: TaskFit, x: Array, figures: Figures) -> Trace:
    """Return a dot for each run with the metric, in the colour of its budget."""
    rows = one.law.table[_with_metric(one)]
    y, shades = one.in_metric(one.metric), figures.shades
    colours = [shades[float(b)] for b in rows["budget"]] if shades else [INK]
    names = rows["name"].astype(str) if "name" in rows else [f"run {i}" for i in rows.index]
    texts = [
        f"{name}\nloss {loss:.5g}\nmetric {metric:.5g}"
        for name, loss, metric in zip(names, one.loss, y, strict=True)
    ]
    return dots(x, y, colours, texts)
