"""`forescale status`: a table of all runs, or everything about one, or about a dataset's build."""

import os
import shlex
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar, NotRequired

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from forescale.config.compose import parse
from forescale.config.job import Job, RootConfig
from forescale.config.schema import section
from forescale.ground.console import open_console
from forescale.ground.document import is_json, tell, tell_line
from forescale.ground.errors import DONE, UserError
from forescale.monitor.build import Build, builds_under, find_build
from forescale.monitor.curve import needs_ascii
from forescale.monitor.facts import facts
from forescale.monitor.overview import Index, show_runs
from forescale.monitor.run_text import show_run
from forescale.monitor.status import Status, runs_under
from forescale.run.directory import Run
from forescale.slurm import queue, queue_cache
from forescale.slurm.submission import newest

_REDRAW = 2.0  # seconds


@dataclass
class StatusJob(Job):
    VERB: ClassVar[str] = "status"
    TARGET: ClassVar[str] = "target"
    FLAGS: ClassVar = {"--live": "live"}
    # of one run the keys of monitor/facts.py, of a dataset those of monitor/build.py
    PRINTS: ClassVar = {
        "runs": NotRequired[list[dict]], "state": NotRequired[str], "error": NotRequired[str | None]
    }  # fmt: skip
    LINES: ClassVar[str] = "with --live, every two seconds"

    target: str | None = None  # a run (name or directory) or a dataset; null: all runs
    live: bool = False  # refresh every two seconds; --live does the same
    run: RootConfig = section(RootConfig)  # where the runs are stored


JOB = StatusJob
EXAMPLES = ("status", "status first", "status first --json", "status /data/web   (its build)")


def main(words: list[str]) -> int:
    job = parse(StatusJob, words)
    console = open_console()
    in_ascii = needs_ascii(console.encoding, os.environ.get("TERM", ""))
    if is_json():
        if not job.live:
            tell(_facts(job))
        while job.live:
            tell_line(_facts(job))
            time.sleep(_REDRAW)
        return DONE
    index = Index(Path(job.run.root).expanduser())
    if not job.live:
        console.print(page_of(job, index, console.width, in_ascii), soft_wrap=True)
        return DONE
    with Live(console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            live.update(page_of(job, index, console.width, in_ascii), refresh=True)
            time.sleep(_REDRAW)


def _facts(job: StatusJob) -> dict[str, Any]:
    """Return what programs read (forescale help monitor)."""
    if build := _build_of(job):
        queued = [{"id": j.id, "state": j.state, "reason": j.reason} for j in _jobs_of(build)]
        return build.facts(queued)
    runs = _runs(job)
    jobs, ends = _jobs(runs, open_console(stderr=True))
    rows = [facts(Status(run), jobs.get(run.name), ends.get(run.name)) for run in runs]
    return rows[0] if job.target else {"runs": rows}


def _runs(job: StatusJob) -> list[Run]:
    """Return the requested run, or all."""
    if job.target:
        return [Run.existing(job.target, job.run.root)]
    return runs_under(Path(job.run.root).expanduser())


def page_of(job: StatusJob, index: Index, width: int, in_ascii: bool = False) -> Text:
    """Return the whole page as one text, to be printed once or repeatedly. in_ascii: its curve is
    drawn with ASCII characters alone."""
    text = StringIO()
    page = open_console(width=width, file=text, force_terminal=True)
    if build := _build_of(job):
        _show_build(build, page)
        return Text.from_ansi(text.getvalue().rstrip())
    runs, builds = _runs(job), [] if job.target else builds_under(index.root)
    jobs, ends = _jobs(runs, page)
    if job.target:
        name = runs[0].name
        show_run(index.statuses.of(runs[0]), page, jobs.get(name), ends.get(name), in_ascii)
    elif runs:
        show_runs(runs, index, page, jobs, ends)
    elif not builds:
        root = escape(str(index.root))
        page.print(f"No runs in {root} yet; start one with: forescale train")
    for build in builds:
        line = f"Dataset {build.output}: {build.state}; {build.progress}".rstrip("; ")
        page.print(escape(line), soft_wrap=True)
    return Text.from_ansi(text.getvalue().rstrip())


def _build_of(job: StatusJob) -> Build | None:
    return find_build(job.target, job.run.root) if job.target else None


def _jobs_of(build: Build) -> list[queue.Job]:
    """Return the jobs of a build's newest submission that are in the queue."""
    with suppress(UserError):  # the files show the build without it
        for last in newest(build.jobs) if queue.is_here() else ():
            return [job for job in queue_cache.jobs([str(last.job)]) if last.is_of(job)]
    return []


def _show_build(build: Build, page: Console) -> None:
    sentences, again = [], ""
    for last in newest(build.jobs):
        again = shlex.join(["forescale", *last.facts["command"][1:]])
        jobs = _jobs_of(build)
        for state, count in Counter((job.state, job.reason) for job in jobs).items():
            first = next(job for job in jobs if (job.state, job.reason) == state)
            name = f"job {first.id}" if count == 1 else f"{count} tasks of job {last.job}"
            facts = [f"{name}: {first.state.lower()}"]
            if first.is_waiting:
                facts += [f"SLURM's reason: {first.reason}", first.remedy]
            elif count == 1:
                facts += [f"for {first.elapsed}, {first.left} left, on {first.nodes} nodes"]
            sentences.append(", ".join(filter(None, facts)))
    build.show(page, sentences, again)


def _jobs(
    runs: Sequence[Run], console: Console
) -> tuple[dict[str, queue.Job], dict[str, queue_cache.EarlyEnd]]:
    """Return the jobs of these runs in the queue, with one query for all, and those that ended
    before a rank began; by the run's name."""
    submissions = {run.name: last for run in runs for last in newest(run)}
    try:
        jobs = {s.run.name: job for s, job in queue_cache.in_queue(submissions.values())}
    except UserError as e:  # the files show the runs without it
        console.print(escape(f"The queue can't be read: {e}"), soft_wrap=True)
        return {}, {}
    ends = {
        name: queue_cache.early_end(last) for name, last in submissions.items() if name not in jobs
    }
    return jobs, {name: end for name, end in ends.items() if end}
