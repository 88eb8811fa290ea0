"""The words and sentences about a task's metric that terminal and page share."""

from collections.abc import Sequence

from forescale.scaling.analysis.task_fit import TaskFit
from forescale.scaling.config import StudyJob
from forescale.scaling.tasks.judge import BEST, LAST, LINE, TWO_STEPS, Scores

KINDS = {"accuracy": "accuracy", "error": "share of errors", "loss": "loss"}
_AHEAD = {1: "one budget", 2: "two budgets"}


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


def skill_lines(found: Sequence[Scores], job: StudyJob) -> list[str]:
    """Return a sentence for each distance ahead: how far off such predictions would have been."""
    said = []
    by = {(one.ahead, one.method): one for one in found if one.table is None}
    for ahead, words in _AHEAD.items():
        if (mine := by.get((ahead, TWO_STEPS))) is None:
            continue
        held, own = mine.coverage[BEST], change(mine.median, job.metric)
        others = ", ".join(
            f"{name} by {change(by[ahead, rival].median, job.metric)} (skill "
            f"{mine.skill[rival]:+.2f})"
            for rival, name in ((LINE, "a straight line in log C"), (LAST, "the last value"))
        )
        times = f"{mine.count} times" if mine.count > 1 else "once"
        said.append(
            f"Backtest, {words} ahead, {times}: off by {own} (median) at the "
            f"best run of a budget, {others}; {round(held.outer * held.count)} of {held.count} "
            "were inside the 90% interval."
        )
    return said
