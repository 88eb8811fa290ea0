"""`forescale study launch`: trains the planned runs, on this machine or in SLURM's queue."""

from dataclasses import replace
from functools import partial

from forescale.config.job import Action
from forescale.ground.console import open_console
from forescale.ground.document import tell
from forescale.ground.errors import DONE, UserError
from forescale.pages.document import show
from forescale.scaling.actions.shared import STUDY
from forescale.scaling.analysis.forecast import read_forecasts, score
from forescale.scaling.config import StudyJob
from forescale.scaling.report.study_sections import forecast_section
from forescale.scaling.study.directory import Study
from forescale.scaling.study.launching import LocalLauncher, QueueLauncher, expect_no_code

ACTION = Action(
    "Train the planned runs, here or in SLURM's queue; the same command again resumes them.",
    (*STUDY, "launch.*"),
    (
        "study launch study=mine launch.at_once=2",
        "study launch study=mine launch.slurm=PROFILE -- slurm.time='2 h'   (as job arrays)",
    ),
    {"path": str, "unfinished": int, "exit_code": int},
)
_log = partial(print, flush=True)


def with_arguments(job: StudyJob, arguments: list[str]) -> StudyJob:
    """Return the job with these arguments of `submit`."""
    if not job.launch.slurm:
        problem = "study launch takes arguments after it only with launch.slurm=PROFILE"
        raise UserError("--", problem, "add it: the arguments are those of forescale submit")
    return replace(job, launch=replace(job.launch, arguments=arguments))


def main(job: StudyJob) -> int:
    """Launch until nothing is left to run, and score the forecasts."""
    study, keys = Study(job.folder), job.launch
    if not keys.trust:
        expect_no_code(study)
    with study.deciding():
        if keys.retry:
            for state in study.states():
                if state.status in ("diverged", "failed"):
                    study.retry(state.cell.name)
        code = (QueueLauncher if keys.slurm else LocalLauncher)(study, keys, _log).go()
    left = study.unfinished()
    tell({"path": study.folder, "unfinished": len(left), "exit_code": code})
    if code != DONE:
        return code
    if not left:
        _log(f"Nothing is left to run. Next: forescale study report study={study.folder.name}")
    elif not keys.slurm or keys.follow:
        trunks = ", ".join(sorted({c.trunk for c in left if c.trunk}))
        _log(f"{len(left)} cells can't start: {trunks} saved no checkpoint where they branch off.")
    if forecasts := read_forecasts(study.forecasts):
        show(open_console(), [forecast_section(forecasts, score(forecasts, study.table()))])
    return code
