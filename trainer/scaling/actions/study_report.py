"""`forescale study report`: writes the HTML page of a study, of other runs or of recipes.

The report of a planned study is written even before a law can be fitted.
"""

import sys

from forescale.config.job import Action
from forescale.ground.document import tell
from forescale.ground.errors import DONE, UserError
from forescale.scaling.actions.shared import FIT
from forescale.scaling.analysis.mixture_fit import MixtureFit, has_mixtures
from forescale.scaling.analysis.multipliers import Multipliers
from forescale.scaling.analysis.recipe_cells import has_recipes
from forescale.scaling.analysis.selection import law_of
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.analysis.task_fit import TaskFit, task_of
from forescale.scaling.config import StudyJob
from forescale.scaling.report import mixture_page, recipes_page
from forescale.scaling.report.evidence import gather
from forescale.scaling.report.fit_page import beside, write
from forescale.scaling.study.inputs import read, with_outcome

ACTION = Action(
    "Write the fit, its figures and its doubts as one HTML file.",
    (*FIT, "target.run", "reference", "goal", "to"),
    ("study report study=mine", "study report 'runs/*' target.flops=1e18 to=report.html"),
    {"file": str, "law": bool, "runs": int},
)


def main(job: StudyJob) -> int:
    """Write the page that fits the records."""
    table, where = read(job)
    command = ["forescale", *sys.argv[1:]]
    if has_recipes(table):
        recipes = Multipliers(table, job, where)
        page, *_ = recipes_page.write(recipes, table, job.report, command)
        tell({"file": page, "law": True, "runs": len(table)})
        count = f"{len(recipes.candidates)} recipes against {recipes.base}"
        print(f"{page}: {count}; open it in a browser.")
        return DONE
    if has_mixtures(table, job):
        mixed = MixtureFit(table, job, where)
        page, *_ = mixture_page.write(mixed, table, job.report, command)
        tell({"file": page, "law": True, "runs": len(table)})
        print(f"{page}: {len(mixed.shares)} mixtures; open it in a browser.")
        return DONE
    evidence = gather(job, with_outcome(table, job, where))
    task: TaskFit | str | None = None
    law: StudyFit | str
    try:
        law = law_of(evidence.records, job, where)  # with the sweeps, for its rates
        if not evidence.stages:
            law.predict()  # raises UserError; the page of a planned study shows the reason instead
    except UserError as e:
        if not evidence.stages:
            raise
        law = str(e)
    if isinstance(law, StudyFit):
        try:
            task = task_of(law, where)
        except UserError as e:
            if not evidence.stages:
                raise
            task = str(e)
    write(law, evidence, job.report, where, command, task)
    has_law = isinstance(law, StudyFit)
    tell({"file": job.report, "law": has_law, "runs": len(evidence.fitted)})
    runs = "no law yet" if isinstance(law, str) else f"{len(law.points)} runs"
    print(f"{job.report}: {runs}; open it in a browser. Figures for papers: {beside(job.report)}/")
    return DONE
