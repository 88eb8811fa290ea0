"""Steps of a job: run a command on all its nodes with srun, and read which tasks failed.

Invariant: a step is waited for, or killed and abandoned. The supervisor never hangs on a node that
doesn't answer.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

from forescale.errors import CRASHED, UserError
from forescale.slurm import queue
from forescale.slurm.config import SlurmConfig
from forescale.slurm.submission import Submission

_FAILED = re.compile(r"srun: error: (\S+): tasks? ([0-9,\- ]+): (.*)")
_KILLS = {"Killed": 9, "Terminated": 15, "Segmentation fault": 11, "Bus error": 7, "Aborted": 6}
_SCRATCH = '"$FORESCALE_SCRATCH"'
_PATIENCE = 60.0  # seconds from the first failure until the other tasks are killed
_LAST = 30.0  # seconds from then until srun itself is killed
_MORE = 5.0  # seconds after a failure in which other tasks may still report


@dataclass(frozen=True)
class Failure:
    """A failed task. code: negative for a signal; how: srun's text."""

    rank: int
    host: str
    code: int
    how: str


def failures(output: str) -> list[Failure]:
    """Return the failures in srun's output, in their order.

    A line is, for example: `srun: error: n2: tasks 2-3: Exited with exit code 1`.
    """
    found = []
    for host, tasks, how in _FAILED.findall(output):
        code = next((-n for word, n in _KILLS.items() if how.startswith(word)), None)
        if how.startswith("Out Of Memory"):
            code = -signal.SIGKILL
        if code is None:
            match = re.search(r"exit code (\d+)", how)
            code = int(match[1]) if match else CRASHED
        ranks = [part.partition("-")[0] for part in tasks.replace(" ", "").split(",")]
        found += [Failure(int(r), _first(host), code, how.strip()) for r in ranks if r]
    return found


def _first(hosts: str) -> str:
    """Return the first name of n[1-3,5], without a call of SLURM."""
    begin, _, rest = hosts.partition("[")
    return begin + re.split(r"[,\-\]]", rest)[0]


class JobStep:
    """A running srun. log: file for srun's output."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path):
        self.log = log
        self._failed: float | None = None
        self._size = 0
        with open(log, "ab") as f:
            self.process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
                stdout=f, stderr=f,
            )  # fmt: skip

    @property
    def is_over(self) -> bool:
        """True if srun has ended."""
        return self.process.poll() is not None

    @property
    def has_failed(self) -> bool:
        """True if a task failed, and the others had some seconds to report."""
        self._look()
        return self._failed is not None and time.monotonic() - self._failed > _MORE

    @property
    def failures(self) -> list[Failure]:
        """The failed tasks so far."""
        return failures(self.log.read_text(errors="replace"))

    def request_stop(self) -> None:
        """Send all ranks the signal to save and end; srun forwards it."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)

    def wait(self, is_late: Callable[[], bool], number: Callable[[], str]) -> int:
        """Wait for srun and return its code.

        is_late: True if the time of the ranks is over; number: returns JOB.STEP, to kill it.
        """
        killed: float | None = None
        while not self.is_over:
            time.sleep(0.1)
            self._look()
            overdue = self._failed is not None and time.monotonic() - self._failed > _PATIENCE
            if killed is None and (overdue or is_late()):
                killed = time.monotonic()
                Thread(target=_end_step, args=(number,), daemon=True).start()
            if killed is not None and time.monotonic() - killed > _LAST:
                self.process.kill()  # srun waits for a node that doesn't answer
        return self.process.returncode

    def _look(self) -> None:
        with suppress(OSError):
            size = self.log.stat().st_size
            if self._failed is None and size != self._size:
                self._size = size
                if self.failures:
                    self._failed = time.monotonic()


def _end_step(number: Callable[[], str]) -> None:
    """Kill the step, in a thread of its own: the controller may not answer for minutes."""
    with suppress(UserError):
        queue.end_step(number())


