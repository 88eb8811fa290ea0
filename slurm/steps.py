"""Steps of a job: run a command on nodes of it with srun, and read which tasks failed.

Invariant: a step is waited for, or killed and abandoned. The supervisor never hangs on a node that
doesn't answer.
"""

import os
import re
import shlex
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread

from forescale.ground.errors import CRASHED, UserError
from forescale.slurm import containers, queue
from forescale.slurm.config import MANY_NODES, SlurmConfig
from forescale.slurm.submission import Submission

STANDBY = "standby"  # the name of a step, and of its log
# Tasks get the environment of the batch script. Without that srun reads SLURM_EXPORT_ENV, which is
# NONE after sbatch --export=NONE (at some sites by default, as SBATCH_EXPORT): tasks have no PATH.
_SRUN = ("srun", "--export=ALL")
_FAILED = re.compile(r"srun: error: (\S+): tasks? ([0-9,\- ]+): (.*)")
_LOST = re.compile(r"srun: error: Node failure on (\S+)")
# srun's lines that don't say that there is a step, and those of them that say why there is none.
_OF_SRUN = re.compile(r'srun: (?!.*(StepId=|step aborted|: tasks? [0-9]))|Try "srun')
_ERROR = re.compile(r"srun: (?:error: |fatal: )?(?!Job [0-9]+ step creation|warning: )(.+)")
_KILLS = {"Killed": 9, "Terminated": 15, "Segmentation fault": 11, "Bus error": 7, "Aborted": 6}
_SCRATCH = '"$FORESCALE_SCRATCH"'
_NOW, _ENVIRONMENT = "forescale-now", "environment"
_PATIENCE = 60.0  # seconds from the first failure until the other tasks are killed
_LINES = 10_000  # the last ones of srun that are kept
_LAST = 30.0  # seconds from then until srun itself is killed
_REPORT_SECONDS = 5.0  # seconds after a failure in which other tasks may still report
# Set if slurm.options has --cpus-per-gpu, which excludes --cpus-per-task, or another count of CPUs.
_OWN_COUNT = {"SLURM_CPUS_PER_GPU", "SLURM_THREADS_PER_CORE", "SLURM_HINT"}
_SIBLINGS = Path("/sys/devices/system/cpu/cpu0/topology/thread_siblings_list")


@dataclass(frozen=True)
class Failure:
    """A failed task. code: negative for a signal; how: srun's text."""

    rank: int
    host: str
    code: int
    how: str


def failures(output: str) -> list[Failure]:
    """Return the failures in srun's output, in their order, such as those of the line
    `srun: error: n2: tasks 2-3: Exited with exit code 1`. What follows the loss of a node is left
    out: then SLURM kills the tasks of all nodes."""
    failures = []
    for host, tasks, how in _FAILED.findall(_LOST.split(output, maxsplit=1)[0]):
        begin, _, rest = host.partition("[")  # of n[1-3,5] the first name
        host = begin + re.split(r"[,\-\]]", rest)[0]
        code = next((-n for word, n in _KILLS.items() if how.startswith(word)), None)
        if how.startswith("Out Of Memory"):
            code = -signal.SIGKILL
        if code is None:
            match = re.search(r"exit code (\d+)", how)
            code = int(match[1]) if match else CRASHED
        ranks = [part.partition("-")[0] for part in tasks.replace(" ", "").split(",")]
        failures += [Failure(int(r), host, code, how.strip()) for r in ranks if r]
    return failures


def lost_node(output: str) -> str | None:
    """Return the node that SLURM lost during the step, by srun's output; None if it lost none."""
    match = _LOST.search(output)
    return match[1] if match else None


def refusal(output: str) -> str | None:
    """Return why srun started no task, by its output, such as "Unable to create step for job 7:
    Memory required by task is not available"; None if it started some, or doesn't say why."""
    lines = output.splitlines()
    if not all(map(_OF_SRUN.match, lines)) or lost_node(output):
        return None
    return next((match[1] for line in lines if (match := _ERROR.match(line))), None)


