"""`forescale logs`: print the log of a rank as it grows; after a failure, the end of the log of the
rank that failed first. Of a dataset's build, the log of its newest job."""

import sys
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import ClassVar, NotRequired

from forescale.config.compose import parse
from forescale.config.job import RunJob
from forescale.config.schema import key
from forescale.ground.document import is_json, tell_line
from forescale.ground.errors import DONE, INTERRUPTED, USER, UserError
from forescale.monitor.build import Build, find_build
from forescale.resilience.outcome import LaunchRecord, launch_of, log_of
from forescale.resilience.rank_log import RankLog
from forescale.run.directory import Attempt, Run
from forescale.slurm import queue, queue_cache
from forescale.slurm.submission import newest, submissions

_EVERY = 0.3  # seconds between two reads
_LAST_LINES = 25  # of the rank that failed first


@dataclass
class LogsJob(RunJob):
    VERB: ClassVar[str] = "logs"
    PRINTS: ClassVar = {"line": NotRequired[str], "note": NotRequired[str]}
    LINES: ClassVar[str] = "each line of the log, and notes"

    # the rank whose log to print; null: the batch script. Of a dataset's build: the task of the
    # array, or the node (0: all of them)
    rank: int | None = key(0, ge=0)
    attempt: int | None = key(None, ge=1)  # number of the attempt; null: the newest with a log
    lines: int = key(50, ge=0)  # number of last lines to begin with
    follow: bool = True  # print new lines until the attempt ends


JOB = LogsJob
EXAMPLES = (
    "logs first",
    "logs first rank=3 follow=false",
    "logs first rank=null lines=200",
    "logs /data/web   (the job that builds this dataset)",
)


def main(words: list[str]) -> int:
    job = parse(LogsJob, words)
    if job.target and (build := find_build(job.target, job.run.root)):
        return _show_build(build, job)
    run = Run.existing(job.target or "", job.run.root)
    if job.rank is None:
        return _show_batch(run, job, _JobIsGone(run))
    attempts = [a for a in run.attempts() if job.attempt in (None, a.number)]
    if job.attempt is not None and not attempts:
        raise UserError(str(run.path), f"has no attempt {job.attempt}", "see forescale status RUN")
    attempt = next((a for a in reversed(attempts) if log_of(a.path, job.rank).exists), None)
    if attempt is None:
        _note(_why_nothing(run, job))
        return DONE
    is_gone = _JobIsGone(run)

    def goes_on() -> bool:
        newer = (a for a in run.attempts() if a.number > attempt.number)
        is_over = "ended" in launch_of(attempt.path) or any(launch_of(a.path) for a in newer)
        return job.follow and not is_over and not is_gone.of(attempt)

    log = log_of(attempt.path, job.rank)
    _note(f"== {log}")
    _show(log, job.lines, goes_on)
    record = launch_of(attempt.path)
    if "ended" in record:
        _note(f"== Attempt {attempt.number} ended: {record.get('how', 'not recorded')}.")
        rank = record.get("rank", 0)
        failed = record.get("code") not in (DONE, INTERRUPTED, USER)
        if failed and rank != job.rank and (log := log_of(attempt.path, rank)).exists:
            _note(f"== {log}, the rank that failed first")
            _write(log.last(_LAST_LINES))
    if early := _early_end(run):
        _note(_early_end_text(early))
    elif "ended" not in launch_of(attempt.path) and is_gone.of(attempt):  # it may have just ended
        how = f"is no longer in the queue; how attempt {attempt.number} ended was not recorded"
        _note(f"== Job {newest(run)[0].job} {how}. See the batch script's log: rank=null")
    return DONE


class _JobIsGone:
    """True once the run's newest job has left the queue; False where SLURM doesn't answer. A call
    may query the queue again, at most every few seconds."""

    def __init__(self, run: Run):
        self._newest, self._asked_at, self._answer = newest(run), -queue_cache.EVERY, False

    def __call__(self) -> bool:
        now = time.monotonic()
        if not self._answer and now - self._asked_at >= queue_cache.EVERY and queue.is_here():
            self._asked_at = now
            with suppress(UserError):
                self._answer = bool(self._newest) and not queue_cache.in_queue(self._newest)
        return self._answer

    def of(self, attempt: Attempt) -> bool:
        """Return True if an attempt is of this job, which has left the queue."""
        submission = launch_of(attempt.path).get("slurm", {}).get("submission")
        return submission in [s.name for s in self._newest] and self()


