"""`forescale study backtest`: how far off forecasts of finished studies would have been."""

import sys

from forescale.config.job import Action
from forescale.ground.console import open_console, progress_display
from forescale.ground.errors import DONE
from forescale.scaling.actions.shared import RUNS, TASK, print_json
from forescale.scaling.analysis import backtest
from forescale.scaling.analysis.task_fit import forecasts_of, task_scores
from forescale.scaling.config import StudyJob
from forescale.scaling.report.fit_text import show_scores
from forescale.scaling.report.task_text import show_task_scores
from forescale.scaling.study.inputs import read_finished

ACTION = Action(
    "Judge forecasts by finished studies: what each method would have said, and how far off.",
    (*RUNS, "form", "size", "cost", "delta", "residual", "near", *TASK, "json"),
    (
        "study backtest study=mine",
        "study backtest points.csv columns='{parameters: Model Size, budget: C}'",
        "study backtest 'tables/*.csv' --json   (of every table, and of all together)",
        "study backtest runs.csv task=acc_arc   (the metric of a task, by two steps)",
    ),
)


def main(job: StudyJob) -> int:
    """Score each method, of several tables apart and together; with `task`, the two steps."""
    tables = read_finished(job)
    if job.task is not None:
        return _backtest_task(tables, job)
    with progress_display() as progress:
        scores = backtest.scores(backtest.forecasts(tables, job, progress=progress))
    if job.json:
        return print_json(backtest.as_dict(scores))
    show_scores(scores, open_console())
    return DONE


def _backtest_task(tables: list[backtest.Finished], job: StudyJob) -> int:
    with progress_display() as progress:
        rows, refused = forecasts_of(tables, job, progress)
    for one in refused:
        print(f"Note: {one.where} is left out: {one.problem}.", file=sys.stderr)
    scores = task_scores(rows)
    if job.json:
        return print_json(backtest.as_dict(scores))
    show_task_scores(scores, job, open_console())
    return DONE
