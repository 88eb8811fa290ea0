"""The metrics of tasks as text: links, predictions, and the scores of backtests.

Invariant: everything that makes the numbers doubtful is printed with them.
"""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from forescale.ground.console import table
from forescale.scaling.analysis.backtest import BEST, OTHER, Scores
from forescale.scaling.analysis.forecast import TaskScore
from forescale.scaling.analysis.task_fit import LAST_VALUE, LINE, TWO_STEPS, TaskFit
from forescale.scaling.config import StudyJob

KINDS = {"accuracy": "accuracy", "error": "share of errors", "loss": "loss"}
_DISTANCE = {1: "one budget", 2: "two budgets"}
_AHEAD = {1: "One budget ahead", 2: "Two budgets ahead"}
_INTERVAL = (
    "The intervals are for one new run: they have the doubt of its loss, that of the link, and the "
    "scatter of runs around the link."
)


def show_task(one: TaskFit, console: Console) -> None:
    """Print one metric beside its law: the link, the prediction, and what makes them doubtful."""
    console.print(
        f"\n[bold]Task {escape(one.task.name)}[/]: {KINDS[one.job.metric]}. Its link to the loss: "
        f"{escape(one.link.form.source)}",
        soft_wrap=True,
    )
    console.print(escape(prediction_of(one)), soft_wrap=True)
    if one.chained is not None:
        console.print(_INTERVAL, soft_wrap=True)
    for line in skill_lines(one.skill, one.job):
        console.print(escape(line), soft_wrap=True)
    console.print(_links([one]))
    for note in one.doubts:
        console.print(f"[yellow]Doubt:[/] {escape(note)}", soft_wrap=True)


def show_tasks(fits: Sequence[TaskFit], console: Console) -> None:
    """Print the link of each task, its prediction, and what makes them doubtful."""
    job, form = fits[0].job, fits[0].link.form
    console.print(escape(form.source) + "\n", soft_wrap=True)
    console.print(_links(fits))
    if job.target.is_given:
        console.print()
        console.print(_predicted_tasks(fits, f"{job.level:.0%}"))
        console.print(_INTERVAL, soft_wrap=True)
    for one in fits:
        for note in [*one.doubts, *one.doubts_of_law]:
            console.print(f"[yellow]Note:[/] {escape(one.task.name)}: {escape(note)}",
                          soft_wrap=True)  # fmt: skip


def _links(fits: Sequence[TaskFit]) -> Table:
    """Return a row for each task: the parameters of its link with their intervals."""
    job, form = fits[0].job, fits[0].link.form
    level = f"{job.level:.0%}"
    ends = [column for symbol in form.symbols for column in (symbol, f"{level} interval")]
    links = table("task", "rows", *ends, "scatter", left=("task",))
    for one in fits:
        low, high = one.replicates.interval(job.level)
        cells = [
            cell
            for i, each in enumerate(one.link.values.values())
            for cell in (f"{each:.4g}", f"{low[i]:.4g} to {high[i]:.4g}")
        ]
        links.add_row(escape(one.task.name), str(len(one.outcomes)), *cells,
                      f"{one.residuals.std():.2%}")  # fmt: skip
    return links


def _predicted_tasks(fits: Sequence[TaskFit], level: str) -> Table:
    """Return a row for each task: its predicted loss, and the metric that follows."""
    job = fits[0].job
    grid = table("task", "loss", f"{level} interval", job.metric, "50% interval",
                 f"{level} interval", left=("task",))  # fmt: skip
    for one in fits:
        if (p := one.chained) is not None:
            low, high = p.loss.outer
            spans = (span(ends, job.metric) for ends in (p.inner, p.outer))
            loss = (f"{p.loss.loss:.4f}", f"{low:.4f} to {high:.4f}")
            grid.add_row(escape(one.task.name), *loss, value(p.value, job.metric), *spans)
    return grid


def show_task_forecasts(scores: Sequence[TaskScore], console: Console) -> None:
    """Print the predicted metrics beside those observed since, if forecasts have any."""
    if not scores:
        return
    grid = table("forecast", "run", "task", "predicted", "interval", "observed", "inside",
                 left=("run", "task"))  # fmt: skip
    for one in scores:
        cells = value(one.predicted, one.metric), span(one.interval, one.metric)
        came = "-" if one.observed is None else value(one.observed, one.metric)
        inside = {None: "-", True: "yes", False: "no"}[one.inside]
        grid.add_row(one.forecast, escape(one.run), escape(one.column), *cells, came, inside)
    console.print(grid)


