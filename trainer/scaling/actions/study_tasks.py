"""`forescale study tasks`: predicts the accuracy of tasks."""

from forescale.config.job import Action
from forescale.ground.console import open_console
from forescale.ground.errors import DONE
from forescale.pages.document import show
from forescale.scaling.actions.shared import LAW, LINK, RUNS, TARGET_OF_LAW, print_json
from forescale.scaling.analysis.task_fit import fit_tasks, tasks_as_dict
from forescale.scaling.config import StudyJob
from forescale.scaling.report.task_section import tasks_sections
from forescale.scaling.study.inputs import read_tasks

ACTION = Action(
    "Predict the accuracy of tasks in two steps: N and D to a loss, the loss to the accuracy.",
    (*RUNS, *LAW, *TARGET_OF_LAW, "tasks", "task_losses", *LINK, "json"),
    (
        "study tasks runs.csv tasks='{arc: acc}' task_losses='{arc: bpb}' target.flops=1e24",
        "study tasks runs.csv tasks='{average: err_avg}' metric=error link=exponential",
        "study tasks runs.csv checkpoints.csv tasks='{arc: acc_arc}'   (step 2 by checkpoints)",
    ),
)


def main(job: StudyJob) -> int:
    """Fit the link from loss to accuracy of each task, and predict the target's metrics."""
    answers = fit_tasks(read_tasks(job), job)
    if job.json:
        return print_json(tasks_as_dict(answers))
    show(open_console(), tasks_sections(answers))
    return DONE
