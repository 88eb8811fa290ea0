"""`forescale study exclude`: leaves runs out of the fit."""

from forescale.config.job import Action
from forescale.ground.document import tell
from forescale.ground.errors import DONE, UserError
from forescale.scaling.actions.shared import STUDY
from forescale.scaling.config import StudyJob
from forescale.scaling.study.directory import Study

ACTION = Action(
    "Leave runs out of the fit, with a reason that is stored.",
    (*STUDY, "cells", "why"),
    ("study exclude study=mine cells=[s2-n3] why='a faulty node'",),
    {"path": str, "excluded": list[str]},
)


def main(job: StudyJob) -> int:
    """Store the exclusion of the cells as events of the study."""
    study = Study(job.folder)
    if not job.cells or not job.why:
        todo = "write cells=[NAME] why='what is wrong with it'"
        raise UserError("study exclude", "needs cells and a reason", todo)
    for name in set(job.cells) - {c.name for c in study.plan.cells}:
        todo = f"see forescale study status study={job.study}"
        raise UserError("cells", f"{name} is no cell of {job.folder}", todo)
    with study.deciding():
        for name in job.cells:
            study.event("cell_excluded", cell=name, why=job.why)
    tell({"path": job.folder, "excluded": job.cells})
    return DONE
