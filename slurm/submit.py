"""Submits runs: freezes them, and gives their code and their script to SLURM as a job or an array.

Invariant: a run with a problem is never submitted. If SLURM refuses the job, no trace of the
submission is left.
"""

import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from forescale.checkpoint.choice import newest_step
from forescale.checkpoint.mirror import mirror_of
from forescale.checkpoint.restore import restore
from forescale.checkpoint.retention import hold
from forescale.config.duration import Duration
from forescale.config.job import overrides_of
from forescale.config.schema import ConfigError
from forescale.config.sizes import Sizes
from forescale.config.target import refuse_targets, remember, targets
from forescale.ground.console import open_console
from forescale.ground.document import tell
from forescale.ground.errors import UserError
from forescale.ground.foreign import read_text
from forescale.ground.storage import write_file
from forescale.monitor.status import Status
from forescale.plan.blocks import print_blocks
from forescale.plan.plan import Plan
from forescale.plan.rows import show, sizes_block
from forescale.run.command import job_of
from forescale.run.directory import Run
from forescale.run.forecast import find
from forescale.run.rows import read_rows
from forescale.run.start import Start, start
from forescale.slurm import queue
from forescale.slurm.config import SubmitJob
from forescale.slurm.limits import limit_problems
from forescale.slurm.login import remembered
from forescale.slurm.login.snapshot import described, own_packages, pack_environment, write_code
from forescale.slurm.rehearsal import Rehearse, is_worth_it, rehearsal_of, rehearse_first
from forescale.slurm.script import Order
from forescale.slurm.sizes import job_of_plan, nodes_of, notes_on_sizes, smallest, usable_nodes
from forescale.slurm.submission import (
    Submission,
    accepted,
    facts_of,
    in_queue,
    submissions,
    waiting_or_running,
)

_UNDER_WAY = 600.0  # seconds that a command may take to submit
_HOST_MEMORY = 3 << 30  # bytes of host memory of a rank on a GPU: libraries, buffers of batches


def submit(overrides: Sequence[str], trust: bool = True, rehearse: Rehearse | None = None) -> None:
    """Plan the training jobs that `key=value` overrides describe, show the plan, and submit them;
    with submit.dry_run, only print the script, and on standard error the sizes of a range. trust:
    allow classes of the user's own; False for overrides that a file names. rehearse: see
    submit.rehearse; None: never. Raises ConfigError with all problems of all runs before anything
    is written, and UserError if SLURM refuses the job."""
    notes: list[str] = []
    jobs = _jobs(overrides, notes)
    for each in jobs:
        refuse_targets(each, trust)
    dry = jobs[0].submit.dry_run
    if not dry and queue.is_here() and any([restore(each.training, print) for each in jobs]):
        notes.clear()
        jobs = _jobs(overrides, notes)  # over the configs of the runs, as for any run
    for each in jobs:
        if _is_complete(each):
            steps = f"{each.training.total_steps:,} steps are trained"
            print(f"{each.run.name} is complete: {steps}. It is not submitted.")
    tell({"complete": [each.run.name for each in jobs if _is_complete(each)], "jobs": []})
    jobs = [each for each in jobs if not _is_complete(each)]
    if not jobs:
        return
    plans = [Plan(job, newest_step) for job in jobs]
    due = [] if dry else _show(plans, overrides, notes, rehearse is not None)
    problems = [p for plan in plans for p in plan.problems]
    if not dry:
        least = nodes_of(plans).least
        problems += limit_problems(replace(jobs[0].slurm, nodes=Sizes(least, least)))
    if problems:
        raise ConfigError(problems)
    profile = next((w.partition("=")[2] for w in overrides if w.startswith("slurm=")), "plain")
    runs = [Run(job.run.directory) for job in jobs]
    folders = [run.path / "jobs" / "NNNN" for run in runs]
    if dry:
        if plans[0].sizes:
            print_blocks(open_console(stderr=True), [sizes_block(plans[0])])
        script = order(plans, runs, folders, profile).script()
        tell({"scripts": [script]})
        print(script, end="")
        return
    queue.must_be_here()
    largest = queue.largest_array()
    first = slice(largest)  # of several arrays
    queue.expect_accepted(order(plans[first], runs[first], folders[first], profile).script())
    if rehearse is not None and due:
        _refuse_twice(runs[0])
        rehearse_first(rehearse, due, jobs[0])
    for note in {described(packages): "" for each in jobs if (packages := own_packages(each))}:
        print(f"Note: {note}")
    arrays, ids = enter(plans, profile, largest)
    for plan in plans:
        remembered.remember(job_of_plan(plan))
        if trust:
            remember(plan.given, plan.given.run.directory)
    _tell(arrays, ids, jobs[0].slurm.time)


