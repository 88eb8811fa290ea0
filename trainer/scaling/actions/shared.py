"""What actions of `forescale study` share: groups of keys, the reading of runs, output as JSON."""

from typing import Any

import pandas as pd

from forescale.ground.document import tell
from forescale.ground.errors import DONE, UserError
from forescale.scaling.analysis.mixture_fit import has_mixtures
from forescale.scaling.analysis.recipe_cells import has_recipes
from forescale.scaling.config import StudyJob
from forescale.scaling.fitting.points import SETTINGS
from forescale.scaling.study.inputs import read, with_outcome

STUDY = ("study", "studies")
RUNS = (*STUDY, "input", "columns", "rows", "run.root")
LAW = (
    "form", "method", "size", "cost", "delta", "residual", "drop_largest", "near",
    "bootstraps", "resample", "level", "seed",
)  # fmt: skip
TARGET = (
    "target.parameters", "target.tokens", "target.flops", "target.served",
    "target.most_parameters", "target.far",
)  # fmt: skip
TARGET_OF_LAW = (*TARGET, *(f"target.{name}" for name in ("unique", *SETTINGS)))
LINK = ("metric", "link", "chance")
TASK = ("task", *LINK)
FIT = (*RUNS, *LAW, *TARGET_OF_LAW, *TASK)


def read_one_recipe(job: StudyJob, action: str) -> tuple[pd.DataFrame, str]:
    """Return the records, with the metric of `task`, and their name in messages. Raises UserError
    for records of several recipes, to which no single law can be fitted."""
    table, where = read(job)
    if has_recipes(table):
        problem = f"has several recipes, and study {action} is for one"
        todo = "compare them with study fit; of a table, keep one with rows={recipe: NAME}"
        raise UserError(where, problem, todo)
    if has_mixtures(table, job):
        problem = f"has several mixtures, and study {action} is for one"
        raise UserError(where, problem, "see study fit for the best shares")
    return with_outcome(table, job, where), where


def print_json(document: Any) -> int:
    """Print a result as the document for programs; return exit code 0."""
    tell(document)
    return DONE
