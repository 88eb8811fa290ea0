"""Evaluations of a run's checkpoints as an array of commands, `forescale eval` of one checkpoint
each: runs/<name>/evaluations/0001/, with the scores in step-00010000.log (script.py).

Invariant: a checkpoint is pinned before its evaluation waits for it, so that the run doesn't delete
it.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from forescale.checkpoint.retention import pin
from forescale.config.compose import compose
from forescale.config.eval import ScoreJob
from forescale.config.frozen import thaw
from forescale.config.job import Problems, overrides_of
from forescale.config.schema import ConfigError, Problem, key, section
from forescale.config.sizes import Sizes
from forescale.config.train import TrainJob
from forescale.config.tree import build
from forescale.ground.document import tell
from forescale.ground.errors import UserError
from forescale.run.directory import Run
from forescale.run.identity import expect_data
from forescale.slurm import queue
from forescale.slurm.config import SUBMITTED, SlurmConfig, SubmitConfig
from forescale.slurm.limits import limit_problems
from forescale.slurm.login import remembered
from forescale.slurm.login.snapshot import described, own_packages
from forescale.slurm.script import Command, CommandArray, submit_arrays
from forescale.slurm.submission import Submission, expect_own, waiting_or_running

_GPUS = re.compile(r"(\bgpu(?::[^,:]*[^0-9,:][^,:]*)?):[0-9]+")  # of --gres, without their number
# Keys of slurm that say how many ranks there are, or how a job of many ranks starts and goes on.
_OF_RANKS = (
    *("nodes", "grow", "spares", "tasks_per_node", "runs"),
    *("pack", "lead", "requeue", "max_requeues"),
)


@dataclass
class EvaluationSlurm(SlurmConfig):
    """Section `slurm` of evaluations: one process each."""

    at_once: int | None = key(None, ge=1)  # largest number of evaluations at a time

    def problems(self) -> Problems:
        return [problem for problem in super().problems() if problem[0] != "at_once"]


@dataclass
class EvaluationsJob(ScoreJob):
    """Evaluate checkpoints of a run, each in a SLURM job of its own, as soon as it exists."""

    VERB: ClassVar[str] = "submit eval"
    FLAGS: ClassVar = {"--dry-run": "submit.dry_run"}
    PRINTS: ClassVar = SUBMITTED

    target: str | None = None  # a run (its name or its directory)
    # the checkpoints of these steps, also of those to come; empty: all that exist now
    steps: list[int] = key([], common=True)
    slurm: EvaluationSlurm = section(EvaluationSlurm)  # what each evaluation gets of the cluster
    submit: SubmitConfig = section(SubmitConfig)  # how to submit


def submit(arguments: Sequence[str]) -> None:
    """Submit the evaluations that a command line describes; with submit.dry_run, only print the
    scripts. Raises ConfigError with all wrong steps, and UserError if SLURM refuses."""
    words = overrides_of(EvaluationsJob, arguments)
    of_eval = {f.name for f in fields(ScoreJob)} - {"target", "run"}
    job = compose(EvaluationsJob, words)
    run = Run.existing(job.target or "", job.run.root)
    trained = thaw(TrainJob, run.config, job.trust)
    if not (job.data.path or job.abilities or job.tasks):
        expect_data(run)
    saved, to_come = _divided(run, trained, job.steps)
    settings = _settings(job, words, run)
    if not job.submit.dry_run:
        queue.must_be_here()
    groups: list[tuple[list[int], str | None]] = [(saved, None)] if saved else []
    if to_come:
        if (training := waiting_or_running(run)) is None:
            problem = "no job of this run is in the queue, and it has no checkpoint of step "
            todo = f"give first: forescale submit train {run.name}"
            raise UserError(str(run.path), f"{problem}{to_come[0]}", todo)
        expect_own(*training)
        groups.append((to_come, training[1].id))
    profile = next((w.partition("=")[2] for w in words if w.startswith("slurm=")), "plain")
    if not job.submit.dry_run and (problems := limit_problems(settings)):
        raise ConfigError(problems)
    size = (not job.submit.dry_run and queue.largest_array()) or len(job.steps) + len(saved)
    groups = [(g[i : i + size], after) for g, after in groups for i in range(0, len(g), size)]

    def array(steps: Sequence[int], training: str | None, folder: Path) -> CommandArray:
        command = ["eval", str(run.path.resolve())]
        command += [word for word in words if re.split(r"[.=]", word)[0] in of_eval]
        names = {step: run.checkpoint_path(step).name for step in steps}
        return CommandArray(
            title=f"Evaluations of run {run.name}",
            job_name=f"{run.name}-eval",
            commands=[Command(names[n], [*command, f"step={n}"], n) for n in steps],
            submission=Submission(folder.resolve()),
            settings=settings,
            profile=profile,
            begins_after=training,
        )

    scripts = [array(*group, run.path / "evaluations" / "NNNN").script() for group in groups]
    if job.submit.dry_run:
        tell({"scripts": scripts})
        print("".join(scripts), end="")
        return
    for script in scripts:
        queue.expect_accepted(script)
    if packages := own_packages(trained):
        print(f"Note: {described(packages)}")
    sources = run.read_identity()["dataset"]["sources"].values()
    data = [job.data.path] if job.data.path else [source["path"] for source in sources]
    pinned = list[int]()
    try:
        for step in (*saved, *to_come):
            pinned += [step] * pin(run, step, ahead=True)
        arrays = [array(*group, run.new_evaluations()) for group in groups]
        ids = submit_arrays(arrays, data, packages)
    except BaseException:
        for step in pinned:
            pin(run, step, off=True, ahead=True)
        raise
    _report(run, arrays, ids)


def _divided(run: Run, trained: TrainJob, steps: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the steps whose checkpoints exist, and those still to come; without `steps`, all that
    exist. Raises ConfigError for the others."""
    known, total = run.checkpoint_steps(), trained.total_steps
    if not steps and not known:
        todo = "name steps that it is going to save, such as steps=[1000,2000]"
        raise UserError(str(run.path), "this run has no checkpoint yet", todo)
    saved = sorted({*steps} & {*known}) if steps else known
    to_come = sorted({*steps} - {*known})
    newest, every = max(known, default=0), trained.cadence(trained.checkpoint.every)
    sure = {total, *trained.checkpoint.at}
    problems = []
    for step in to_come:
        if step > total:
            problem, todo = f"{step:,} is after the last step of the run, {total:,}", "leave it out"
        elif step <= newest:
            problem = f"the run is past step {step:,}, and has no checkpoint of it"
            todo = f"choose of these: {', '.join(map(str, known)) or 'those to come'}"
        elif step not in sure and (every is None or step not in every):
            problem = f"no checkpoint is planned for step {step:,}"
            todo = f"choose another, or give checkpoint.at=[{step}] to forescale submit train"
        else:
            continue
        problems.append(Problem("steps", problem, todo))
    if problems:
        raise ConfigError(problems)
    return saved, to_come


