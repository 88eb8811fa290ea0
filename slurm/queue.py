"""SLURM's commands: only this file runs sbatch, squeue, scontrol, sinfo and scancel.

Invariant: this file parses SLURM's output and raises its errors as UserErrors with their text.
Job ids are text: 123, or 123_4 for a task of an array.
"""

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from forescale.ground.errors import UserError

_TIMEOUT = 60.0  # seconds; a controller that is busy or fails over answers late
_GONE = re.compile(r"Invalid job id|do not exist|unable to load job", re.IGNORECASE)
_BUSY = re.compile(r"timed out|unable to contact|connection (failure|refused)", re.IGNORECASE)
# What sbatch --test-only says of nodes and of other jobs as they are now.
_NOW = re.compile(
    r"(node|configuration)( is)? not available|nodes are busy|odes required|QOS policy"
    r"|[Rr]eservation|Invalid time"  # of a reservation that begins later
)
_AWAY = 900.0  # seconds that a job waits for a controller to come back
_FORMAT = "%i|%T|%r|%M|%L|%N|%S|%V|%o"  # the fields of Job, in their order
# What a job leaves in its environment, and another that is submitted from there must not take over.
_OF_A_JOB = re.compile(
    r"(SLURM_(?!CONF$|CLUSTERS$|JWT$)|SLURMD_|PMIX?_|FORESCALE_(ATTEMPT|NODE|SCRATCH)$"
    r"|SBATCH_EXPORT$"  # a site's default, which would hold against the script's --export
    r"|(LOCAL_|GROUP_)?(RANK|WORLD_SIZE)$|MASTER_(ADDR|PORT)$)"
)


_AGAIN = "forescale stop, and submit the run again with"
# By SLURM's reasons (squeue's manual), the first that fits: what to do.
_REMEDIES = (
    ("WallDuration|MinutesPerJob|TimeLimit$", f"{_AGAIN} a shorter slurm.time"),
    ("Minutes", "the account's budget is used up: ask for more, or use another slurm.account"),
    ("Max.*PerJob|PartitionNodeLimit", f"{_AGAIN} fewer nodes, GPUs or CPUs, or less memory"),
    ("QOSMin", f"{_AGAIN} more of what the reason names"),
    ("(QOS|Assoc)(Grp|Max)|(Job|Resource)Limit", "it starts when other jobs of yours have ended"),
    ("Invalid(Account|QOS)|NotAllowed", f"{_AGAIN} another slurm.account, slurm.qos or partition"),
    ("Partition(Down|Inactive)", "the partition starts no jobs now: wait, or use another one"),
    ("DependencyNeverSatisfied", f"what it waits for has failed: {_AGAIN}out slurm.after"),
    ("Dependency", "it starts when the jobs that it waits for have ended"),
    ("JobHeldUser", "scontrol release JOB"),
    ("JobHeldAdmin|[Ll]aunch|MaxRequeue", "it is held: ask the operators, or scontrol release JOB"),
    ("BeginTime", "it starts by itself after the pause between two starts"),
    ("JobArrayTaskLimit", "it starts when fewer than slurm.at_once tasks run"),
    ("Reservation", "it starts with slurm.reservation: scontrol show reservation"),
    ("Licenses", "it starts when licences are free: scontrol show licenses"),
    ("BadConstraints", f"no node has all of it: {_AGAIN} less, or another slurm.constraint"),
    ("NodeNotAvail|NodeDown|DOWN|DRAINED", "nodes that it needs are down or reserved: sinfo -R"),
    ("^(Priority|Resources)$", "it starts in its turn, and sooner with a shorter slurm.time"),
)


@dataclass(frozen=True)
class Job:
    """A job in the queue. reason: why it waits; elapsed, left: times as squeue prints them; start:
    when it began or is expected to begin; submitted: when SLURM took it, or requeued it, both in
    seconds since the epoch, 0 if unknown; script: that sbatch got.
    """

    id: str
    state: str
    reason: str
    elapsed: str
    left: str
    nodes: str
    start: float = 0.0
    submitted: float = 0.0
    script: str = ""

    @classmethod
    def of(cls, line: str) -> "Job":
        """Return the job that a line of squeue describes."""
        id, state, reason, elapsed, left, nodes, start, submitted, script = line.split("|", 8)
        times = epoch(start), epoch(submitted)
        return cls(id, state, reason, elapsed, left, nodes, *times, script)

    @property
    def is_waiting(self) -> bool:
        return self.state in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD")

    @property
    def remedy(self) -> str:
        """What a user can do about the reason why it waits; empty if that isn't known."""
        sentence = next((text for form, text in _REMEDIES if re.search(form, self.reason)), "")
        return sentence.replace("JOB", self.id)


