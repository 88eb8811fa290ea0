"""`forescale stop`: make a run save and exit, here or in the queue, which won't restart it."""

import os
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil

from forescale.config.compose import parse
from forescale.config.job import RunJob
from forescale.ground.document import tell
from forescale.ground.errors import DONE, UserError
from forescale.monitor.status import Status
from forescale.resilience.launcher import ATTEMPT
from forescale.resilience.outcome import launch_of, process_mark
from forescale.run.directory import Run
from forescale.slurm import queue
from forescale.slurm.submission import expect_own, waiting_or_running

_RESTART = 10.0  # seconds: longer than a launcher waits before it starts ranks again


@dataclass
class StopJob(RunJob):
    VERB: ClassVar[str] = "stop"
    FLAGS: ClassVar = {"--now": "now"}
    PRINTS: ClassVar = {"path": str, "job": str | None, "process": int | None, "how": str}

    now: bool = False  # cancel at once, without saving; --now does the same


JOB = StopJob
EXAMPLES = ("stop first", "stop first --now   (cancel, without saving)")


def main(words: list[str]) -> int:
    """Returns 0 when the request is sent; raises UserError if the run runs neither here nor in the
    queue."""
    job = parse(StopJob, words)
    run = Run.existing(job.target or "", job.run.root)
    facts: dict[str, object] = {"path": run.path, "job": None, "process": None, "how": "saves"}
    if run.jobs() and (in_queue := waiting_or_running(run)):
        submission, queued = in_queue
        if Status(run).state == "complete":
            problem = f"the run is complete, and its job {queued.id} ends by itself"
            raise UserError(str(run.path), problem, f"if it doesn't: scancel {queued.id}")
        expect_own(submission, queued)
        submission.stop()  # first, so that the job isn't restarted in between
        facts["job"] = queued.id
        if job.now or queued.is_waiting:
            facts["how"] = "cancelled"
            queue.cancel(queued.id)
            was = "was still waiting" if queued.is_waiting else "has only SLURM's KillWait to save"
            print(f"Job {queued.id} is cancelled; it {was}. Resume the run with forescale submit.")
        else:
            queue.signal_batch(queued.id, "USR1")
            print(
                f"Job {queued.id} saves and exits, and isn't requeued. Follow it: forescale logs "
                f"{submission.path.parents[1].name} rank=null"
            )
    elif process := launcher_of(run):
        facts["process"] = process.pid
        if job.now:
            facts["how"] = "killed"
            process.kill()  # its ranks die with it; psutil signals no later process of the same id
            print(f"Process {process.pid} is killed; steps since the last checkpoint are lost.")
        else:
            process.terminate()
            print(f"Process {process.pid} saves and exits.")
    else:
        todo = "see forescale status; on another machine, give this command there"
        raise UserError(str(run.path), "it neither runs on this machine nor is in the queue", todo)
    tell(facts)
    return DONE


def launcher_of(run: Run) -> psutil.Process | None:
    """Return the process on this machine that started the newest attempt, if it is alive.

    launch.json may be anybody's, and name any process: only one that began when the file says, that
    is this user's, and whose ranks have this attempt is returned. Raises UserError for another
    user's.
    """
    for attempt in reversed(run.attempts()):
        record = launch_of(attempt.path)
        here = record.get("host") == socket.gethostname()
        if here and "ended" not in record and isinstance(pid := record.get("pid"), int) and pid > 1:
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                if record.get("process") not in (None, process_mark(pid)):
                    return None  # the id belongs to another process by now
                if (owner := process.uids().real) != os.getuid():
                    problem = f"process {pid}, which started it, belongs to user {owner}"
                    raise UserError(str(run.path), problem, "ask them to stop it")
                return process if _trains(process, attempt.path) else None
        if record:
            return None
    return None


def _trains(process: psutil.Process, attempt: Path) -> bool:
    """Return True if a process has started ranks of this attempt. While a launcher restarts them it
    has none: wait for some seconds."""
    end = time.monotonic() + _RESTART
    while True:
        for child in process.children():
            with suppress(psutil.Error):
                path = child.environ().get(ATTEMPT)
                if path and (Path(process.cwd()) / path).resolve() == attempt.resolve():
                    return True
        command = process.cmdline()
        may_start = "train" in command and "forescale" in " ".join(command)
        if time.monotonic() > end or not (process.is_running() and may_start):
            return False
        time.sleep(0.1)