class JobStep:
    """A running srun. log: file for srun's output, which is kept here too: what it says of failed
    tasks must be known even where a full disk is why they fail, and the file can't be written."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], log: Path):
        self.log = log
        self._failed: float | None = None
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._num_read = self._num_seen = 0
        self.process = subprocess.Popen(
            command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        self._reader = Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.append(line)
            self._num_read += 1
            with suppress(OSError), open(self.log, "a") as f:
                f.write(line)

    @property
    def is_over(self) -> bool:
        return self.process.poll() is not None

    @property
    def has_ended_tasks(self) -> bool:
        """True if srun says that a task failed, or that a node is lost."""
        self._look()
        return self._failed is not None

    @property
    def has_failed(self) -> bool:
        """True if a task failed, and the others had some seconds to report."""
        self._look()
        return self._failed is not None and time.monotonic() - self._failed > _REPORT_SECONDS

    @property
    def failures(self) -> list[Failure]:
        return failures(self._output)

    @property
    def lost_node(self) -> str | None:
        return lost_node(self._output)

    @property
    def refusal(self) -> str | None:
        """Why srun has ended without starting a task; None if it started some, was killed, or
        doesn't say why."""
        return refusal(self._output) if (self.process.poll() or 0) > 0 else None

    @property
    def _output(self) -> str:
        return "".join(list(self._lines))

    def has_not_begun(self, job: str) -> bool:
        """True if srun still waits for SLURM to create the step. Asks the controller: False if it
        doesn't answer."""
        with suppress(UserError):
            return not self.is_over and queue.newest_step(job, besides=STANDBY) is None
        return False

    def phase_of(self, host: str) -> str:
        """What a host was doing last, by what the command of `nodes` prints."""
        phases = re.findall(rf"^{_NOW} (\S+) (.*)$", self._output, re.MULTILINE)
        return dict(phases).get(host, "starting the step, or its container")

    def request_stop(self) -> None:
        """Send all ranks the signal to save and end; srun forwards it."""
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGUSR1)

    def wait(self, is_late: Callable[[], bool], job: str) -> int:
        """Wait for srun and return its code. is_late: True if the time of the ranks is over; job:
        whose newest step this is, but for the standby. Where SLURM knows no such step, srun alone
        is killed, never the whole job. If another process killed srun, its tasks would go on
        without it, and the next step would wait for them: they are killed."""

        def end_step(seconds: float = 0.0) -> None:
            end = time.monotonic() + seconds
            with suppress(UserError):
                while step := queue.newest_step(job, besides=STANDBY):
                    queue.end_step(step)
                    if time.monotonic() >= end:
                        return
                    time.sleep(0.5)

        killed: float | None = None
        while not self.is_over:
            time.sleep(0.1)
            self._look()
            overdue = self._failed is not None and time.monotonic() - self._failed > _PATIENCE
            if killed is None and (overdue or is_late()):
                killed = time.monotonic()
                # In a thread: the controller may not answer for minutes.
                Thread(target=end_step, daemon=True).start()
            if killed is not None and time.monotonic() - killed > _LAST:
                self.process.kill()  # srun waits for a node that doesn't answer
        if self.process.returncode < 0 and killed is None:
            end_step(_LAST)
        self._reader.join(_LAST)  # a child of srun may hold the pipe open
        return self.process.returncode

    def _look(self) -> None:
        if self._failed is None and self._num_read != self._num_seen:
            self._num_seen = self._num_read
            if failures(self._output) or self.lost_node:
                self._failed = time.monotonic()


def srun(
    settings: SlurmConfig, tasks_per_node: int, *options: str, hosts: Sequence[str] = ()
) -> list[str]:
    """Return the start of a command that runs on these hosts of the job; by default, on its one."""
    number = len(hosts) or 1
    command = [*_SRUN, f"--ntasks-per-node={tasks_per_node}", f"--nodes={number}"]
    command += [f"--ntasks={number * tasks_per_node}", *([_on(hosts)] if hosts else [])]
    if settings.cpus_per_task or cpus_per_rank(settings) > 1:
        # Since 22.05 srun doesn't inherit this from sbatch. A single task of a node gets all CPUs.
        share = settings.ranks_per_node // tasks_per_node
        command.append(f"--cpus-per-task={cpus_per_rank(settings) * share}")
    if settings.gpus_per_task:  # without it a step takes over the job's one GPU for each task
        command.append(f"--gpus-per-node={settings.gpus}")
    return [*command, *settings.srun, *options]