def is_here() -> bool:
    """True if this machine has sbatch."""
    return shutil.which("sbatch") is not None


def must_be_here() -> None:
    """Raise UserError if this machine has no sbatch."""
    if not is_here():
        _once(["sbatch", "--version"])


def own_job() -> str:
    """Return the id of the job that this process is part of. Of a task of an array it is 40_2: its
    SLURM_JOB_ID is another number, and for one of the tasks it is 40, the number of the whole
    array: a command about it would be one about all tasks."""
    array, task = (os.environ.get(f"SLURM_ARRAY_{name}_ID") for name in ("JOB", "TASK"))
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def submit(script: Path) -> str:
    """Submit a script and return the id of the job. Raises UserError if SLURM refuses. Within
    another job (salloc) sbatch gets none of its variables: as defaults of options they would
    contradict the script, and the new job would start with them."""
    output = _once(["sbatch", "--parsable", str(script)], environment=_outside_of_jobs())
    return output.strip().partition(";")[0]


def expect_accepted(script: str) -> None:
    """Raise UserError if SLURM would refuse a script at any hour. Its test counts only nodes that
    are up: what it refuses for lack of nodes may wait for others, and is no error here. (With all
    nodes drained, sbatch takes a job, and sbatch --test-only refuses it.)"""
    try:
        _once(["sbatch", "--test-only"], environment=_outside_of_jobs(), text=script)
    except UserError as e:
        if not (_BUSY.search(e.problem) or _NOW.search(e.problem)):
            problem = re.sub("SLURM says: .*allocation failure: ", "SLURM says: ", e.problem)
            raise UserError(e.where, problem, e.todo) from None


def starts_now(script: Path, nodes: int, exclude: Sequence[str] = ()) -> bool:
    """True if a job of this script on so many nodes would start at once, on nodes that no job of a
    higher priority waits for, and without preempting one. Raises UserError if SLURM doesn't answer.
    """
    # The jobs of slurm.after are over, and perhaps forgotten.
    words = ["--dependency=", f"--nodes={nodes}"]
    words += [f"--exclude={','.join(exclude)}"] if exclude else []
    environment = {**_outside_of_jobs(), "LC_ALL": "C", "SLURM_TIME_FORMAT": "%s"}
    try:
        text = _once(["sbatch", "--test-only", *words, str(script)], environment=environment)
    except UserError as e:
        if _BUSY.search(e.problem):
            raise
        return False  # so many nodes with what it needs are not there, or not allowed
    match = re.search(r" to start at ([0-9]+) ", text)
    return bool(match and int(match[1]) < time.time() + 60 and "Preempts" not in text)


def _outside_of_jobs() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not _OF_A_JOB.match(name)}


def _setting(name: str) -> str | None:
    """Return a setting of the cluster; None if the controller doesn't say."""
    settings = _run(["scontrol", "show", "config"])
    match = re.search(rf"^{name} *= *(\S+)", settings, re.MULTILINE)
    return match[1] if match else None


def cluster() -> str | None:
    """Return the name of the cluster whose controller answers here; None if it doesn't say."""
    return _setting("ClusterName")


def has_submit_plugin() -> bool:
    """True if a plugin of the site may choose a partition for jobs that name none."""
    plugins = (_setting(f"{name}Plugins") for name in ("JobSubmit", "CliFilter"))
    return any(plugin not in (None, "(null)") for plugin in plugins)


def largest_array() -> int | None:
    """Return how many tasks an array may have; None if SLURM doesn't say."""
    with suppress(UserError):
        return int(_setting("MaxArraySize") or 0) or None
    return None


def partitions() -> list[dict[str, str]]:
    """Return scontrol's fields of all partitions, also of those that are hidden from others."""
    lines = _run(["scontrol", "--all", "--oneliner", "show", "partition"]).splitlines()
    fields = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines]
    return [partition for partition in fields if "PartitionName" in partition]


def limits_of_qos() -> dict[str, dict[str, str]]:
    """Return the flags and limits of each QOS, by SLURM's names; none where they don't hold, or
    where there is no database of accounts."""
    names = ["Name", "Flags", "MaxWall", "MaxTRES"]
    with suppress(UserError):
        if "limits" in (_setting("AccountingStorageEnforce") or "").split(","):
            command = ["sacctmgr", "--noheader", "--parsable2", "show", "qos"]
            lines = _run([*command, f"format={','.join(names)}"]).splitlines()
            rows = [dict(zip(names, line.split("|"), strict=False)) for line in lines]
            return {row["Name"]: row for row in rows}
    return {}


