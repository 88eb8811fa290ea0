"""Evaluations of a run's checkpoints as jobs of SLURM: one array, whose tasks are `forescale eval`
of one checkpoint each (evaluation_task.py).

    runs/<name>/evaluations/0001/
      submission.json, job.sbatch, code.tar, job.json    as in jobs/, see submission.py
      step-00010000.log                                  what a task prints: the scores
      logs/0                                             of each task, a link to its log

Invariant: a task reads the run and writes its log alone, so it may fail, or start again, at any
time. A checkpoint that is waited for is pinned first, so that the run doesn't delete it.
"""

# ruff: noqa: RUF009 (key and section make fields, as dataclasses.field does)

import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from forescale.checkpoint.retention import pin
from forescale.config.compose import compose, overrides_of
from forescale.config.eval import ScoreJob
from forescale.config.frozen import thaw
from forescale.config.job import Problems
from forescale.config.schema import ConfigError, Problem, key, plain, section
from forescale.config.train import TrainJob
from forescale.config.tree import build
from forescale.errors import UserError
from forescale.run.directory import Run
from forescale.run.identity import expect_data, version_of_checkout
from forescale.run.start import versions
from forescale.slurm import queue
from forescale.slurm.config import SlurmConfig, SubmitConfig
from forescale.slurm.login import remembered
from forescale.slurm.login.snapshot import described, own_packages, write_code
from forescale.slurm.script import escaped, in_lines, rendered, resources
from forescale.slurm.submission import Submission, expect_own, waiting_or_running
from forescale.storage import read_json, write_file

_GPUS = re.compile(r"(\bgpu(?::[^,:]*[^0-9,:][^,:]*)?):[0-9]+")  # of --gres, without their number
# Keys of slurm that say how many ranks there are, or how a job of many ranks starts and goes on.
_OF_RANKS = (
    *("nodes", "spares", "tasks_per_node", "runs"),
    *("pack", "lead", "requeue", "max_requeues"),
)


@dataclass
class EvaluationSlurm(SlurmConfig):
    """Section `slurm` of evaluations: one process each."""

    at_once: int | None = key(None, "largest number of evaluations at a time", ge=1)

    def problems(self) -> Problems:
        return [problem for problem in super().problems() if problem[0] != "at_once"]


@dataclass
class EvaluationsJob(ScoreJob):
    """Evaluate checkpoints of a run, each in a SLURM job of its own, as soon as it exists."""

    VERB: ClassVar[str] = "submit eval"
    FLAGS: ClassVar = {"--dry-run": "submit.dry_run"}

    target: str | None = key(None, "a run (its name or its directory)")
    steps: list[int] = key(
        [],
        "the checkpoints of these steps, also of those to come; empty: all that exist now",
        common=True,
    )
    slurm: EvaluationSlurm = section(EvaluationSlurm, "what each evaluation gets of the cluster")
    submit: SubmitConfig = section(SubmitConfig, "how to submit")


@dataclass(frozen=True)
class Evaluations:
    """One array. training: the job that has yet to make these checkpoints; None if all exist."""

    run: Run
    steps: Sequence[int]
    submission: Submission
    settings: SlurmConfig
    words: Sequence[str]
    profile: str
    training: str | None = None

    def script(self) -> str:
        """Return the script as text. Raises UserError for a value that doesn't fit in one line."""
        return rendered(
            "evaluations.sbatch.j2",
            self.settings,
            title=f"Evaluations of run {self.run.name}",
            profile=self.profile,
            script=self.submission.script,
            options=self._options(),
            steps=self.steps,
            job=self.submission.path,
            words=shlex.join(self.words),
        )

    def log(self, step: int) -> Path:
        return self.submission.path / f"{self.run.checkpoint_path(step).name}.log"

    def _options(self) -> list[tuple[str, str]]:
        s = self.settings
        options = [
            (f"--job-name={shlex.quote(f'{self.run.name}-eval')}", ""),
            (f"--output={escaped(self.submission.links / '%a')}", "a link to step-N.log"),
            ("--open-mode=truncate", "a task that starts again writes a new log"),
            ("--nodes=1", ""),
            ("--ntasks=1", ""),
            (f"--array=0-{len(self.steps) - 1}{f'%{s.at_once}' if s.at_once else ''}", "the steps"),
            *((option, "") for option, _ in resources(s)),
            ("--requeue", "also how a task waits for its checkpoint"),
        ]
        waits = [f"after:{self.training}"] if self.training else []  # until it has begun
        if s.after:
            waits.append(f"afterok:{':'.join(s.after)}")
            options.append(("--kill-on-invalid-dep=yes", "a job that can never start doesn't stay"))
        if waits:
            options.append((f"--dependency={','.join(waits)}", ""))
        return in_lines([*options, *((option, "") for option in s.options)])