def _show(
    plans: Sequence[Plan], overrides: Sequence[str], notes: Sequence[str], rehearses: bool
) -> list[str]:
    """Show the plan of the first job, with notes on the others. Return the words by which
    `forescale rehearse` is due before it is submitted; none if it isn't, or unless `rehearses`."""
    plan = plans[0]
    job = job_of_plan(plan)
    plan.notes[:0] = notes
    plan.notes += notes_on_cpus(job)
    if (nodes := nodes_of(plans)).is_range:
        beyond = limit_problems(replace(job.slurm, nodes=Sizes(nodes.most, nodes.most)))
        plan.notes += [f"{key}: {problem}." for key, problem, _ in beyond if "nodes" in key]
        plan.notes += notes_on_sizes(plans)
    if Run(job.run.directory).config.exists() and remembered.recall(job.run.directory):
        print("Note: keys of slurm and machine that you don't give are as you submitted it last.")
    show(plan)
    sentences, command = rehearsal_of(plan, overrides)
    due = command if rehearses and command and is_worth_it(plan) else []
    if command and not due:
        lead = "Rehearse it" if sentences else "Not rehearsed"
        sentences.append(f"{lead}: {shlex.join(['forescale', 'rehearse', *command])}")
    print(*sentences, sep="\n", end="\n" * bool(sentences))
    sys.stdout.flush()
    return due


def _tell(arrays: Sequence[Order], ids: Sequence[str], time_limit: Duration | None) -> None:
    """Say what was submitted, and how to follow and stop it."""
    names = [name for array in arrays for name in array.names]
    as_what = f"{len(names)} runs as array {' and '.join(ids)}" if names[1:] else f"as job {ids[0]}"
    lead = f"; it saves {arrays[0].lead} s before its time limit of {time_limit}"
    scripts = ", ".join(str(array.submissions[0].script) for array in arrays)
    tell({"jobs": [{"id": i, "runs": a.runs} for a, i in zip(arrays, ids, strict=True)]})
    print(f"\nSubmitted {as_what}{lead if time_limit else ''}. Script: {scripts}")
    print(f"Follow it: forescale status, forescale logs {names[0]}. ", end="")
    print(f"Stop it: forescale stop {names[0]}")


def _is_complete(job: SubmitJob) -> bool:
    """Return True if the run of a job has made all its steps, as many as the job wants of it."""
    run = Run(job.run.directory)
    if not run.config.exists():
        return False
    status = Status(run)
    return status.state == "complete" and status.job.total_steps >= job.training.total_steps


def notes_on_cpus(job: SubmitJob) -> list[str]:
    """Return a sentence if nodes have too few CPUs for the ranks; none where SLURM doesn't say."""
    with suppress(UserError):
        if queue.is_here() and (cpus := queue.cpus_of_nodes(job.slurm.partition)):
            return [note] if (note := job.slurm.note_on_cpus(cpus)) else []
    return []


def _jobs(overrides: Sequence[str], notes: list[str]) -> list[SubmitJob]:
    """Return one job, or one for each line of the file slurm.runs, on top of `overrides`; add to
    `notes` what they have from existing runs."""
    # The runs of an array share their settings, so none has its last ones.
    is_array = any(word.startswith("slurm.runs=") for word in overrides)
    last = None if is_array else remembered.recall
    first = on_nodes(job_of(SubmitJob, overrides, last, notes))
    if first.slurm.runs is None:
        return [first]
    path = Path(first.slurm.runs).expanduser()
    lines = read_text(path).splitlines()
    jobs: dict[str, SubmitJob] = {}
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            words = shlex.split(line, comments=True)
        except ValueError as e:  # a quotation that doesn't end
            raise UserError(where, f"can't be read ({e})", "quote it as for a shell") from None
        if not words:
            continue
        if any(word.lstrip("+~").startswith(("slurm", "submit")) for word in words):
            problem = "sets a key of slurm or submit, which all runs of an array share"
            raise UserError(where, problem, "set it on the command line")
        try:
            job = on_nodes(
                job_of(SubmitJob, [*overrides, *overrides_of(SubmitJob, words)], notes=notes)
            )
        except ConfigError as e:
            raise ConfigError(p._replace(key=f"{where}: {p.key}") for p in e.problems) from None
        if job.run.name in jobs:
            raise UserError(where, f"a second run is named {job.run.name}", "set run.name=NAME")
        jobs[job.run.name] = job
    if not jobs:
        raise UserError(
            str(path), "names no run", "write one line of KEY=VALUE arguments for each run"
        )
    return list(jobs.values())


def order(
    plans: Sequence[Plan],
    runs: Sequence[Run],
    folders: Sequence[Path],
    profile: str,
    waits: Sequence[str] = (),
) -> Order:
    """Return what to submit. All plans have the SLURM settings of the first. waits: dependencies
    beside slurm.after."""
    job = job_of_plan(plans[0])
    saves = (_save_seconds(smallest(p), r) for p, r in zip(plans, runs, strict=True))
    lead = max(job_of_plan(p).lead(seconds) for p, seconds in zip(plans, saves, strict=True))
    return Order(
        names=[r.name for r in runs],
        runs=[r.path.resolve() for r in runs],
        submissions=[Submission(f.resolve()) for f in folders],
        settings=job.slurm,
        lead=lead,
        profile=profile,
        waits=waits,
        nodes=nodes_of(plans),
    )


