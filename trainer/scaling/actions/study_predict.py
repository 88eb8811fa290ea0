"""`forescale study predict`: stores a forecast of a run before it is trained."""

from typing import NotRequired

from forescale.config.job import Action
from forescale.ground.document import tell
from forescale.ground.errors import DONE, UserError
from forescale.scaling.actions.shared import FIT, read_one_recipe
from forescale.scaling.analysis.forecast import write_forecast
from forescale.scaling.analysis.selection import law_of
from forescale.scaling.analysis.task_fit import task_of
from forescale.scaling.config import StudyJob
from forescale.scaling.report.task_section import prediction_of

ACTION = Action(
    "Store a forecast of a run before it is trained.",
    (*FIT, "target.branches", "target.run"),
    ("study predict 'runs/small-*' target.run=big target.parameters=1e8 target.tokens=2e9",),
    {"file": str, "loss": float, "interval": list[float], "task": NotRequired[dict]},
)


def main(job: StudyJob) -> int:
    """Write the forecast, and print its interval."""
    table, where = read_one_recipe(job, "predict")
    if job.target.run is None:
        todo = "write target.run=NAME, the name that the run will have"
        raise UserError("target.run", "is not given", todo)
    law = law_of(table, job, where)
    task = task_of(law, where)
    forecast = write_forecast(law, job.forecasts, job.target.run, task=task)
    facts = forecast.facts
    tell({"file": forecast.path, **facts})
    (low_50, high_50), (low, high) = facts["interval_50"], facts["interval"]
    print(
        f"{forecast.path}: loss {facts['loss']:.4f}, 50% interval {low_50:.4f} to {high_50:.4f}, "
        f"{job.level:.0%} interval {low:.4f} to {high:.4f}, by {facts['method']}, calibrated with "
        f"{facts['backtests']} earlier forecasts. When {job.target.run} is trained: "
        "forescale study score RUNS"
    )
    if task is not None:
        print(f"{job.task}: {prediction_of(task)}")
    return DONE