def jobs(ids: Iterable[str]) -> list[Job]:
    """Return those of the jobs that are still in the queue."""
    command = ["squeue", "--noheader", "--array", f"--format={_FORMAT}", f"--jobs={','.join(ids)}"]
    try:
        lines = _run(command).splitlines()
    except UserError as e:
        if _GONE.search(e.problem):  # a single id that the controller no longer knows
            return []
        raise
    return [Job.of(line) for line in lines if line]


def show(job: str) -> dict[str, str]:
    """Return scontrol's facts about a job, its times in seconds since the epoch; empty if it no
    longer knows the job."""
    try:
        text = _run(["scontrol", "--oneliner", "show", "job", job])
    except UserError as e:
        if _GONE.search(e.problem):
            return {}
        raise
    return dict(re.findall(r"(\S+?)=(\S*)", text))


def owner_and_script(job: str) -> tuple[int | None, Path | None]:
    """Return the user id of a job's owner and the path of the script that was submitted, as SLURM
    knows them; None if it doesn't."""
    text = _run(["scontrol", "--oneliner", "show", "job", job])
    owner = re.search(r"\bUserId=[^ ]*\((\d+)\)", text)
    script = re.search(r"\bCommand=(.*?)(?= [A-Z]\w*=|$)", text, re.MULTILINE)
    return int(owner[1]) if owner else None, Path(script[1]) if script else None


def eligible(job: str) -> float | None:
    """Return when the job became eligible to start, in seconds since the epoch; None if unknown."""
    with suppress(UserError):
        return epoch(show(job).get("EligibleTime", "")) or None
    return None


def epoch(text: str) -> float:
    """Return a time that SLURM printed, in seconds since the epoch; 0 for Unknown, N/A or none."""
    return float(text) if text.isdecimal() else 0.0


def requeue(job: str, exclude: Sequence[str] = (), pause: float = 0.0) -> None:
    """Requeue a running job, without the nodes `exclude`, to start in `pause` seconds or later. If
    the caller is part of the job, SLURM ends it, too."""
    _run(["scontrol", "requeue", job], deaf=True)
    changes = [f"ExcNodeList={','.join(exclude)}"] if exclude else []
    changes += [f"StartTime=now+{pause:.0f}"] if pause else []
    if changes:  # allowed only while the job waits
        _run(["scontrol", "update", f"JobId={job}", *changes], deaf=True)


def cancel(job: str) -> None:
    _run(["scancel", job])


def signal_batch(job: str, name: str) -> None:
    """Send the signal `name` to the batch script of a job, not to its ranks."""
    _run(["scancel", "--batch", f"--signal={name}", job])


def end_step(step: str) -> None:
    """Kill the processes of a step, JOB.STEP, on all reachable nodes."""
    _run(["scancel", "--signal=KILL", step])


def newest_step(job: str, besides: str) -> str | None:
    """Return JOB.STEP of the newest step of a job, except those named `besides`; None if it has no
    step."""
    lines = _run(["squeue", "--noheader", "--steps", f"--jobs={job}", "--format=%i %j"])
    fields = [line.split(maxsplit=1) for line in lines.splitlines()]
    others = [words[0].rpartition(".")[2] for words in fields if words[1:] != [besides]]
    numbers = [int(n) for n in others if n.isdigit()]
    return f"{job}.{max(numbers)}" if numbers else None


def lost(job: str, nodes: Sequence[str]) -> list[str]:
    """Return those of a job's nodes that it no longer has (see --no-kill of sbatch), or that are
    unusable."""
    node_list = show(job).get("NodeList", "")
    left = hosts(node_list) if re.match(r"\w", node_list) else nodes
    states = _node_states(f"--nodes={','.join(nodes)}")
    # A * at the end means: it doesn't answer.
    down = {n for n, state in states.items() if state.endswith("*") or state.startswith("down")}
    return [node for node in nodes if node not in left or node in down]