def _early_end(run: Run) -> queue_cache.EarlyEnd | None:
    """Return the end of the run's newest job, if no rank of it began."""
    with suppress(UserError):  # the queue can't be read
        submission = newest(run)
        if submission and not queue_cache.in_queue(submission):
            return queue_cache.early_end(submission[0])
    return None


def _early_end_text(early: queue_cache.EarlyEnd) -> str:
    """Return how a job ended before any rank began, and the end of its log."""
    lines = early.tail(_LAST_LINES)
    log = f"== {early.submission.log}" if lines else f"No log: {early.submission.log}"
    return "\n".join([f"== {early.sentence}", log, *lines])


def _why_nothing(run: Run, job: LogsJob) -> str:
    queued: queue.Job | None = None
    with suppress(UserError):  # the queue can't be read
        queued = next((queued for _, queued in queue_cache.in_queue(newest(run))), None)
    if queued:
        reason = f" ({queued.reason})" if queued.is_waiting else ""
        return f"Job {queued.id} is {queued.state.lower()}{reason}; no rank has started."
    if early := _early_end(run):
        return _early_end_text(early)
    records = (launch_of(a.path) for a in reversed(run.attempts()))
    record = next(filter(None, records), LaunchRecord())
    if "slurm" in record:
        how = f": {record['how'].rstrip('.')}" if "how" in record else ""
        return f"No rank of {run.name} has started{how}. See the batch script's log: rank=null."
    if record and not job.rank:
        return (
            f"Rank 0 of {run.name} prints to the terminal that started it. Events are in "
            f"{run.events}; for the log of another rank give rank=1."
        )
    return f"Rank {job.rank} of {run.name} has no log yet."


def _show(log: RankLog, lines: int, goes_on) -> None:
    """Print the last lines, then new ones while `goes_on()`."""
    read = log.reader()
    last = deque(iter(read, ""), maxlen=lines)  # of 0: none of them
    rest = _write(last)
    while True:
        text = "".join(iter(read, ""))
        rest = _write([rest, text])
        if not text and not goes_on():
            break
        time.sleep(_EVERY if not text else 0.0)
    if rest := _write([rest, *iter(read, "")]):
        tell_line({"line": rest})


def _note(text: str) -> None:
    print(text, flush=True)
    tell_line({"note": text.removeprefix("== ")})


def _write(texts: Iterable[str]) -> str:
    """Write text of a log, for programs a line at a time; return what is no whole line yet."""
    if not is_json():
        sys.stdout.writelines(texts)
        sys.stdout.flush()
        return ""
    *lines, rest = "".join(texts).split("\n")
    for line in lines:
        tell_line({"line": line})
    return rest


def _show_build(build: Build, job: LogsJob) -> int:
    """Print the log of a build's newest job: of one task of an array, or of one node."""
    if not (last := next(iter(newest(build.jobs)), None)):
        where = ", ".join(b.label for b, state in build.builders if state == "lives")
        todo = f"it prints to the terminal of {where}" if where else "no job was submitted for it"
        _note(f"No log of {build.output}: {todo}. See forescale status {build.output}")
        return DONE
    tasks, rank = len([*last.links.iterdir()]), job.rank or 0
    log = RankLog(last.links / str(rank if tasks > 1 else 0), rank or None if tasks == 1 else None)
    if not log.exists:
        queued = next((queued for _, queued in queue_cache.in_queue([last])), None)
        state = f"{queued.state.lower()} ({queued.reason})" if queued else "no longer in the queue"
        _note(f"No log yet: {log}. Job {last.job} is {state}.")
        return DONE
    _note(f"== {log}")
    is_gone = _JobIsGone(build.jobs)
    _show(log, job.lines, lambda: job.follow and queue.is_here() and not is_gone())
    _note(f"== Dataset {build.output}: {Build(build.output).state}.")
    return DONE


def _show_batch(run: Run, job: LogsJob, is_gone: _JobIsGone) -> int:
    """Print the log of the newest submission's batch script."""
    all_submissions = submissions(run)
    if not all_submissions:
        raise UserError(str(run.path), "was never submitted", "give a rank, such as rank=0")
    if not (path := (newest(run) or all_submissions[-1:])[0].log).exists():
        _note(_why_nothing(run, job))
        return DONE
    _note(f"== {path}")
    _show(RankLog(path), job.lines, lambda: job.follow and queue.is_here() and not is_gone())
    if early := _early_end(run):
        _note(f"== {early.sentence}")
    return DONE