def _settings(job: EvaluationsJob, words: Iterable[str], run: Run) -> SlurmConfig:
    """Return what each evaluation gets: what the command gives; besides, of the profile that it
    names, or else of the run's last submission, one GPU and no more than a share of a node. Raises
    ConfigError for keys that one process has no use for."""
    typed = {w.split("=")[0].split(".")[1] for w in words if re.match(r"slurm\.\w+", w)}
    problem = "an evaluation is one process, which starts anew if it ends early"
    if wrong := [name for name in _OF_RANKS if name in typed]:
        raise ConfigError(Problem(f"slurm.{name}", problem, "leave it out") for name in wrong)
    settings: SlurmConfig = job.slurm
    last = remembered.recall(run.path).get("slurm")
    if last and not any(w.startswith("slurm=") for w in words):
        settings, _, _ = build(EvaluationSlurm, last)
        settings = replace(settings, **{name: getattr(job.slurm, name) for name in typed})
    one: dict[str, Any] = {
        "nodes": Sizes(1, 1),
        "grow": None,
        "spares": 0,
        "tasks_per_node": 1,
        "exclusive": False,
    }
    one |= {"exclusive": False, "pack": False, "gpus_per_node": min(1, settings.gpus_per_node)}
    one["gres"] = _GPUS.sub(r"\1:1", settings.gres) if settings.gres else None
    settings = replace(settings, **{name: v for name, v in one.items() if name not in typed})
    if problems := [Problem(f"slurm.{name}", *rest) for name, *rest in settings.problems()]:
        raise ConfigError(problems)
    return settings


def _report(run: Run, arrays: Sequence[CommandArray], ids: Sequence[str]) -> None:
    settings = arrays[0].settings
    folders = [array.submission.path for array in arrays]
    tell({"jobs": [{"id": i, "folder": f} for f, i in zip(folders, ids, strict=True)]})
    for array, id in zip(arrays, ids, strict=True):
        commands = array.commands
        steps = "step" if len(commands) == 1 else "steps"
        steps += f" {', '.join(f'{command.step:,}' for command in commands)}"
        waits = f", each when job {array.begins_after} has saved it" if array.begins_after else ""
        print(f"Submitted array {id}: {steps} of {run.name}{waits}.")
        print(f"  Script: {array.submission.script}")
        print(f"  Scores: {array.log(commands[0])}{', ...' if len(commands) > 1 else ''}")
    device = {0: "on CPUs", 1: "with one GPU"}.get(settings.gpus, f"with {settings.gpus} GPUs")
    print(f"Each is one process {device}. Its checkpoint is pinned: see forescale pin --help.")
    if settings.mem == "0":
        print("Note: each takes all memory of a node (slurm.mem=0), unless you give slurm.mem.")
    print(f"Follow them: squeue --jobs={','.join(ids)}. Stop them: scancel {' '.join(ids)}")
