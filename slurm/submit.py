"""Submits runs: freezes them, and gives their code and their script to SLURM as a job or an array.

Invariant: a run with a problem is never submitted. If SLURM refuses the job, no trace of the
submission is left.
"""

import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from forescale.checkpoint.mirror import mirror_of
from forescale.checkpoint.reader import newest_step
from forescale.checkpoint.restore import restore
from forescale.checkpoint.retention import hold
from forescale.config.compose import groups
from forescale.config.job import overrides_of, words_of
from forescale.config.schema import ConfigError, Problem, plain
from forescale.config.sizes import Sizes, in_words
from forescale.config.target import refuse_targets, remember, targets
from forescale.ground.console import open_console
from forescale.ground.errors import UserError
from forescale.ground.foreign import read_text
from forescale.ground.storage import write_file
from forescale.monitor.status import Status
from forescale.plan.blocks import print_blocks
from forescale.plan.config import PlanJob
from forescale.plan.gpu import gpu_of
from forescale.plan.plan import Plan
from forescale.plan.rows import show, sizes_block
from forescale.run.certificate import about
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
from forescale.slurm.script import Order
from forescale.slurm.submission import (
    Submission,
    accepted,
    facts_of,
    in_queue,
    submissions,
    waiting_or_running,
)

_UNDER_WAY = 600.0  # seconds that a command may take to submit
# GPU-hours of a job that are worth a rehearsal, and GPUs of which one takes a minute or two.
_WORTH, _QUICK = 100.0, 4096
_HOST_MEMORY = 3 << 30  # bytes of host memory of a rank on a GPU: libraries, buffers of batches

# Rehearses the job that words of `forescale rehearse` describe; returns what would end it, and a
# sentence on what was seen. Raises UserError if this machine can't rehearse it.
Rehearse = Callable[[list[str]], tuple[list[Problem], str]]


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
    jobs = [each for each in jobs if not _is_complete(each)]
    if not jobs:
        return
    plans = [Plan(job, newest_step) for job in jobs]
    if not dry:
        plans[0].notes[:0] = notes
        plans[0].notes += notes_on_cpus(jobs[0])
        if (nodes := _range(plans)).is_range:
            most = Sizes(nodes.most, nodes.most)
            beyond = limit_problems(replace(jobs[0].slurm, nodes=most))
            plans[0].notes += [f"{key}: {problem}." for key, problem, _ in beyond if "nodes" in key]
            plans[0].notes += notes_on_sizes(plans)
        if Run(jobs[0].run.directory).config.exists() and remembered.recall(jobs[0].run.directory):
            print(
                "Note: keys of slurm and machine that you don't give are as you submitted it last."
            )
        show(plans[0])
        sentences, command = rehearsal_of(plans[0], overrides)
        is_due = rehearse is not None and bool(command) and _is_worth_it(plans[0])
        if command and not is_due:
            lead = "Rehearse it" if sentences else "Not rehearsed"
            sentences.append(f"{lead}: {shlex.join(['forescale', 'rehearse', *command])}")
        print(*sentences, sep="\n", end="\n" * bool(sentences))
        sys.stdout.flush()
    problems = [p for plan in plans for p in plan.problems]
    if not dry:
        least = _range(plans).least
        problems += limit_problems(replace(jobs[0].slurm, nodes=Sizes(least, least)))
    if problems:
        raise ConfigError(problems)
    profile = next((w.partition("=")[2] for w in overrides if w.startswith("slurm=")), "plain")
    runs = [Run(job.run.directory) for job in jobs]
    folders = [run.path / "jobs" / "NNNN" for run in runs]
    if dry:
        if plans[0].sizes:
            print_blocks(open_console(stderr=True), [sizes_block(plans[0])])
        print(order(plans, runs, folders, profile).script(), end="")
        return
    queue.must_be_here()
    largest = queue.largest_array()
    first = slice(largest)  # of several arrays
    queue.expect_accepted(order(plans[first], runs[first], folders[first], profile).script())
    if rehearse is not None and is_due:
        _refuse_twice(runs[0])
        _rehearse(rehearse, command, jobs[0])
    for note in {described(packages): "" for each in jobs if (packages := own_packages(each))}:
        print(f"Note: {note}")
    arrays, ids = enter(plans, profile, largest)
    for plan in plans:
        remembered.remember(_job_of(plan))
        if trust:
            remember(plan.given, plan.given.run.directory)
    names, time_limit = [name for array in arrays for name in array.names], jobs[0].slurm.time
    as_what = f"{len(names)} runs as array {' and '.join(ids)}" if names[1:] else f"as job {ids[0]}"
    lead = f"; it saves {arrays[0].lead} s before its time limit of {time_limit}"
    scripts = ", ".join(str(array.submissions[0].script) for array in arrays)
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