def show_task_scores(scores: Sequence[Scores], job: StudyJob, console: Console) -> None:
    """Print the scores of the two steps and of their rivals over all tables, then of each apart."""
    names = list(dict.fromkeys(one.table for one in scores if one.table is not None))
    console.print(
        f"The {KINDS[job.metric]} {escape(job.task or '')} at every origin of {len(names)} "
        f"table{'s' * (len(names) > 1)}. An origin knows the runs of its budgets, three or more, "
        "and nothing beyond them.",
        soft_wrap=True,
    )
    for name in [None, *names] if len(names) > 1 else [None]:
        for ahead, words in _AHEAD.items():
            if rows := [one for one in scores if one.table == name and one.ahead == ahead]:
                console.print(f"\n[bold]{words}[/]{'' if name is None else f', {escape(name)}'}")
                console.print(_scored(rows, job))
    console.print(
        "\nerror: median size of predicted minus observed metric (of a loss: of the log of their "
        "ratio) at the run with the lowest loss of each budget; mean: its mean size; bias: its "
        "mean with sign; best, other: shares inside the 50 % and the 90 % interval, of these runs "
        "and of the others; vs: skill, 1 - mean error over that of the rival. two steps: the loss "
        "by the law, the metric by the link; line: straight in log C through the best runs of the "
        "last three budgets; last value: that of the last budget's best run.",
        soft_wrap=True,
    )


def _scored(scores: Sequence[Scores], job: StudyJob) -> Table:
    grid = table("method", "forecasts", "error", "mean", "bias", BEST, OTHER, f"vs {LINE}",
                 f"vs {LAST_VALUE}", left=("method",))  # fmt: skip
    for one in scores:
        inside = (
            f"{c.inner:.0%} {c.outer:.0%}" if (c := one.coverage.get(g)) else "-"
            for g in (BEST, OTHER)
        )
        skill = (f"{one.skill[r]:+.2f}" if r in one.skill else "-" for r in (LINE, LAST_VALUE))
        sizes = (
            change(one.median, job.metric),
            "-" if one.mean is None else change(one.mean, job.metric),
            change(one.bias, job.metric, "+"),
        )
        grid.add_row(one.method, str(one.count), *sizes, *inside, *skill)
    return grid


def value(number: float, metric: str) -> str:
    """Return a metric for reading: a share as a percentage. metric: its kind."""
    return f"{number:.4f}" if metric == "loss" else f"{number:.1%}"


def span(ends: tuple[float, float], metric: str) -> str:
    """Return an interval for reading."""
    return " to ".join(value(end, metric) for end in ends)


def change(error: float, metric: str, sign: str = "") -> str:
    """Return an error for reading: of a loss its share, of a share its points of a percentage."""
    return f"{error:{sign}.2%}" if metric == "loss" else f"{100 * error:{sign}.2f} points"


def prediction_of(one: TaskFit) -> str:
    """Return the prediction as a sentence, or why there is none."""
    job, p = one.job, one.chained
    if one.unseen:
        return f"No prediction. {one.unseen}"
    if p is None:
        return "No target is given (target.flops, target.parameters, target.tokens)."
    inner, outer = span(p.inner, job.metric), span(p.outer, job.metric)
    return (
        f"Prediction: {KINDS[job.metric]} {value(p.value, job.metric)} at loss {p.loss.loss:.4f}; "
        f"50% interval {inner}, {job.level:.0%} interval {outer}."
    )


def skill_lines(scores: Sequence[Scores], job: StudyJob) -> list[str]:
    """Return a sentence for each distance ahead: how far off such predictions would have been."""
    lines = []
    by = {(one.ahead, one.method): one for one in scores if one.table is None}
    for ahead, words in _DISTANCE.items():
        if (mine := by.get((ahead, TWO_STEPS))) is None:
            continue
        held, size = mine.coverage[BEST], change(mine.median, job.metric)
        others = ", ".join(
            f"{name} by {change(by[ahead, rival].median, job.metric)} (skill "
            f"{mine.skill[rival]:+.2f})"
            for rival, name in ((LINE, "a straight line in log C"), (LAST_VALUE, "the last value"))
        )
        times = f"{mine.count} times" if mine.count > 1 else "once"
        lines.append(
            f"Backtest, {words} ahead, {times}: off by {size} (median) at the "
            f"best run of a budget, {others}; {round(held.outer * held.count)} of {held.count} "
            "were inside the 90% interval."
        )
    return lines
