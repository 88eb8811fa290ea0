"""srun: a step of the job on all its nodes, and what srun says of the tasks that end badly.

Invariant: a step that is begun is waited for, or killed and given up; the batch script never hangs
on a node that doesn't answer.
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

_SAID = re.compile(r"srun: error: (\S+): tasks? ([0-9,\- ]+): (.*)")
_KILLS = {"Killed": 9, "Terminated": 15, "Segmentation fault": 11, "Bus error": 7, "Aborted": 6}
_SCRATCH = '"$FORESCALE_SCRATCH"'
_PATIENCE = 60.0  # seconds from a task's bad end until the others are killed from outside
_LAST = 30.0  # and from there until srun itself is
_MORE = 5.0  # seconds in which others may still say something after a bad end


@dataclass(frozen=True)
class Failure:
    """A task that ended badly: its rank, the node, its code (negative: the signal), and how, in
    srun's words."""

    rank: int
    host: str
    code: int
    how: str


def failures(said: str) -> list[Failure]:
    """What srun's messages tell, in their order: `srun: error: n2: tasks 2-3: Exited with exit
    code 1`."""
    found = []
    for host, tasks, how in _SAID.findall(said):
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
    """The first name of n[1-3,5], without asking SLURM."""
    begin, _, rest = hosts.partition("[")
    return begin + re.split(r"[,\-\]]", rest)[0]


class Step:
    """A running srun. log: where srun speaks."""

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
        return self.process.poll() is not None

    @property
    def has_failed(self) -> bool:
        """Whether a task ended badly, and the others have had some seconds to say more."""
        self._look()
        return self._failed is not None and time.monotonic() - self._failed > _MORE

    @property
    def failures(self) -> list[Failure]:
        return failures(self.log.read_text(errors="replace"))

    def tell(self) -> None:
        """Ask all ranks to save and end; srun passes the signal on."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)

    def wait(self, is_late: Callable[[], bool], number: Callable[[], str]) -> int:
        """srun's code. is_late: whether ranks have had their time; number: JOB.STEP, to kill."""
        killed: float | None = None
        while not self.is_over:
            time.sleep(0.1)
            self._look()
            overdue = self._failed is not None and time.monotonic() - self._failed > _PATIENCE
            if killed is None and (overdue or is_late()):
                killed = time.monotonic()
                Thread(target=_end_step, args=(number,), daemon=True).start()
            if killed is not None and time.monotonic() - killed > _LAST:
                self.process.kill()  # it waits for a node that doesn't answer
        return self.process.returncode

    def _look(self) -> None:
        with suppress(OSError):
            size = self.log.stat().st_size
            if self._failed is None and size != self._size:
                self._size = size
                if self.failures:
                    self._failed = time.monotonic()


def _end_step(number: Callable[[], str]) -> None:
    """In a thread of its own: a controller that is away must not hold up who waits for the step."""
    with suppress(UserError):
        queue.end_step(number())


def srun(settings: SlurmConfig, tasks_per_node: int, *options: str) -> list[str]:
    """The beginning of a command that runs on all nodes of the job."""
    command = ["srun", f"--ntasks-per-node={tasks_per_node}", f"--nodes={settings.nodes}"]
    command.append(f"--ntasks={settings.nodes * tasks_per_node}")
    if settings.cpus_per_task:
        # srun doesn't take this from sbatch any more, since 22.05. One task of a node has them all.
        share = settings.ranks_per_node // tasks_per_node
        command.append(f"--cpus-per-task={settings.cpus_per_task * share}")
    if settings.container:
        own = [os.environ["FORESCALE_SCRATCH"], os.getcwd(), *settings.mounts]
        mounts = ",".join(m if ":" in m else f"{m}:{m}" for m in own)
        command += [f"--container-image={settings.container}", f"--container-mounts={mounts}"]
    return [*command, *settings.srun, *options]


def ranks(submission: Submission, run: Path, attempt: Path, words: Sequence[str]) -> list[str]:
    """The command that is the training."""
    settings = submission.settings
    log = str(attempt).replace("%", "%%") + "/rank-%t.log"
    begin = srun(settings, settings.ranks_per_node, "--kill-on-bad-exit=1", f"--output={log}")
    return [*begin, python(submission), "-P", "-m", "forescale.slurm.rank", str(run), *words]


def nodes(submission: Submission) -> list[str]:
    """The command that prepares every node and looks at it: one task each."""
    settings = submission.settings
    module = "forescale.slurm.node"
    look = [python(submission), "-P", "-m", module] if settings.preflight else ["true"]
    lines = [
        "set -e",
        # What jobs of long ago left, because their nodes went down.
        f"find {_SCRATCH} -maxdepth 1 -name 'job-*' -mtime +7 -exec rm -rf {{}} + 2>&- || true",
        *_unpack(submission.code, '"$FORESCALE_NODE"'),
    ]
    if place := _environment(submission):
        lines += _unpack(submission.facts["environment"], shlex.quote(place))
    lines.append(f"exec {shlex.join(look)}")
    # One that fails must not take from the others what they have to say.
    return [*srun(settings, 1, "--kill-on-bad-exit=0"), "bash", "-c", "\n".join(lines)]


def _unpack(tar: Path | str, place: str) -> list[str]:
    """Once a node, as a whole: of two that do it at the same time, where the scratch is shared
    against our advice, the later one yields."""
    return [
        f"if [ ! -d {place} ]; then",
        f"  mkdir -p $(dirname {place})",
        f"  new=$(mktemp -d {place}.XXXXXX)",
        f'  tar -xf {shlex.quote(str(tar))} -C "$new"',
        f'  mv -T "$new" {place} 2>/dev/null || rm -rf "$new"',
        "fi",
    ]


def _environment(submission: Submission) -> str | None:
    """Where a packed environment stands on each node."""
    tar = submission.facts.get("environment")
    return f"{os.environ['FORESCALE_SCRATCH']}/{Path(tar).stem}" if tar else None


def python(submission: Submission) -> str:
    """The interpreter of the nodes."""
    if place := _environment(submission):
        return f"{place}/bin/python"
    return submission.settings.python or sys.executable
