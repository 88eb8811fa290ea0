"""Whether a job is rehearsed before it is submitted, and by which command.

Invariant: a job that a rehearsal shows to end with an error is not submitted.
"""

import shlex
from collections.abc import Callable, Sequence
from typing import Any

from forescale.config.compose import groups
from forescale.config.job import words_of
from forescale.config.schema import ConfigError, Problem, plain
from forescale.ground.errors import UserError
from forescale.plan.config import PlanJob
from forescale.plan.gpu import gpu_of
from forescale.plan.plan import Plan
from forescale.run.certificate import about
from forescale.run.command import job_of
from forescale.run.directory import Run
from forescale.slurm.config import SubmitJob
from forescale.slurm.sizes import job_of_plan

# GPU-hours of a job that are worth a rehearsal, and GPUs of which one takes a minute or two.
_WORTH, _QUICK = 100.0, 4096

# Rehearses the job that words of `forescale rehearse` describe; returns what would end it, and a
# sentence on what was seen. Raises UserError if this machine can't rehearse it.
Rehearse = Callable[[list[str]], tuple[list[Problem], str]]


def rehearsal_of(plan: Plan, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return sentences on the last rehearsal of a plan's job, and the words that rehearse it now:
    none if that one still holds, for a machine that can't be pretended, and for an array, whose
    runs have further keys. words: of the command."""
    if plan.problems or gpu_of(plan.machine.name, 0, 1) is None:
        return [], []
    sentences, holds = about(plan.job, plan.job.gpus)
    if holds or job_of_plan(plan).slurm.runs is not None:
        return sentences, []
    prefixes = ("slurm", "submit", "run.name=")  # the name is its first word
    is_named = any(w.startswith(prefixes[-1]) for w in words)
    keys = [f"plan.gpus={plan.world}"]
    if plan.per_node != min(plan.machine.gpus_per_node or plan.world, plan.world):
        keys.append(f"machine.gpus_per_node={plan.per_node}")
    keys += [w for w in words if not w.lstrip("+~").startswith(prefixes)]
    keys += _machine_words(plan, [*([f"run.name={plan.job.run.name}"] * is_named), *keys])
    return sentences, [*([plan.job.run.name] * is_named), *keys]


def _machine_words(plan: Plan, words: list[str]) -> list[str]:
    """Return words for what the machine of a plan has from the last submission of its run, which
    `words` don't say."""

    def machine_of(*words: str) -> dict[str, Any]:
        return {**plain(job_of(PlanJob, words).machine), "gpus_per_node": None}

    machine, composed = plain(plan.machine) | {"gpus_per_node": None}, machine_of(*words)
    if machine == composed:
        return []
    for choice in groups(PlanJob)["machine"].files:
        if machine_of(f"machine={choice}") == machine:
            return [f"machine={choice}"]
    return words_of({"machine": {k: v for k, v in machine.items() if v != composed[k]}})


def is_worth_it(plan: Plan) -> bool:
    """Return True if a job is to be rehearsed before it waits in the queue."""
    job = job_of_plan(plan)
    if job.submit.rehearse != "auto":
        return job.submit.rehearse == "always"
    limit = job.slurm.time.seconds if job.slurm.time else None
    hours = [h for h in (plan.gpu_hours, limit and limit / 3600 * plan.world) if h is not None]
    begins = not Run(job.run.directory).checkpoint_steps()  # one that has made steps shows as much
    return begins and min(hours, default=0.0) >= _WORTH and plan.world <= _QUICK


def rehearse_first(rehearse: Rehearse, words: list[str], job: SubmitJob) -> None:
    """Rehearse a job. Raises ConfigError with what would end it."""
    print("Rehearsing its first rank; submit.rehearse=off leaves that out.", flush=True)
    try:
        problems, sentence = rehearse(words)
    except (UserError, OSError) as e:
        if job.submit.rehearse == "always":
            raise
        print(f"Note: it can't be rehearsed here: {e}")
        return
    if problems:
        todo = (
            f"mend it (its traceback: {shlex.join(['forescale', 'rehearse', *words, '--json'])}), "
        )
        todo += "or write submit.rehearse=off"
        raise ConfigError(p._replace(todo=todo) for p in problems)
    print(sentence)
