"""`forescale logs`: what a rank of a run says, as it says it; what the first to fail said last."""

import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from forescale.config.compose import compose, overrides_of
from forescale.config.job import RunJob
from forescale.config.schema import key
from forescale.errors import DONE, INTERRUPTED, USER, UserError
from forescale.resilience.outcome import launch_of
from forescale.run.directory import Attempt, Run
from forescale.slurm import queue
from forescale.slurm.submission import Submission, submissions, waiting_or_running

_EVERY = 0.3  # seconds between two looks
_ASK = 15.0  # seconds between two questions to the queue
_LAST_WORDS = 25  # lines of a rank that failed


@dataclass
class LogsJob(RunJob):
    VERB: ClassVar[str] = "logs"

    rank: int | None = key(0, "whose words; null: the batch script's", ge=0)
    attempt: int | None = key(None, "null: the newest that has any", ge=1)
    lines: int = key(50, "so many of the last lines first", ge=0)
    follow: bool = key(True, "go on while the run does")


JOB = LogsJob
EXAMPLES = (
    "logs first",
    "logs first rank=3 follow=false",
    "logs first rank=null lines=200",
)


def main(words: list[str]) -> int:
    job = compose(LogsJob, overrides_of(LogsJob, words))
    run = Run.existing(Path(job.target or "").expanduser(), Path(job.run.root).expanduser())
    if job.rank is None:
        return _show_batch(run, job)
    attempt = _attempt(run, job)
    if attempt is None:
        print(_why_nothing(run, job))
        return DONE
    path = _log(attempt, job.rank)
    print(f"== {path}", flush=True)
    _show(path, job.lines, lambda: job.follow and not _is_over(run, attempt))
    _show_failure(attempt, job.rank)
    return DONE


def _log(attempt: Attempt, rank: int) -> Path:
    return attempt.path / f"rank-{rank}.log"


def _attempt(run: Run, job: LogsJob) -> Attempt | None:
    """The one that is asked for, else the newest in which that rank, or any, has said something."""
    found = [a for a in run.attempts() if job.attempt in (None, a.number)]
    if job.attempt is not None and not found:
        raise UserError(str(run.path), f"has no attempt {job.attempt}", "see forescale status RUN")
    return next((a for a in reversed(found) if _log(a, job.rank or 0).exists()), None)


def _job(run: Run) -> tuple[Submission, queue.Job] | None:
    """Of the queue, where it can be asked."""
    try:
        return waiting_or_running(run)
    except UserError:
        return None


def _why_nothing(run: Run, job: LogsJob) -> str:
    if found := _job(run):
        reason = f" ({found[1].reason})" if found[1].is_waiting else ""
        return f"Job {found[1].id} is {found[1].state.lower()}{reason}; no rank has begun."
    told = next((t for a in reversed(run.attempts()) if (t := launch_of(a.path))), {})
    if "slurm" in told:
        how = f": {told['how'].rstrip('.')}" if "how" in told else ""
        return f"No rank of {run.name} has begun{how}. The batch script: rank=null."
    if told and not job.rank:
        return (
            f"Rank 0 of {run.name} speaks to the terminal that started it; what happened is in "
            f"{run.events}, the others' words with rank=1."
        )
    return f"Rank {job.rank} of {run.name} has said nothing yet."


def _show(path: Path, lines: int, goes_on) -> None:
    """The last lines, then what is added while it goes on."""
    with open(path, errors="replace") as f:
        sys.stdout.writelines(deque(f, maxlen=lines) if lines else _skipped(f))
        while True:
            more = f.read()
            sys.stdout.write(more)
            sys.stdout.flush()
            if not more and not goes_on():
                break
            time.sleep(_EVERY if not more else 0.0)
        sys.stdout.write(f.read())


def _skipped(f) -> Iterator[str]:
    f.seek(0, 2)
    return iter(())


def _is_over(run: Run, attempt: Attempt) -> bool:
    """Whether the attempt can't say more."""
    if "ended" in launch_of(attempt.path):
        return True
    newer = [a for a in run.attempts() if a.number > attempt.number]
    return any(launch_of(a.path) for a in newer)


def _show_failure(attempt: Attempt, shown: int) -> None:
    """How the attempt ended; and of the rank that failed first, the last lines."""
    told = launch_of(attempt.path)
    if "ended" not in told:
        return
    print(f"== Attempt {attempt.number} ended: {told['how']}.")
    rank = told.get("rank", 0)
    path = _log(attempt, rank)
    if told["code"] in (DONE, INTERRUPTED, USER) or rank == shown or not path.exists():
        return
    print(f"== {path}, the rank that failed first")
    with open(path, errors="replace") as f:
        sys.stdout.writelines(deque(f, maxlen=_LAST_WORDS))


def _show_batch(run: Run, job: LogsJob) -> int:
    """The batch script's own words, of the newest submission."""
    found = submissions(run)
    if not found:
        raise UserError(str(run.path), "was never submitted", "give a rank, such as rank=0")
    newest, asked, lives = found[-1], 0.0, True
    if not (path := newest.log).exists():
        print(_why_nothing(run, job))
        return DONE

    def goes_on() -> bool:
        nonlocal asked, lives
        if lives and time.monotonic() - asked > _ASK:
            lives, asked = _job(run) is not None, time.monotonic()
        return job.follow and lives

    print(f"== {path}", flush=True)
    _show(path, job.lines, goes_on if queue.is_here() else lambda: False)
    return DONE
