"""`forescale stop`: make a run save and exit, here or in the queue, which won't restart it."""

import os
import signal
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import psutil

from forescale.config.compose import compose, overrides_of
from forescale.config.job import RunJob
from forescale.config.schema import key
from forescale.errors import DONE, UserError
from forescale.resilience.outcome import launch_of
from forescale.run.directory import Run
from forescale.slurm import queue
from forescale.slurm.submission import Submission, waiting_or_running


@dataclass
class StopJob(RunJob):
    VERB: ClassVar[str] = "stop"
    FLAGS: ClassVar = {"--now": "now"}

    now: bool = key(False, "cancel at once, without saving; --now does the same")


JOB = StopJob
EXAMPLES = (
    "stop first",
    "stop first --now   (cancel, without saving)",
)


def main(words: list[str]) -> int:
    """Returns 0 when the request is sent; raises UserError if the run runs neither here nor in the
    queue."""
    job = compose(StopJob, overrides_of(StopJob, words))
    run = Run.existing(Path(job.target or "").expanduser(), Path(job.run.root).expanduser())
    found = waiting_or_running(run) if run.jobs() else None
    if found:
        _stop_job(*found, job.now)
    elif process := _launcher(run):
        _stop_launcher(process, job.now)
    else:
        todo = "see forescale status; on another machine, give this command there"
        raise UserError(str(run.path), "it neither runs on this machine nor is in the queue", todo)
    return DONE


def _stop_job(submission: Submission, job: queue.Job, now: bool) -> None:
    submission.stop()  # first, so that the job isn't restarted in between
    if now or job.is_waiting:
        queue.cancel(job.id)
        was = "was still waiting" if job.is_waiting else "did not save"
        print(f"Job {job.id} is cancelled; it {was}. Resume the run with forescale submit.")
        return
    queue.signal_batch(job.id, "USR1")
    print(
        f"Job {job.id} saves and exits, and isn't requeued. Follow it: forescale logs "
        f"{submission.path.parents[1].name} rank=null"
    )


def _launcher(run: Run) -> psutil.Process | None:
    """Return the process on this machine that started the newest attempt, if it is alive."""
    for attempt in reversed(run.attempts()):
        record = launch_of(attempt.path)
        here = record.get("host") == socket.gethostname()
        if here and "ended" not in record and "pid" in record:
            with suppress(psutil.Error):
                process = psutil.Process(record["pid"])
                # The process id may belong to another process by now.
                if process.create_time() <= record["begun"]:
                    return process
        if record:
            return None
    return None


def _stop_launcher(process: psutil.Process, now: bool) -> None:
    if now:
        process.kill()  # its ranks die with it
        print(f"Process {process.pid} is killed; steps since the last checkpoint are lost.")
        return
    os.kill(process.pid, signal.SIGTERM)
    print(f"Process {process.pid} saves and exits.")
