"""`forescale study score`: compares forecasts with the observed losses."""

from dataclasses import asdict

from forescale.config.job import Action
from forescale.ground.console import open_console
from forescale.ground.document import is_json
from forescale.ground.errors import DONE, UserError
from forescale.pages.document import show
from forescale.scaling.actions.shared import RUNS, print_json, read_one_recipe
from forescale.scaling.analysis.forecast import columns_of, read_forecasts, score, score_tasks
from forescale.scaling.config import StudyJob
from forescale.scaling.report.study_sections import forecast_section
from forescale.scaling.report.task_section import forecast_sections
from forescale.scaling.study.inputs import with_columns

ACTION = Action(
    "Compare the stored forecasts with the losses observed since.",
    RUNS,
    ("study score 'runs/*'",),
    {"errors": dict[str, float], "inside": int, "abandoned": list[str], "tasks": list[dict]},
)


def main(job: StudyJob) -> int:
    """Print each forecast beside its outcome."""
    table, _ = read_one_recipe(job, "score")
    forecasts = read_forecasts(job.forecasts)
    if not forecasts:
        todo = "make one with forescale study predict"
        raise UserError(str(job.forecasts), "holds no forecasts", todo)
    losses = score(forecasts, table)
    tasks = score_tasks(forecasts, with_columns(table, job, columns_of(forecasts)))
    if is_json():
        return print_json(vars(losses) | {"tasks": [asdict(task) for task in tasks]})
    show(open_console(), [forecast_section(forecasts, losses), *forecast_sections(tasks)])
    return DONE