def rehearsal_of(plan: Plan, words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return sentences on the last rehearsal of a plan's job, and the words that rehearse it now:
    none if that one still holds, for a machine that can't be pretended, and for an array, whose
    runs have further keys. words: of the command."""
    if plan.problems or gpu_of(plan.machine.name, 0, 1) is None:
        return [], []
    sentences, holds = about(plan.job, plan.job.gpus)
    if holds or _job_of(plan).slurm.runs is not None:
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


def _is_worth_it(plan: Plan) -> bool:
    """Return True if a job is to be rehearsed before it waits in the queue."""
    job = _job_of(plan)
    if job.submit.rehearse != "auto":
        return job.submit.rehearse == "always"
    limit = job.slurm.time.seconds if job.slurm.time else None
    hours = [h for h in (plan.gpu_hours, limit and limit / 3600 * plan.world) if h is not None]
    begins = not Run(job.run.directory).checkpoint_steps()  # one that has made steps shows as much
    return begins and min(hours, default=0.0) >= _WORTH and plan.world <= _QUICK


def _rehearse(rehearse: Rehearse, words: list[str], job: SubmitJob) -> None:
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
    job = _job_of(plans[0])
    saves = (_save_seconds(_smallest(p), r) for p, r in zip(plans, runs, strict=True))
    lead = max(_job_of(p).lead(seconds) for p, seconds in zip(plans, saves, strict=True))
    return Order(
        names=[r.name for r in runs],
        runs=[r.path.resolve() for r in runs],
        submissions=[Submission(f.resolve()) for f in folders],
        settings=job.slurm,
        lead=lead,
        profile=profile,
        waits=waits,
        nodes=_range(plans),
    )


def enter(
    plans: Sequence[Plan], profile: str, largest: int | None = None
) -> tuple[list[Order], list[str]]:
    """Freeze each run, submit them together, and return the ids of the job, or of the arrays, which
    have at most `largest` tasks each. Raises UserError if a run is already in the queue or has
    another config, or if SLURM refuses one: then none is left in the queue."""
    for plan in plans:
        _refuse_twice(Run(plan.given.run.directory))
    started = [start(_job_of(plan).training, newest=newest_step) for plan in plans]
    for begun in started:
        if mirror := mirror_of(begun.run, begun.job, print):
            mirror.check()
    for begun in started:
        waits = bool(_job_of(plans[0]).slurm.after)  # perhaps for the run that it branches off
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
            after = [f"afterany:{jobs[-1]}"] if jobs and _job_of(plans[0]).slurm.at_once else []
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


def _job_of(plan: Plan) -> SubmitJob:
    assert isinstance(plan.given, SubmitJob)
    return plan.given


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


def usable_nodes(plan: Plan) -> list[int]:
    """Return the numbers of nodes that a job can use, by its rules and its memory, the largest
    first."""
    return plan.fitting_sizes or [plan.nodes]


def _range(plans: Sequence[Plan]) -> Sizes:
    """Return how many nodes a job asks for, without spare ones: those that each plan can use."""
    usable = [usable_nodes(plan) for plan in plans]
    return Sizes(max(sizes[-1] for sizes in usable), max(sizes[0] for sizes in usable))


def notes_on_sizes(plans: Sequence[Plan]) -> list[str]:
    """Return a sentence on the runs of a job that can't use all numbers of nodes which it may get,
    for each list of numbers that they can use."""
    runs: dict[tuple[int, ...], list[str]] = {}
    for plan in plans:
        runs.setdefault(tuple(usable_nodes(plan)), []).append(plan.given.run.name)
    nodes, notes = _range(plans), list[str]()
    spares = f" and {n} to spare" if (n := _job_of(plans[0]).slurm.spares) else ""
    for sizes, names in runs.items():
        if excess := next((n for n in nodes if n not in sizes), 0):
            who = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else "")
            fit = next(n for n in sizes if n < excess)
            asks = f"{who} can use {in_words(sizes)} nodes, and SLURM is asked for {nodes}{spares}"
            notes.append(f"{asks}: of {excess} nodes a run uses {fit}, the rest stands idle.")
    return notes


def _smallest(plan: Plan) -> Plan:
    """Return the plan on the fewest nodes that it can use: there a rank needs most memory, and a
    save takes longest."""
    return plan.sizes.get(usable_nodes(plan)[-1], plan)


def _describe(plan: Plan, begun: Start, submission: Submission) -> None:
    """Write the code and all facts that the job needs beside the run's config."""
    job = _job_of(plan)
    packages = own_packages(begun.job)
    write_code(submission.code, packages)
    data = [source["path"] for source in begun.sources.describe().values()]
    if job.slurm.has_gpus:
        memory = _HOST_MEMORY * job.per_node + _smallest(plan).copy_bytes
    else:  # on CPUs all planned memory is host memory
        memory = int(_smallest(plan).chosen.memory.total) * job.per_node
        memory += _smallest(plan).copy_bytes
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