def unreachable(nodes: Sequence[str]) -> list[str]:
    """Return the nodes of which nothing answers at slurmd's port within some seconds: switched off,
    or cut off. (Where slurmd alone is gone, the node refuses the connection.)"""
    text = _run(["scontrol", "--oneliner", "show", "node", ",".join(nodes)])
    addresses = dict(re.findall(r"NodeName=(\S+) .*?NodeAddr=(\S+)", text))
    port = int((_setting("SlurmdPort") or "6818").partition("-")[0])

    def answers(node: str) -> bool:
        try:
            socket.create_connection((addresses.get(node, node), port), timeout=3.0).close()
        except TimeoutError:
            return False
        except OSError as e:  # of another kind: not for this node to judge
            return e.errno not in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)
        return True

    with ThreadPoolExecutor(64) as pool:
        return [node for node, ok in zip(nodes, pool.map(answers, nodes), strict=True) if not ok]


def keep_nodes(job: str, nodes: Sequence[str]) -> None:
    """Give all other nodes of a running job back to SLURM, which ends the steps on them at once."""
    # scontrol writes scripts for users into its working directory.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        change = ["scontrol", "update", f"JobId={job}", f"NodeList={','.join(nodes)}"]
        _run(["env", f"--chdir={place}", *change])


def _node_states(which: str) -> dict[str, str]:
    lines = _run(["sinfo", "--noheader", "--Node", which, "--format=%N %T"]).splitlines()
    return dict(line.split(None, 1) for line in lines if " " in line)


def num_usable(partition: str, without: Sequence[str]) -> int:
    """Return the number of a partition's nodes that work or may work soon, except `without`."""
    states = _node_states(f"--partition={partition}")
    well = {n for n, state in states.items() if not re.search(r"\*$|^(down|drain|fail)", state)}
    return len(well - set(without))


def num_idle(partition: str, without: Sequence[str]) -> int:
    """Return the number of a partition's nodes, except `without`, that no job runs on, and that
    SLURM plans for none (those are "planned")."""
    states = _node_states(f"--partition={partition}")
    return sum(state == "idle" for node, state in states.items() if node not in without)


def cpus_of_nodes(partition: str | None) -> int | None:
    """Return the CPUs of the smallest node of a partition, by default the cluster's; None if SLURM
    names none."""
    command = ["sinfo", "--noheader", "--format=%P %c"]
    lines = _run([*command, f"--partition={partition}"] if partition else command).splitlines()
    pairs = [line.split() for line in lines if len(line.split()) == 2]
    counts = [cpus.rstrip("+") for name, cpus in pairs if partition or name.endswith("*")]
    return min((int(count) for count in counts if count.isdecimal()), default=None)


def hosts(nodelist: str) -> list[str]:
    """Return the names that SLURM's short form, n[1-3], stands for."""
    if not re.search(r"[\[,]", nodelist):
        return [nodelist]
    return _run(["scontrol", "show", "hostnames", nodelist]).split()


def _run(command: list[str], deaf: bool = False) -> str:
    """Run a command and return its output. Inside a job, wait for a controller that is away. deaf:
    ignore SIGTERM, which SLURM sends to every process of a job that it ends."""
    end = time.monotonic() + (_AWAY if "SLURM_JOB_ID" in os.environ else 0.0)
    while True:
        try:
            return _once(command, deaf)
        except UserError as e:
            if not _BUSY.search(e.problem) or time.monotonic() > end:
                raise
            time.sleep(5.0)


def _once(
    command: list[str],
    deaf: bool = False,
    environment: Mapping[str, str] | None = None,
    text: str | None = None,
) -> str:
    # Without these, names of months come in the reader's language, and times in the reader's time
    # zone: of another reader, or in the hour that comes twice a year, they are other times.
    plain = {**os.environ, "LC_ALL": "C", "SLURM_TIME_FORMAT": "%s"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            input=text,
            timeout=_TIMEOUT,
            env=environment or plain,
            preexec_fn=(lambda: signal.signal(signal.SIGTERM, signal.SIG_IGN)) if deaf else None,
        )
    except FileNotFoundError:
        problem = "is not on this machine's PATH"
        todo = "run this on a login node of a SLURM cluster, or train here with forescale train"
        raise UserError(command[0], problem, todo) from None
    except subprocess.TimeoutExpired:
        problem = f"SLURM did not answer in {_TIMEOUT:.0f} s (timed out)"
        raise UserError(command[0], problem, "check sinfo, and try again") from None
    if done.returncode:
        message = " ".join(done.stderr.split()) or f"ended with code {done.returncode}"
        message = message.removeprefix(f"{command[0]}: ").removeprefix("error: ")
        todo = "correct the setting it names; see sinfo"
        raise UserError(command[0], f"SLURM says: {message}", todo)
    # Only --test-only prints its answer as if it were an error.
    return done.stderr if "--test-only" in command else done.stdout
