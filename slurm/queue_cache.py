"""The state of jobs in the queue, for views that are drawn again and again, from few queries.

    ~/.cache/forescale/queue-UID-HASH.json   mode 0600: the last answer of squeue, how jobs ended

Invariant: all processes of a user together ask squeue once in EVERY seconds at most, whatever they
show; each question is about all jobs that any of them has shown lately. What is stored is only ever
a shortcut: if it is damaged, foreign or open to others, SLURM is asked. Whatever decides something
(submit, stop) asks the queue itself.
"""

import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from forescale.ground.errors import UserError
from forescale.ground.storage import cache_directory, expect_private, read_private, write_private
from forescale.resilience.outcome import launch_of
from forescale.slurm import queue
from forescale.slurm.submission import Submission
from forescale.slurm.submission import in_queue as in_queue_by

EVERY = 10.0  # seconds
_SHOWN_LATELY = 60.0  # seconds that a job is asked about after it was last shown
_ENDS_KEPT = 7 * 86_400.0  # seconds that the end of a job is kept
_REMEMBERED = 3_600.0  # seconds after the last sign of a job in which scontrol may know it
_LONGEST = 90.0  # seconds to wait for another process that asks
_TIMES = ("start", "submitted")  # fields of a job that are numbers
_OVER = re.compile(
    r"COMPLETED|FAILED|CANCELLED|TIMEOUT|PREEMPTED|BOOT_FAIL|DEADLINE|NODE_FAIL|OUT_OF_MEMORY"
)


@dataclass
class Answer:
    """The last answer of SLURM. at: when, in seconds since the epoch; ids_asked: the jobs of the
    query; jobs: those in the queue; error: of squeue, if it failed; viewed: when each job was last
    shown; ends: when the end of each job was looked up, and scontrol's facts about it."""

    at: float = 0.0
    ids_asked: list[str] = field(default_factory=list)
    jobs: list[queue.Job] = field(default_factory=list)
    error: list[str] | None = None
    viewed: dict[str, float] = field(default_factory=dict)
    ends: dict[str, tuple[float, dict[str, str]]] = field(default_factory=dict)

    @classmethod
    def of(cls, text: bytes) -> "Answer":
        """Return an answer that was stored. Raises an error of some kind if it is damaged."""
        stored: dict[str, Any] = json.loads(text)
        error = stored["error"]
        answer = cls(
            float(stored["at"]),
            [str(job) for job in stored["ids_asked"]],
            [_job(job) for job in stored["jobs"]],
            None if error is None else [str(text) for text in error[:3]],
            {str(job): float(at) for job, at in stored["viewed"].items()},
            {str(job): (float(at), dict(facts)) for job, (at, facts) in stored["ends"].items()},
        )
        return answer if answer.at <= time.time() else cls()

    def ask(self) -> None:
        """Ask squeue about all jobs that were shown lately."""
        self.at = time.time()
        self.viewed = {job: at for job, at in self.viewed.items() if self.at - at < _SHOWN_LATELY}
        self.ids_asked, self.jobs, self.error = sorted(self.viewed), [], None
        try:
            self.jobs = queue.jobs(self.ids_asked)
        except UserError as e:
            self.error = [e.where, e.problem, e.todo]


def _job(stored: dict[str, Any]) -> queue.Job:
    fields: dict[str, Any] = {k: float(v) if k in _TIMES else str(v) for k, v in stored.items()}
    return queue.Job(**fields)


def jobs(ids: Iterable[str]) -> list[queue.Job]:
    """Return those of the jobs that were in the queue at most EVERY seconds ago. Waits that long if
    a query about other jobs was just made. Raises UserError if squeue fails."""
    viewed = set(ids)
    while True:
        with _answer() as answer:
            now = time.time()
            answer.viewed |= dict.fromkeys(viewed, now)
            wait = answer.at + EVERY - now
            if wait <= 0:
                answer.ask()
            if viewed <= set(answer.ids_asked):
                break
        time.sleep(min(wait, EVERY))
    if answer.error:
        raise UserError(*answer.error)
    return [job for job in answer.jobs if {job.id, job.id.partition("_")[0]} & viewed]


def in_queue(submissions: Iterable[Submission]) -> list[tuple[Submission, queue.Job]]:
    """Return the submissions whose jobs are in the queue, by `jobs`."""
    return in_queue_by(submissions, jobs)


