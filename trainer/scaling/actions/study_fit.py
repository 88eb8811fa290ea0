"""`forescale study fit`: fits the law, compares recipes, or finds the best shares of sources."""

from typing import NotRequired

from forescale.config.job import Action
from forescale.ground.console import open_console
from forescale.ground.document import is_json
from forescale.ground.errors import DONE
from forescale.pages.document import show
from forescale.scaling.actions.shared import FIT, print_json
from forescale.scaling.analysis import mixture_fit, multipliers
from forescale.scaling.analysis.forecast import read_forecasts
from forescale.scaling.analysis.recipe_cells import has_recipes
from forescale.scaling.analysis.selection import law_of
from forescale.scaling.analysis.table_fit import as_dict
from forescale.scaling.analysis.task_fit import task_as_dict, task_of
from forescale.scaling.config import StudyJob
from forescale.scaling.report.fit_sections import ranges, terminal_sections
from forescale.scaling.report.mixture_page import mixture_sections, summary_of
from forescale.scaling.report.recipes_page import head_of, recipe_sections
from forescale.scaling.report.task_section import task_section
from forescale.scaling.study.inputs import read, with_outcome

ACTION = Action(
    "Fit the scaling law to a study, to other runs or to a table, and predict the target.",
    (*FIT, "target.run", "sensitivity", "reference", "goal"),
    (
        "study fit study=mine",
        "study fit 'runs/*' target.flops=1e18",
        "study fit points.csv columns='{parameters: Model Size, flops: Training FLOP}'",
        "study fit points.csv form=over-training target.parameters=7e9 target.tokens=1e12",
        "study fit study=mine task=ability/copy/4 chance=0 target.flops=1e18",
        "study fit recipes.csv reference=adamw   (columns recipe, flops, learning_rate, loss)",
        "study fit study=mine goal='{code: 2, web: 1}'   (of mixtures: their best shares)",
    ),
    {
        "level": float, "doubts": list[str], "prediction": NotRequired[dict | None],
        "candidates": NotRequired[list[dict]], "weights": NotRequired[dict[str, float]],
    },
)  # fmt: skip


def main(job: StudyJob) -> int:
    """Print the law; of several recipes their compute multipliers, of mixtures the best shares."""
    table, where = read(job)
    if has_recipes(table):
        recipes = multipliers.Multipliers(table, job, where)
        if is_json():
            return print_json(multipliers.as_dict(recipes))
        show(open_console(), recipe_sections(recipes), head_of(recipes))
        return DONE
    if mixture_fit.has_mixtures(table, job):
        mixed = mixture_fit.MixtureFit(table, job, where)
        if is_json():
            return print_json(mixture_fit.as_dict(mixed))
        show(open_console(), mixture_sections(mixed), summary_of(mixed))
        return DONE
    law = law_of(with_outcome(table, job, where), job, where)
    law.predict()  # raises UserError for a bad target before anything is printed
    task = task_of(law, where)
    if is_json():
        return print_json(as_dict(law) | ({} if task is None else {"task": task_as_dict(task)}))
    forecasts = [] if job.input and not job.target.run else read_forecasts(job.forecasts)
    sections = terminal_sections(law, forecasts) + ([] if task is None else [task_section(task)])
    show(open_console(), sections, where, ranges(law))
    return DONE
