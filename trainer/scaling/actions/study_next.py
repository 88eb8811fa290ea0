"""`forescale study next`: chooses further runs for a study or for any runs."""

from forescale.config.job import Action
from forescale.ground.console import open_console
from forescale.ground.document import tell
from forescale.ground.errors import DONE, UserError
from forescale.scaling.actions.shared import LAW, RUNS, TARGET, read_one_recipe
from forescale.scaling.analysis.selection import law_of
from forescale.scaling.config import StudyJob
from forescale.scaling.design.next_runs import candidates_of, recommend, show
from forescale.scaling.design.planning import common_of
from forescale.scaling.design.simulate import RunSet
from forescale.scaling.study.decisions import add_runs
from forescale.scaling.study.directory import Study

ACTION = Action(
    "Choose the additional runs that narrow the prediction most for their cost.",
    (
        *RUNS, *LAW, *TARGET, "target.device_hours", "cap", "add",
        "plan.arguments", "plan.model", "plan.vocab_size", "plan.sequence_length",
        "plan.micro_batch", "plan.ranks", "plan.rate", "plan.unique",
    ),
    ("study next study=mine cap=1e15 add=true",),
    {"runs": list[dict], "added": bool},
)  # fmt: skip


def main(job: StudyJob) -> int:
    """Show the runs to add for `cap`; with `add`, add them to the plan."""
    table, where = read_one_recipe(job, "next")
    if job.cap is None:
        todo = "write cap=1e15, the FLOPs that the additional runs may spend"
        raise UserError("cap", "is not given", todo)
    study = None if job.input else Study(job.folder)
    common = study.plan.common if study else common_of(job)
    law = law_of(table, job, where)
    if not job.target.is_given:
        todo = "write target.flops=1e18, the compute of the run to predict"
        raise UserError("target", "is not given", todo)
    low = float(law.points.flops.min()) if law.points.flops is not None else job.cap / 100
    candidates = candidates_of(common, low, job.cap, law.all_points)
    choices = recommend(law.calibrated, candidates, RunSet.of_target(common, job.target), job.cap)
    show(choices, open_console(), common.rate)
    tell({"runs": choices, "added": bool(study and job.add)})
    if study and job.add:
        with study.deciding():
            add_runs(study, choices, print)
        print(f"Added to the plan. Next: forescale study launch study={job.study}")
    return DONE
