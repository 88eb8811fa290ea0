"""`forescale rehearse`: make a job's own steps on GPUs that aren't there."""

import sys
from contextlib import suppress
from functools import partial

from forescale.checkpoint.choice import newest_step
from forescale.config.job import overrides_of
from forescale.config.schema import ConfigError, Problem
from forescale.ground.document import is_json, tell
from forescale.ground.errors import DONE, UserError
from forescale.ground.storage import write_output
from forescale.plan.config import page_path
from forescale.plan.plan import Plan
from forescale.rehearsal.config import RehearseJob
from forescale.rehearsal.rehearsal import rehearse
from forescale.rehearsal.rows import as_json, certificate, page, show
from forescale.run.command import job_of
from forescale.run.directory import Run
from forescale.run.start import check_changes, expect_trainable

JOB = RehearseJob
EXAMPLES = (
    "rehearse recipe=llama-7b engine=zero3 plan.gpus=64",
    "rehearse recipe=llama-1b plan.gpus=8 rehearse.ranks=[0,7]   (the first and the last rank)",
    "rehearse big plan.gpus=64 plan.to=rehearsal.html   (a run that exists; a page)",
    "rehearse model.mixer=window model.mixer.window=256 plan.gpus=8 --json",
)


def main(words: list[str]) -> int:
    """Print what was seen and return 0.

    Raises ConfigError (exit code 2) with the problems of the plan before anything is rehearsed, and
    with those of the rehearsal after its tables.
    """
    job, plan = _plan(words)
    to = page_path(job)
    if plan.problems:
        tell({"problems": [p._asdict() for p in plan.problems]})
        raise ConfigError(plan.problems)
    rehearsed = rehearse(plan, partial(Plan, newest=newest_step), say)
    if is_json():
        tell(as_json(rehearsed))
    else:
        show(rehearsed)
    if to is not None:
        write_output(to, page(rehearsed, ["forescale", "rehearse", *words]).encode())
    if rehearsed.problems:
        raise ConfigError(rehearsed.problems)
    try:
        path = certificate(plan.job, rehearsed).write()
        say(f"Certificate, which submit and status name: {path}")
    except (OSError, UserError) as e:
        say(f"No certificate is written: {e}")
    return DONE


def problems_of_job(words: list[str]) -> tuple[list[Problem], str]:
    """Rehearse a job; return what would end it, and a sentence on what was seen, whose certificate
    is written. Raises UserError if it can't be rehearsed here, or only values decide."""
    _, plan = _plan(words)
    if plan.problems:
        raise ConfigError(plan.problems)
    rehearsed = rehearse(plan, partial(Plan, newest=newest_step), say)
    errors = [report["error"] for report in rehearsed.reports if "error" in report]
    if any("place" not in e or e.get("doubt") for e in errors):  # a process died, or values decide
        raise ConfigError(rehearsed.problems)
    if rehearsed.problems:
        return rehearsed.problems, ""
    result = certificate(plan.job, rehearsed)
    with suppress(OSError, UserError):  # it is made again the next time
        result.write()
    return [], str(result)


def _plan(words: list[str]) -> tuple[RehearseJob, Plan]:
    """Return the job that words describe and its plan, whose notes are printed."""
    notes: list[str] = []
    overrides = overrides_of(RehearseJob, words)
    job = job_of(RehearseJob, overrides, notes=notes)
    is_named = any(word.startswith("run.name=") for word in overrides)
    if is_named:
        expect_trainable(Run(job.run.directory))
    plan = Plan(job, newest_step)
    if is_named:
        plan.check(lambda: check_changes(plan.job.training))
    for note in notes if not plan.problems else ():
        say(note)
    return job, plan


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