def cpus_per_rank(settings: SlurmConfig, threads: int | None = None) -> int:
    """Return the CPUs of a rank: slurm.cpus_per_task, or an equal share of what SLURM gave the job;
    1 where slurm.options decide. threads: CPUs of a core; None: as on this node. A share is whole
    cores, since SLURM gives no core to two tasks: with half of one each, a step might not fit."""
    if settings.cpus_per_task:
        return settings.cpus_per_task
    if not _OWN_COUNT.isdisjoint(os.environ):
        return 1
    cpus = os.environ.get("SLURM_JOB_CPUS_PER_NODE", "")  # such as 72(x2),36
    least = min((int(n) for n in re.findall(r"(?:^|,)([0-9]+)", cpus)), default=1)
    if threads is None:
        threads = 1
        with suppress(OSError):
            text = _SIBLINGS.read_text()  # such as 0,64 or 0-1
            ends = [[int(n) for n in part.split("-")] for part in text.split(",")]
            threads = sum(end[-1] - end[0] + 1 for end in ends)
    return max(1, least // settings.ranks_per_node // threads * threads)


def ranks(
    submission: Submission, hosts: Sequence[str], run: Path, attempt: Path, words: Sequence[str]
) -> list[str]:
    """Return the command that runs all ranks of the training on these hosts of the job.

    Each rank gets cores of its own, in the order of the GPUs. srun's manual of --cpu-bind=cores:
    "If the number of tasks differs from the number of allocated cores this can result in
    sub-optimal binding." A rank with one CPU on an exclusive node would be held on one core, and
    the others be idle: it isn't bound. Of --distribution, * leaves tasks on their nodes, and block
    fills one socket after the other: by default neighbours are on different sockets, while most
    nodes have the first half of their GPUs on the first one. Nothing binds GPUs: a rank takes that
    of its local rank, and NCCL connects those that a rank sees.
    """
    settings = submission.settings
    options = ["--kill-on-bad-exit=1", f"--output={_escaped(attempt)}/node-%n.log", "--label"]
    options += ["--open-mode=append", *containers.options(submission)]  # as templates append, too
    kind = settings.cpu_bind or ("cores" if cpus_per_rank(settings) > 1 else None)
    binding = [f"--cpu-bind={kind}", "--distribution=*:block"] if kind else []
    bound = replace(settings, srun=[*binding, *settings.srun])  # of two the last holds
    begin = srun(bound, settings.ranks_per_node, *options, hosts=hosts)
    rank = [*python(submission), "-P", "-m", "forescale.slurm.rank", str(run), *words]
    return [*begin, *containers.prefix(submission), *rank]


def nodes(submission: Submission, hosts: Sequence[str], job_hosts: Sequence[str] = ()) -> list[str]:
    """Return the command that prepares and checks these hosts of the job, with a task on each.
    job_hosts: all of the job."""
    settings = submission.settings
    module = "forescale.slurm.preflight.node"
    look = [*python(submission), "-P", "-m", module] if settings.preflight else ["true"]
    look = [*containers.prefix(submission), *look]
    lines = [
        "set -e",
        f'now() {{ echo "{_NOW} ${{SLURMD_NODENAME:-?}} $*"; }}',
        "now making its scratch directory",
        *own_scratch(_SCRATCH),
        # What no job has used for long: code of jobs whose nodes went down, and old environments.
        *(
            f"find {_SCRATCH} -maxdepth 1 -name '{name}-*' -mtime +{days} -exec rm -rf {{}} + "
            "2>&- || true"
            for name, days in (("job", 7), (_ENVIRONMENT, 30))
        ),
        "now unpacking the code",
        *_unpack(submission.code, '"$FORESCALE_NODE"'),
    ]
    if place := _environment(submission):
        copy = _copy_of(place)
        lines.append("now unpacking the Python environment")
        lines += _unpack(submission.facts["environment"], shlex.quote(place), copy)
        lines += [f"rm -f {shlex.quote(copy)}", f"touch {shlex.quote(place)}"]
    lines += ["now starting Python", f"exec {shlex.join(look)}"]
    # A node that fails must not end the reports of the others.
    option = "--kill-on-bad-exit=0"
    inside = srun(settings, 1, option, *containers.options(submission), hosts=hosts)
    host = srun(replace(settings, srun=_outside(settings)), 1, option, hosts=hosts)
    command = containers.prepared(
        submission,
        host=[*host, "bash", "-c", "\n".join(["set -e", *own_scratch(_SCRATCH)])],
        inside=[*inside, "bash", "-c", "\n".join(lines)],
    )
    if place is None or len(job_hosts) <= MANY_NODES:
        return command
    lines = [*_broadcast(submission, job_hosts, place), f"exec {shlex.join(command)}"]
    return ["bash", "-c", "\n".join(lines)]


def _broadcast(submission: Submission, hosts: Sequence[str], place: str) -> list[str]:
    """Return shell lines that copy the packed environment to the disks of all nodes of the job, if
    one lacks it. SLURM hands it on from node to node, so that the shared storage reads it once.
    Where that fails, such as beside a dead node, each node reads it there."""
    tar, copy = map(shlex.quote, (submission.facts["environment"], _copy_of(place)))
    look = [*own_scratch(_SCRATCH), f"[ -d {shlex.quote(place)} ] || echo lacking"]
    step = srun(submission.settings, 1, hosts=hosts)
    query = shlex.join([*step, "bash", "-c", "\n".join(["set -e", *look])])
    seconds = submission.settings.start_time.seconds or 0.0
    begin = f"{_NOW} $node waiting for the copy of the Python environment"
    return [
        f'for node in {" ".join(hosts)}; do echo "{begin}"; done',
        f"if timeout -k 5 {seconds / 5:.0f} {query} 2>/dev/null | grep -q lacking; then",
        f"  timeout -k 5 {seconds / 2:.0f} sbcast --force {tar} {copy} ||",
        '    echo "forescale: sbcast failed: each node reads the Python environment itself." >&2',
        "fi",
    ]


def command(
    submission: Submission, hosts: Sequence[str], words: Sequence[str], *srun_options: str
) -> list[str]:
    """Return the command that runs `words` once on each host, from the code of the submission. If
    one fails, SLURM ends the others, which may wait for it. srun_options: further ones."""
    lines = [
        "set -e",
        *own_scratch(_SCRATCH),
        *_unpack(submission.code, '"$FORESCALE_NODE"'),
        f"exec {shlex.join(words)}",
    ]
    options = ["--kill-on-bad-exit=1", *srun_options, *containers.options(submission)]
    start = srun(submission.settings, 1, *options, hosts=hosts)
    return [*start, "bash", "-c", "\n".join(lines)]


def standby(submission: Submission, host: str, words: Sequence[str]) -> list[str]:
    """Return the command that runs standby.py on one host, beside whatever runs there."""
    log = f"{_escaped(submission.path)}/{STANDBY}.log"
    node = '"$FORESCALE_NODE"'
    module = ["-P", "-m", "forescale.slurm.standby", *words]
    lines = [
        "set -e",
        *own_scratch(_SCRATCH),
        *_unpack(submission.code, node),
        f"exec {shlex.join([*containers.python_of_host(submission.settings), *module])}",
    ]
    return [
        *(*_SRUN, f"--job-name={STANDBY}", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1"),
        *("--overlap", "--mem=0"),  # it takes no CPU, memory or GPU away from other steps
        *_outside(submission.settings),
        # slurmstepd writes the log: srun, on the first node, may be gone.
        *(_on([host]), f"--output={log}", "--open-mode=append"),
        *("bash", "-c", "\n".join(lines)),
    ]


def _on(hosts: Sequence[str]) -> str:
    return f"--nodelist={','.join(hosts)}"


def _escaped(path: Path) -> str:
    """Return a path for srun's --output, where % begins a field."""
    return str(path).replace("%", "%%")


def _outside(settings: SlurmConfig) -> list[str]:
    """Return the user's options of srun for a command outside of the container."""
    return [option for option in settings.srun if "container" not in option]


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


def _unpack(tar: Path | str, place: str, copy: str | None = None) -> list[str]:
    """Return shell lines that unpack a tar to `place`, if it isn't there, by one rename. If two
    nodes do it at the same time, in a scratch that they share, the later one gives up. copy: of the
    tar on the node's disk, which may be missing, or cut off."""
    tar, first = shlex.quote(str(tar)), ""
    if copy:  # tar itself doesn't notice an end between two files
        copy = shlex.quote(copy)
        size = "stat -Lc %s"
        first = f'[ "$({size} {copy} 2>&-)" = "$({size} {tar})" ] && tar -xf {copy} -C "$new" || '
    return [
        f"if [ ! -d {place} ]; then",
        f"  mkdir -p $(dirname {place})",
        f"  new=$(mktemp -d {place}.XXXXXX)",
        f'  {first}tar -xf {tar} -C "$new"',
        f'  mv -T "$new" {place} 2>/dev/null || rm -rf "$new"',
        "fi",
    ]


def _environment(submission: Submission) -> str | None:
    """Return the path of the packed environment on each node, or None."""
    tar = submission.facts.get("environment")
    return f"{os.environ['FORESCALE_SCRATCH']}/{_ENVIRONMENT}-{Path(tar).stem}" if tar else None


def _copy_of(place: str) -> str:
    """Return the path of a job's copy of the packed environment, on each node. Another job would
    write over a copy of the same name while this one unpacks it."""
    return f"{place}.{os.environ['SLURM_JOB_ID']}.tar"


def python(submission: Submission) -> list[str]:
    """Return the command of Python for the ranks."""
    place = _environment(submission)
    return [f"{place}/bin/python"] if place else containers.python(submission.settings)
