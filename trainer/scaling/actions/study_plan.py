"""`forescale study plan`: chooses and prices the runs of a study; launches nothing."""

from dataclasses import asdict, replace

from forescale.config.job import Action
from forescale.ground.console import open_console
from forescale.ground.document import tell
from forescale.ground.errors import DONE
from forescale.scaling.actions.shared import LAW, STUDY
from forescale.scaling.config import StudyJob
from forescale.scaling.design import planning
from forescale.scaling.study.directory import Study, must_be_free

ACTION = Action(
    "Choose and price the runs of a study, and simulate how precise its prediction will be.",
    (*STUDY, "plan.*", *LAW, "goal", "target.*"),
    (
        "study plan study=mine plan.cap=1e15 target.flops=4e15",
        "study plan study=mine plan.cap=1e18 -- data.path=DIR model.mlp=gelu   (of all runs)",
        "study plan plan.kind=mixtures plan.cap=1e18 -- data=mixture 'data.sources={a: A, b: B}'",
    ),
    {"path": str, "cells": int, "cap": float},
)


def with_arguments(job: StudyJob, arguments: list[str]) -> StudyJob:
    """Return the job with these arguments of `train` for all runs."""
    return replace(job, plan=replace(job.plan, arguments=arguments))


def main(job: StudyJob) -> int:
    """Write the directory of the study, and show its plan."""
    must_be_free(job.folder)
    plan, precision = planning.plan(job)
    console = open_console()
    Study.make(job.folder, job, plan, {"expected": asdict(precision) if precision else None})
    planning.show(plan, precision, console)
    tell({"path": job.folder, "cells": len(plan.cells), "cap": plan.cap})
    todo = f"forescale study launch study={job.study}"
    console.print(f"\nThe plan is in {job.folder}. Next: {todo}", soft_wrap=True)
    return DONE
