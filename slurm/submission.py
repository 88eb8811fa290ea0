"""The files that a run keeps of each submission.

    runs/<name>/jobs/0001/
      submission.json    the settings of SLURM, data, memory, versions and command
      job.sbatch         the script for sbatch
      code.tar           forescale and the user's own package at that time
      job.json           the id of the job, and what tells it from others that get this id later
      stop               exists if a stop was requested: the job is not requeued
      slurm.log          the output of the batch script
      standby.log        that of standby.py, in a job with --no-kill
      logs/0             of an array, in the folder of its first run: a link for each task to the
                         slurm.log of its own run

Invariant: `submit` alone writes them, except the logs and stop. So a job that is requeued for
months reads the settings of the day of its submission.
"""

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from forescale.config.schema import plain
from forescale.config.tree import build
from forescale.ground.errors import UserError
from forescale.ground.storage import read_typed, write_json
from forescale.run.directory import Run
from forescale.slurm import queue
from forescale.slurm.config import SlurmConfig


@dataclass
class Submission:
    path: Path

    def __post_init__(self) -> None:
        self.name, self.run = self.path.name, Run(self.path.parents[1])
        self.script, self.code = self.path / "job.sbatch", self.path / "code.tar"
        self.log, self.links = self.path / "slurm.log", self.path / "logs"

    @cached_property
    def facts(self) -> dict[str, Any]:
        return read_typed(dict[str, Any], self.path / "submission.json")

    @cached_property
    def settings(self) -> SlurmConfig:
        return build(SlurmConfig, self.facts["slurm"])[0]

    @property
    def sizes(self) -> list[int]:
        """Numbers of nodes that the run can use, the largest first."""
        return self.facts.get("sizes") or [self.settings.nodes.most]

    def write(self, **facts: Any) -> None:
        """Write the facts that the job needs; see `facts_of`."""
        write_json(self.path / "submission.json", facts)

    def link_logs(self, logs: Sequence[Path]) -> None:
        """Make links by which sbatch gives the log of each task of an array its place."""
        self.links.mkdir()
        for i, log in enumerate(logs):
            (self.links / str(i)).symlink_to(os.path.relpath(log, self.links))

    @property
    def job(self) -> str | None:
        """The id of the job; None if sbatch did not accept it."""
        job = self.accepted.get("id")
        return None if job is None else str(job)

    @property
    def accepted(self) -> dict[str, Any]:
        """What `submitted` wrote; empty if sbatch did not accept the job."""
        try:
            return read_typed(dict[str, Any], self.path / "job.json")
        except UserError:
            return {}

    def submitted(self, job: str, script: Path, cluster: str | None, at: float) -> None:
        """Write the id of the job, with the script that sbatch got, the name of the cluster, and
        when SLURM took the job, in seconds since the epoch, 0 if it isn't known."""
        facts = {"id": job, "script": str(script), "cluster": cluster, "accepted": at}
        write_json(self.path / "job.json", {**facts, "submitted": time.time()})

    def is_of(self, job: queue.Job) -> bool:
        """Return True if a job in the queue is that of this submission: ids may begin anew, or be
        another cluster's. A job keeps its script, and it is never older than when it was taken: its
        time is set anew when it is requeued. (Text is the local time of an older version.)"""
        accepted = self.accepted
        script = accepted.get("script", str(self.script))
        at = accepted.get("accepted")
        is_older = isinstance(at, int | float) and job.submitted < at
        return job.script == script and not is_older

    @property
    def is_stopped(self) -> bool:
        return (self.path / "stop").exists()

    def stop(self) -> None:
        (self.path / "stop").touch()


def facts_of(
    settings: SlurmConfig, data: Iterable[str], packages: Iterable[Path]
) -> dict[str, Any]:
    """Return what a job needs to know. data: paths that it reads; packages: the user's code."""
    # With numpy, which `forescale status` does without.
    from forescale.run.identity import version_of_checkout
    from forescale.run.start import versions

    return {
        "slurm": plain(settings),
        "submitted": time.time(),
        "command": sys.argv,
        "directory": str(Path.cwd()),
        "data": list(data),
        "versions": {**versions(), **version_of_checkout()},
        "packages": [str(path) for path in packages],
    }


def accepted(job: str, script: Path, submissions: Mapping[str, Submission]) -> None:
    """Write the job of each submission, by its id. job: one that SLURM knows the time of."""
    at, cluster = 0.0, None
    with suppress(UserError):  # a controller that is slow to answer
        at = queue.epoch(queue.show(job).get("SubmitTime", ""))
        cluster = queue.cluster()
    for id, submission in submissions.items():
        submission.submitted(id, script, cluster, at)


def submissions(run: Run) -> list[Submission]:
    """Return the submissions of a run, oldest first."""
    return [Submission(path) for path in run.jobs()]


def waiting_or_running(run: Run) -> tuple[Submission, queue.Job] | None:
    """Return the submission of a run whose job is in the queue, and this job; else None."""
    return next(iter(in_queue(newest(run))), None)


def newest(run: Run) -> list[Submission]:
    """Return the last submission that sbatch accepted, or none. Only its job can be in the queue: a
    run is not submitted while a job of it is there."""
    return [s for s in reversed(submissions(run)) if s.job][:1]


def in_queue(
    submissions: Iterable[Submission],
    ask: Callable[[Iterable[str]], list[queue.Job]] | None = None,
) -> list[tuple[Submission, queue.Job]]:
    """Return the submissions whose jobs are in the queue, with one query for all of them. A job
    that only has the id of one is left out."""
    by_id = {s.job: s for s in submissions if s.job}
    if not by_id or not queue.is_here():
        return []
    ids = sorted({str(i).partition("_")[0] for i in by_id})
    queued = (ask or queue.jobs)(ids)
    # Of an array that is one submission, the first task that is there stands for all.
    jobs = {j.id.partition("_")[0]: j for j in reversed(queued)} | {j.id: j for j in queued}
    return [(s, jobs[i]) for i, s in by_id.items() if i in jobs and s.is_of(jobs[i])]


def expect_own(submission: Submission, job: queue.Job) -> None:
    """Raise UserError unless the job is this user's, on the cluster that took it, and its script
    that of this submission: the file with its id may be anybody's, and name any job, and ids begin
    anew. (That it is not older than the submission is known from the queue.)"""
    owner, script = queue.owner_and_script(job.id)
    text = script.read_text(errors="replace") if script and script.is_file() else ""
    jobs = [line.strip() for line in text.splitlines()]
    its = owner == os.getuid() and shlex.quote(str(submission.path.resolve())) in jobs
    if not its or submission.accepted.get("cluster") not in (None, queue.cluster()):
        problem = f"names job {job.id}, which SLURM doesn't know as a job of yours for this run"
        todo = f"if it is yours after all: scancel {job.id}"
        raise UserError(str(submission.path / "job.json"), problem, todo)