def srun(settings: SlurmConfig, tasks_per_node: int, *options: str) -> list[str]:
    """Return the start of a command that runs on all nodes of the job."""
    command = ["srun", f"--ntasks-per-node={tasks_per_node}", f"--nodes={settings.nodes}"]
    command.append(f"--ntasks={settings.nodes * tasks_per_node}")
    if settings.cpus_per_task:
        # Since 22.05 srun doesn't inherit this from sbatch. A single task of a node gets all CPUs.
        share = settings.ranks_per_node // tasks_per_node
        command.append(f"--cpus-per-task={settings.cpus_per_task * share}")
    if settings.container:
        own = [os.environ["FORESCALE_SCRATCH"], os.getcwd(), *settings.mounts]
        mounts = ",".join(m if ":" in m else f"{m}:{m}" for m in own)
        command += [f"--container-image={settings.container}", f"--container-mounts={mounts}"]
    return [*command, *settings.srun, *options]


def ranks(submission: Submission, run: Path, attempt: Path, words: Sequence[str]) -> list[str]:
    """Return the command that runs all ranks of the training."""
    settings = submission.settings
    log = str(attempt).replace("%", "%%") + "/rank-%t.log"
    begin = srun(settings, settings.ranks_per_node, "--kill-on-bad-exit=1", f"--output={log}")
    return [*begin, python(submission), "-P", "-m", "forescale.slurm.rank", str(run), *words]


def nodes(submission: Submission) -> list[str]:
    """Return the command that prepares and checks every node, with one task per node."""
    settings = submission.settings
    module = "forescale.slurm.node"
    look = [python(submission), "-P", "-m", module] if settings.preflight else ["true"]
    lines = [
        "set -e",
        *own_scratch(_SCRATCH),
        # Remove files of old jobs whose nodes went down.
        f"find {_SCRATCH} -maxdepth 1 -name 'job-*' -mtime +7 -exec rm -rf {{}} + 2>&- || true",
        *_unpack(submission.code, '"$FORESCALE_NODE"'),
    ]
    if place := _environment(submission):
        lines += _unpack(submission.facts["environment"], shlex.quote(place))
    lines.append(f"exec {shlex.join(look)}")
    # A node that fails must not end the reports of the others.
    return [*srun(settings, 1, "--kill-on-bad-exit=0"), "bash", "-c", "\n".join(lines)]


def own_scratch(place: str) -> list[str]:
    """Return shell lines that make a directory for this user alone, and end with code 2 if another
    user has made it: whoever owns it could replace the code that runs from it."""
    fault = "belongs to another user, or is a link; set another slurm.scratch"
    return [
        f"mkdir -p -m 700 {place}",
        f"if [ ! -O {place} ] || [ -L {place} ]; then",
        f'  echo "forescale: "{place}": {fault}." >&2',
        "  exit 2",
        "fi",
    ]


def _unpack(tar: Path | str, place: str) -> list[str]:
    """Return shell lines that unpack a tar to `place`, if it isn't there, by one rename.

    If two nodes do it at the same time, in a scratch that they share, the later one gives up.
    """
    return [
        f"if [ ! -d {place} ]; then",
        f"  mkdir -p $(dirname {place})",
        f"  new=$(mktemp -d {place}.XXXXXX)",
        f'  tar -xf {shlex.quote(str(tar))} -C "$new"',
        f'  mv -T "$new" {place} 2>/dev/null || rm -rf "$new"',
        "fi",
    ]


def _environment(submission: Submission) -> str | None:
    """Return the path of the packed environment on each node, or None."""
    tar = submission.facts.get("environment")
    return f"{os.environ['FORESCALE_SCRATCH']}/{Path(tar).stem}" if tar else None


def python(submission: Submission) -> str:
    """Return the path of Python on the nodes."""
    if place := _environment(submission):
        return f"{place}/bin/python"
    return submission.settings.python or sys.executable