def submit(arguments: Sequence[str]) -> None:
    """Submit the evaluations that a command line describes; with submit.dry_run, only print the
    scripts. Raises ConfigError with all wrong steps, and UserError if SLURM refuses."""
    words = overrides_of(EvaluationsJob, arguments)
    job = compose(EvaluationsJob, words)
    run = Run.existing(Path(job.target or "").expanduser(), Path(job.run.root).expanduser())
    trained = thaw(TrainJob, run.config, job.trust)
    if not (job.data.path or job.abilities or job.tasks):
        expect_data(run)
    here, to_come = _divided(run, trained, job.steps)
    settings = _settings(job, words, run)
    if not job.submit.dry_run:
        queue.must_be_here()
    groups: list[tuple[list[int], str | None]] = [(here, None)] if here else []
    groups += [(to_come, _training(run, to_come))] if to_come else []
    profile = next((w.partition("=")[2] for w in words if w.startswith("slurm=")), "plain")

    def evaluations(steps: Sequence[int], waits: str | None, folder: Path) -> Evaluations:
        at, target = Submission(folder.resolve()), str(run.path.resolve())
        return Evaluations(run, steps, at, settings, [target, *_of_eval(words)], profile, waits)

    if job.submit.dry_run:
        for group in groups:
            print(evaluations(*group, run.path / "evaluations" / "NNNN").script(), end="")
        return
    if packages := own_packages(trained):
        print(f"Note: {described(packages)}")
    _enter([evaluations(*group, run.new_evaluations()) for group in groups], trained, job)


def _divided(run: Run, trained: TrainJob, steps: Sequence[int]) -> tuple[list[int], list[int]]:
    """Return the wanted steps whose checkpoints exist, and those still to come. Raises ConfigError
    for the others."""
    known, total = run.checkpoint_steps(), trained.total_steps
    if not steps and not known:
        todo = "name steps that it is going to save, such as steps=[1000,2000]"
        raise UserError(str(run.path), "this run has no checkpoint yet", todo)
    here = sorted({*steps} & {*known}) if steps else known
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
    return here, to_come


def _training(run: Run, to_come: Sequence[int]) -> str:
    """Return the id of the run's job in the queue. Raises UserError if there is none."""
    if (submission := waiting_or_running(run)) is None:
        problem = (
            f"no job of this run is in the queue, and it has no checkpoint of step {to_come[0]}"
        )
        raise UserError(str(run.path), problem, f"give first: forescale submit train {run.name}")
    expect_own(*submission)
    return submission[1].id


def _settings(job: EvaluationsJob, words: Iterable[str], run: Run) -> SlurmConfig:
    """Return what each evaluation gets: what the command gives; besides, of the profile that it
    names, or else of the run's last submission, one GPU and no more than a share of a node.

    Raises ConfigError for keys that one process has no use for.
    """
    typed = {w.split("=")[0].split(".")[1] for w in words if re.match(r"slurm\.\w+", w)}
    problem, todo = (
        "an evaluation is one process, which starts anew if it ends early",
        "leave it out",
    )
    if wrong := [name for name in _OF_RANKS if name in typed]:
        raise ConfigError(Problem(f"slurm.{name}", problem, todo) for name in wrong)
    settings: SlurmConfig = job.slurm
    last = remembered.recall(run.path).get("slurm")
    if last and not any(w.startswith("slurm=") for w in words):
        settings, _, _ = build(EvaluationSlurm, last)
        settings = replace(settings, **{name: getattr(job.slurm, name) for name in typed})
    one: dict[str, Any] = {"nodes": 1, "spares": 0, "tasks_per_node": 1, "exclusive": False}
    one |= {"pack": False, "gpus_per_node": min(1, settings.gpus_per_node)}
    one["gres"] = _GPUS.sub(r"\1:1", settings.gres) if settings.gres else None
    settings = replace(
        settings, **{name: value for name, value in one.items() if name not in typed}
    )
    if problems := [Problem(f"slurm.{name}", *rest) for name, *rest in settings.problems()]:
        raise ConfigError(problems)
    return settings


