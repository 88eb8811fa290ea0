"""`forescale study profile`: profile intervals of a law's parameters."""

from forescale.config.job import Action
from forescale.ground.console import open_console
from forescale.ground.errors import DONE
from forescale.pages.document import show
from forescale.scaling.actions.shared import LAW, RUNS, print_json, read_one_recipe
from forescale.scaling.analysis.selection import law_of
from forescale.scaling.config import StudyJob
from forescale.scaling.fitting.profile import profiles
from forescale.scaling.report.profiles_and_rates import profile_sections

ACTION = Action(
    "Find how far E and each exponent can go before the fit becomes clearly worse.",
    (*RUNS, *LAW, "json"),
    ("study profile study=mine", "study profile points.csv delta=null level=0.95"),
)


def main(job: StudyJob) -> int:
    """Print the profile intervals beside those of the resampled fits."""
    table, where = read_one_recipe(job, "profile")
    law = law_of(table, job, where)
    intervals = profiles(law.fit, job.level)
    if job.json:
        facts = {"form": law.form.name, "level": job.level, "doubts": law.doubts}
        rows = [vars(interval) for interval in intervals]
        return print_json({**facts, "notes": law.notes, "profiles": rows})
    show(open_console(), profile_sections(intervals, law), f"{where}: {len(law.points)} runs")
    return DONE
