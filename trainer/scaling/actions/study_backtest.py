"""`forescale study backtest`: how far off forecasts of finished studies would have been."""

import sys

from forescale.config.job import Action
from forescale.ground.console import open_console, progress_display
from forescale.ground.document import is_json
from forescale.ground.errors import DONE, UserError
from forescale.pages.document import show
from forescale.scaling.actions.shared import RUNS, TASK, print_json
from forescale.scaling.analysis import backtest
from forescale.scaling.analysis.task_fit import forecasts_of, task_scores
from forescale.scaling.config import StudyJob
from forescale.scaling.report.score_sections import score_sections
from forescale.scaling.study.inputs import read_finished

ACTION = Action(
    "Judge forecasts by finished studies: what each method would have said, and how far off.",
    (*RUNS, "form", "size", "cost", "delta", "residual", "near", *TASK),
    (
        "study backtest study=mine",
        "study backtest points.csv columns='{parameters: Model Size, budget: C}'",
        "study backtest 'tables/*.csv' --json   (of every table, and of all together)",
        "study backtest runs.csv task=acc_arc   (the metric of a task, by two steps)",
    ),
    {"scores": list[dict]},
)


def main(job: StudyJob) -> int:
    """Score each method, of several tables apart and together; with `task`, the two steps."""
    tables, refused = read_finished(job), list[UserError]()
    with progress_display() as progress:
        if job.task is None:
            scores = backtest.scores(backtest.forecasts(tables, job, progress=progress))
        else:
            rows, refused = forecasts_of(tables, job, progress)
            scores = task_scores(rows)
    for one in refused:
        print(f"Note: {one.where} is left out: {one.problem}.", file=sys.stderr)
    if is_json():
        return print_json(backtest.as_dict(scores))
    show(open_console(), score_sections(scores, None if job.task is None else job.metric))
    return DONE
