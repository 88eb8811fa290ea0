"""Into the queue: frozen runs, their code and their script become a job, or an array of them.

Invariant: nothing reaches the queue that could not begin to train; and where SLURM takes no job,
no trace of a submission is left behind.
"""

import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from forescale.config.schema import TargetConfig, plain
from forescale.errors import UserError
from forescale.plan.plan import Plan
from forescale.run.directory import Run, read_rows
from forescale.run.forecast import find
from forescale.run.start import Start, start, versions
from forescale.slurm import queue
from forescale.slurm.config import SubmitJob
from forescale.slurm.script import Order, render
from forescale.slurm.snapshot import own_packages, pack_environment, version_of_checkout, write_code
from forescale.slurm.submission import Submission, waiting_or_running
from forescale.storage import write_file

_HOST_MEMORY = 3 << 30  # bytes that a rank on a GPU takes of its host: libraries, pinned buffers


def order(
    plans: Sequence[Plan], runs: Sequence[Run], folders: Sequence[Path], profile: str
) -> Order:
    """All plans have the same SLURM settings: those of the first."""
    job = _given(plans[0])
    lead = max(_given(p).lead(_save_seconds(p, r)) for p, r in zip(plans, runs, strict=True))
    return Order(
        names=[r.name for r in runs],
        runs=[r.path.resolve() for r in runs],
        submissions=[Submission(f.resolve()) for f in folders],
        settings=job.slurm,
        lead=lead,
        profile=profile,
    )


def enter(plans: Sequence[Plan], profile: str) -> tuple[Order, str]:
    """Freeze each run, and submit them together; the id of the job. Raises UserError where a run
    is in the queue already, or belongs to another config, or SLURM refuses."""
    queue.must_be_here()
    for plan in plans:
        _refuse_twice(Run(plan.given.run.directory))
    started = [start(_given(plan).training) for plan in plans]
    runs = [s.run for s in started]
    folders = [run.new_job() for run in runs]
    try:
        made = order(plans, runs, folders, profile)
        for plan, begun, submission in zip(plans, started, made.submissions, strict=True):
            _describe(plan, begun, submission, made)
            write_file(submission.script, render(made).encode())
        job = queue.submit(made.submissions[0].script)
    except BaseException:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    for i, submission in enumerate(made.submissions):
        submission.submitted(f"{job}_{i}" if len(folders) > 1 else job)
    return made, job


def _given(plan: Plan) -> SubmitJob:
    assert isinstance(plan.given, SubmitJob)
    return plan.given


def _refuse_twice(run: Run) -> None:
    if found := waiting_or_running(run):
        job = found[1]
        what = f"is in the queue already, as job {job.id} ({job.state.lower()})"
        raise UserError(str(run.path), what, f"see forescale status, or: forescale stop {run.name}")


def _describe(plan: Plan, begun: Start, submission: Submission, made: Order) -> None:
    """Everything that the job will need beside the run's config."""
    job = _given(plan)
    more = own_packages(begun.job)
    write_code(submission.code, more)
    facts: dict[str, Any] = {
        "slurm": plain(job.slurm),
        "log": str(made.log),
        "submitted": time.time(),
        "command": sys.argv,
        "directory": str(Path.cwd()),
        "data": [source["path"] for source in begun.sources.describe().values()],
        "memory": _host_memory(plan, job),
        "trust": isinstance(begun.job.model, TargetConfig),
        "versions": {**versions(), **version_of_checkout()},
        "packages": [str(path) for path in more],
    }
    if job.slurm.pack:
        facts["environment"] = str(pack_environment(begun.run.path.resolve().parent / ".python"))
    submission.write(**facts)


def _host_memory(plan: Plan, job: SubmitJob) -> int:
    """Bytes that the ranks of a node need of its own memory."""
    if job.slurm.has_gpus:
        return _HOST_MEMORY * job.per_node
    return int(plan.chosen.memory.total) * job.per_node  # ranks on CPUs: all that is planned


def _save_seconds(plan: Plan, run: Run) -> float:
    """Of a step and a save: the longest that the run has measured, else as planned."""
    rows = [row for a in run.attempts() for row in read_rows(a.events.path)]
    saves = [row["seconds"] for row in rows if row["kind"] == "checkpoint_saved"]
    if not saves:
        return plan.lead_seconds
    steps = [
        sum(row["seconds"].values()) for row in read_rows(run.metrics) if row["kind"] == "train"
    ]
    return max(saves) + max(steps, default=0.0)


def on_nodes(job: SubmitJob) -> SubmitJob:
    """The job as its nodes see it: with paths that hold wherever they look from, and with the
    memory that it may use of a node without GPUs."""

    def full(path: str) -> str:
        return path if "://" in path else str(Path(path).expanduser().resolve())

    data = job.data
    if data.path:
        data = replace(data, path=full(data.path))
    if data.sources:
        data = replace(data, sources={name: full(path) for name, path in data.sources.items()})
    if job.forecast:
        job = replace(job, forecast=str(find(job.forecast).path.resolve()))
    machine = job.machine
    if machine.memory_bytes is None and job.slurm.memory_bytes:
        machine = replace(machine, memory_bytes=job.slurm.memory_bytes / job.per_node)
    return replace(job, data=data, machine=machine)
