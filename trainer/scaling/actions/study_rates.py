"""`forescale study rates`: laws of the best learning rate and batch."""

from forescale.config.job import Action
from forescale.ground.console import open_console
from forescale.ground.document import is_json
from forescale.ground.errors import DONE
from forescale.pages.document import show
from forescale.scaling.actions.shared import RUNS, TARGET, print_json, read_one_recipe
from forescale.scaling.config import StudyJob
from forescale.scaling.design.rate_laws import as_dict, rate_laws
from forescale.scaling.report.rate_sections import rate_sections

ACTION = Action(
    "Fit how the best learning rate and batch depend on N and D, from a table of sweeps.",
    (*RUNS, "size", "cost", "level", *TARGET, "against"),
    (
        "study rates sweeps.csv target.parameters=7e9 target.tokens=1e12",
        "study rates 'runs/*' against=[flops] target.flops=1e21",
    ),
    {"level": float, "learning_rate": dict | None, "batch_tokens": dict | None},
)


def main(job: StudyJob) -> int:
    """Print both laws, and their values for the target."""
    table, where = read_one_recipe(job, "rates")
    laws = rate_laws(table, job, where)
    if is_json():
        return print_json(as_dict(laws))
    show(open_console(), rate_sections(laws), where)
    return DONE