def _of_eval(words: Iterable[str]) -> list[str]:
    """Return those of a command's overrides that `forescale eval` takes, but not the run."""
    names = {f.name for f in fields(ScoreJob)} - {"target", "run"}
    return [word for word in words if re.split(r"[.=]", word)[0] in names]


def _enter(groups: Sequence[Evaluations], trained: TrainJob, job: EvaluationsJob) -> None:
    """Pin the checkpoints, submit the arrays and say what they do. If SLURM refuses one, nothing of
    any of them is left."""
    run, pinned, ids = groups[0].run, list[int](), list[str]()
    try:
        for group in groups:
            pinned += [step for step in group.steps if pin(run, step, ahead=True)]
            _write(group, trained, job)
            ids.append(queue.submit(group.submission.script))
    except BaseException:
        for id in ids:
            with suppress(UserError):  # without its files it ends by itself
                queue.cancel(id)
        for group in groups:
            shutil.rmtree(group.submission.path, ignore_errors=True)
        for step in pinned:
            pin(run, step, off=True, ahead=True)
        raise
    for group, id in zip(groups, ids, strict=True):
        _accepted(group, id)
    _report(groups, ids)


def _write(group: Evaluations, trained: TrainJob, job: EvaluationsJob) -> None:
    """Write the files of an array, and the links by which sbatch names its logs after steps."""
    submission, packages = group.submission, own_packages(trained)
    write_code(submission.code, packages)
    sources = read_json(group.run.identity)["dataset"]["sources"].values()
    data = [job.data.path] if job.data.path else [source["path"] for source in sources]
    submission.write(
        slurm=plain(group.settings),
        steps=list(group.steps),
        submitted=time.time(),
        command=sys.argv,
        directory=str(Path.cwd()),
        data=[path if "://" in path else str(Path(path).expanduser().resolve()) for path in data],
        versions={**versions(), **version_of_checkout()},
        packages=[str(path) for path in packages],
    )
    submission.links.mkdir()
    for i, step in enumerate(group.steps):
        log = os.path.relpath(group.log(step), submission.links)
        (submission.links / str(i)).symlink_to(log)
    write_file(submission.script, group.script().encode())


def _accepted(group: Evaluations, id: str) -> None:
    at, cluster = "", None
    with suppress(UserError):  # a controller that is slow to answer
        at = queue.show(f"{id}_0").get("SubmitTime", "")
        cluster = queue.cluster()
    group.submission.submitted(id, group.submission.script, cluster, at)


def _report(groups: Sequence[Evaluations], ids: Sequence[str]) -> None:
    run, settings = groups[0].run, groups[0].settings
    for group, id in zip(groups, ids, strict=True):
        several = f"steps {', '.join(f'{s:,}' for s in group.steps)}"
        checkpoints = several if len(group.steps) > 1 else f"step {group.steps[0]:,}"
        waits = f", each when job {group.training} has saved it" if group.training else ""
        print(f"Submitted array {id}: {checkpoints} of {run.name}{waits}.")
        print(f"  Script: {group.submission.script}")
        print(f"  Scores: {group.log(group.steps[0])}{', ...' if len(group.steps) > 1 else ''}")
    device = {0: "on CPUs", 1: "with one GPU"}.get(settings.gpus, f"with {settings.gpus} GPUs")
    print(f"Each is one process {device}. Its checkpoint is pinned: see forescale pin --help.")
    if settings.mem == "0":
        print("Note: each takes all memory of a node (slurm.mem=0), unless you give slurm.mem.")
    print(f"Follow them: squeue --jobs={','.join(ids)}. Stop them: scancel {' '.join(ids)}")
