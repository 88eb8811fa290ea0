"""`forescale study sync`: takes the decisions that are due, and launches nothing."""

from forescale.config.job import Action
from forescale.scaling.actions import study_status
from forescale.scaling.actions.shared import STUDY
from forescale.scaling.analysis.forecast import read_forecasts, score
from forescale.scaling.config import StudyJob
from forescale.scaling.study.decisions import advance
from forescale.scaling.study.directory import Study

ACTION = Action(
    "Take all decisions that the results so far allow, and launch nothing.",
    (*STUDY, "live"),
    ("study sync study=mine",),
    study_status.BOARD,
    "with --live, every two seconds",
)


def main(job: StudyJob) -> int:
    """Decide, score the forecasts, and show the board."""
    study = Study(job.folder)
    with study.deciding():
        advance(study, lambda line: print(line, flush=True))
        if (table := study.table()).size and (forecasts := read_forecasts(study.forecasts)):
            score(forecasts, table)
    return study_status.main(job)