@dataclass(frozen=True)
class EarlyEnd:
    """A job that ended before a rank of it began, and often before any process of ours did. state,
    code: SLURM's state and exit code of the job; None if SLURM no longer knows it."""

    submission: Submission
    state: str | None = None
    code: str | None = None

    @property
    def sentence(self) -> str:
        job = self.submission.job
        if self.state is None:
            return f"Job {job} is no longer in the queue, and no rank of it began."
        code = f", exit code {self.code}" if self.code else ""
        return f"Job {job} ended before any rank of it began: {self.state}{code}."

    def tail(self, lines: int) -> list[str]:
        """Return the last lines of the batch script's log; none without a log."""
        with suppress(OSError), open(self.submission.log, "rb") as f:
            f.seek(max(0, f.seek(0, os.SEEK_END) - (1 << 16)))
            return f.read().decode(errors="replace").splitlines()[-lines:]
        return []


def early_end(submission: Submission) -> EarlyEnd | None:
    """Return the early end of a job that is not in the queue; None if a rank of it began, if it was
    stopped on request, or if SLURM can't be asked. Never raises."""
    if not submission.job or submission.is_stopped or not queue.is_here():
        return None
    try:
        launches = [launch_of(a.path).get("slurm", {}) for a in submission.run.attempts()]
        starts = [str(x.get("restart")) for x in launches if x.get("submission") == submission.name]
        facts = _end_of(submission) if not starts or _is_recent(submission) else {}
    except (UserError, OSError):
        return None
    # Of a job that SLURM has started again, the ranks of its last start count.
    if facts.get("Restarts", starts[-1] if starts else None) in starts:
        return None
    if facts and not _OVER.match(facts.get("JobState", "")):
        return None  # in the queue, after all
    code, _, number = facts.get("ExitCode", "").partition(":")
    by_signal = f" (signal {number})" if number not in ("", "0") else ""
    return EarlyEnd(submission, facts.get("JobState"), f"{code}{by_signal}" if code else None)


def _is_recent(submission: Submission) -> bool:
    signs = [p.stat().st_mtime for p in (submission.log, submission.path) if p.exists()]
    return time.time() - max(signs, default=0.0) < _REMEMBERED


def _end_of(submission: Submission) -> dict[str, str]:
    """Return scontrol's facts about a job; empty if it no longer knows it. That a job has ended is
    asked once."""
    job, now = str(submission.job), time.time()
    script = submission.accepted.get("script", str(submission.script))
    key = f"{job} {script}"  # ids may begin anew
    with _answer() as answer:
        answer.ends = {k: v for k, v in answer.ends.items() if 0 <= now - v[0] < _ENDS_KEPT}
        if key in answer.ends:
            return answer.ends[key][1]
        facts = queue.show(job) if _is_recent(submission) else {}
        if not script.startswith(facts.get("Command", script)):
            facts = {}  # another job has this id by now
        facts = {k: facts[k] for k in ("JobState", "ExitCode", "Restarts") if k in facts}
        if not facts or _OVER.match(facts.get("JobState", "")):
            answer.ends[key] = now, facts
        return facts


@contextmanager
def _answer() -> Iterator[Answer]:
    """Yield the last answer, to be read and changed by this process alone; a new one if it can't be
    kept."""
    path = cache_directory() / f"queue-{os.getuid()}-{_cluster()}.json"
    lock = FileLock(path.with_suffix(".lock"), timeout=_LONGEST, mode=0o600)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(lock.lock_file):
            expect_private(os.lstat(lock.lock_file))
        lock.acquire()
    except (OSError, NotImplementedError, Timeout):  # a file system without locks, another's file
        yield Answer()
        return
    try:
        try:
            answer = Answer.of(read_private(path))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
            answer = Answer()  # none yet, damaged, of another version, or another's
        before = json.dumps(asdict(answer))
        yield answer
        if (text := json.dumps(asdict(answer))) != before:
            with suppress(OSError):  # not kept: the next process asks SLURM itself
                write_private(path, text.encode())
    finally:
        lock.release()


def _cluster() -> str:
    """Return what tells the cluster from others whose nodes share the home directory."""
    names = [os.environ.get("SLURM_CLUSTERS", "")]
    path = os.environ.get("SLURM_CONF")
    for config in [path] if path else ["/etc/slurm/slurm.conf", "/run/slurm/conf/slurm.conf"]:
        with suppress(OSError):
            text = Path(config).read_text(errors="replace")
            names += re.findall(r"(?im)^\s*ClusterName\s*=\s*(\S+)", text)
            break
    else:
        names.append(socket.gethostname())
    return hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()[:8]