def enter(
    plans: Sequence[Plan], profile: str, largest: int | None = None
) -> tuple[list[Order], list[str]]:
    """Freeze each run, submit them together, and return the ids of the job, or of the arrays, which
    have at most `largest` tasks each. Raises UserError if a run is already in the queue or has
    another config, or if SLURM refuses one: then none is left in the queue."""
    for plan in plans:
        _refuse_twice(Run(plan.given.run.directory))
    started = [start(job_of_plan(plan).training, newest=newest_step) for plan in plans]
    for begun in started:
        if mirror := mirror_of(begun.run, begun.job, print):
            mirror.check()
    for begun in started:
        waits = bool(job_of_plan(plans[0]).slurm.after)  # perhaps for the run that it branches off
        held = hold(begun.run, begun.job.run.origin, begun.job.run.root, ahead=waits)
        for note in (*begun.notes, *held):
            print(f"Note: {note}")
    runs = [s.run for s in started]
    folders = [run.new_job() for run in runs]
    arrays, jobs = list[Order](), list[str]()
    try:
        for run, folder in zip(runs, folders, strict=True):
            _refuse_second(run, folder)
        for start_of in range(0, len(runs), largest or len(runs)):
            part = slice(start_of, start_of + (largest or len(runs)))
            # The throttle of an array counts its own tasks alone: the next one waits for its end.
            after = [f"afterany:{jobs[-1]}"] if jobs and job_of_plan(plans[0]).slurm.at_once else []
            array = order(plans[part], runs[part], folders[part], profile, after)
            for plan, begun, submission in zip(
                plans[part], started[part], array.submissions, strict=True
            ):
                _describe(plan, begun, submission)
                write_file(submission.script, array.script().encode())
            if len(array.names) > 1:
                array.submissions[0].link_logs([task.log for task in array.submissions])
            jobs.append(queue.submit(array.submissions[0].script))
            arrays.append(array)
    except BaseException:
        for job in jobs:
            with suppress(UserError):  # without its files it ends by itself
                queue.cancel(job)
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    for array, job in zip(arrays, jobs, strict=True):
        count = len(array.names)
        ids = [f"{job}_{i}" for i in range(count)] if count > 1 else [job]
        by_id = dict(zip(ids, array.submissions, strict=True))
        accepted(ids[0], array.submissions[0].script, by_id)
    return arrays, jobs


def _refuse_twice(run: Run) -> None:
    if submission := waiting_or_running(run):
        job = submission[1]
        problem = f"is already in the queue, as job {job.id} ({job.state.lower()})"
        raise UserError(
            str(run.path), problem, f"see forescale status, or run: forescale stop {run.name}"
        )


def _refuse_second(run: Run, folder: Path) -> None:
    """Raise UserError if another command submits this run now. `folder` was made by this command;
    of two commands the one with the older folder goes on."""
    older = [s for s in submissions(run) if s.name < folder.name][-1:]
    if older and in_queue(older):
        _refuse_twice(run)
    if older and older[0].job is None:
        age = abs(time.time() - older[0].path.stat().st_mtime)  # the clock may be put back
        if age < _UNDER_WAY:
            problem = f"another command began to submit it {age:.0f} s ago"
            todo = f"wait for it; if it was killed, remove {older[0].path}"
            raise UserError(str(run.path), problem, todo)


def _describe(plan: Plan, begun: Start, submission: Submission) -> None:
    """Write the code and all facts that the job needs beside the run's config."""
    job = job_of_plan(plan)
    packages = own_packages(begun.job)
    write_code(submission.code, packages)
    data = [source["path"] for source in begun.sources.describe().values()]
    if job.slurm.has_gpus:
        memory = _HOST_MEMORY * job.per_node + smallest(plan).copy_bytes
    else:  # on CPUs all planned memory is host memory
        memory = int(smallest(plan).chosen.memory.total) * job.per_node
        memory += smallest(plan).copy_bytes
    facts = facts_of(job.slurm, data, packages)
    facts |= {"memory": memory, "trust": bool(targets(begun.job)), "sizes": usable_nodes(plan)}
    facts["restart"] = job.plan.restart.seconds
    speeds = {n: size.chosen.step.seconds for n, size in plan.sizes.items()}
    facts["step_seconds"] = speeds if all(speeds.values()) else {}
    if job.slurm.packs:
        if job.slurm.pack is None:
            why = "beyond 16 nodes each imports from a copy of the Python environment on its disk"
            print(f"Note: {why}; slurm.pack=false turns that off.", flush=True)
        facts["environment"] = str(pack_environment(begun.run.path.resolve().parent / ".python"))
    submission.write(**facts)


def _save_seconds(plan: Plan, run: Run) -> float:
    """Return the longest measured time of a step and a save of the run, else the planned one."""
    events = run.read_events(kind="checkpoint_saved")
    saves = [row["seconds"] for row in events if "seconds" in row]
    if not saves:
        return plan.lead_seconds
    steps = [sum(row["seconds"].values()) for row in read_rows(run.metrics, kind="train")]
    return max(saves) + max(steps, default=0.0)


def on_nodes(job: SubmitJob) -> SubmitJob:
    """Return the job as the nodes need it: with absolute paths, and for nodes without GPUs with the
    memory that each rank may use."""

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
