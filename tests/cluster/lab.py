"""A real SLURM cluster on this one machine, for tests: its login node and every compute node are
namespaces with a network address, a host name, a process tree, a /dev/shm and a scratch folder of
their own; files, users, the clock and the cores they share. Nodes can be cut off, crashed,
switched off and slowed down.

    with Lab(folder, nodes=2) as lab:
        job = lab.run("sbatch", "--parsable", "-N2", "job.sh").strip()
        lab.power_off("n2")
        lab.wait(lambda: lab.state(job) == "PENDING")

Invariant: nothing of it outlives `stop`, nor the process that started it. The network of the host
is never touched.
"""

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from tests.cluster import slurm_files
from tests.cluster.namespaces import SYSTEM, Machine, missing, output, plain_environment
from tests.cluster.slurm_files import LOGIN

__all__ = ["Lab", "missing"]

T = TypeVar("T")

LONGEST_ROOT = 60  # characters; a unix socket's path holds about 100
# In `scontrol show job`, the first few have the rest of their line, spaces and all.
_FIELD = re.compile(
    r"(?<!\S)(?:(JobName|Command|SubmitLine|WorkDir|\w*Comment|Std\w+)=(.*)|([^\s=]+)=(\S*))"
)


class Lab:
    """A SLURM cluster in namespaces of this machine: nodes n1, n2, ... and the login node, ctl.

    Partitions: low, the default, and high, which preempts it by REQUEUE. GPUs are null devices:
    SLURM counts them and hands them out, CUDA sees none. `memory` is in MB. `settings` are more
    lines for slurm.conf; of two settings of one name the last holds.
    """

    def __init__(
        self,
        root: Path,
        nodes: int = 4,
        cpus: int = 4,
        memory: int = 6000,
        gpus: int = 0,
        memory_of: Mapping[str, int] | None = None,
        kill_wait: int = 5,
        grace_time: int = 0,
        slurmd_timeout: int = 20,  # at 10, healthy nodes are given up beside a dead one
        settings: str = "",
    ):
        self.root = root.resolve()
        assert len(str(self.root)) <= LONGEST_ROOT, f"too long for unix sockets: {self.root}"
        self.nodes = [f"n{i}" for i in range(1, nodes + 1)]
        self.log = self.root / "log"
        self.scratch = self.root / "scratch"  # in each node a tmpfs, gone with its power
        self.environment = {
            "SLURM_CONF": str(self.root / "slurm.conf"),
            "PATH": f"{self.root / 'bin'}:{os.environ.get('PATH', SYSTEM)}",
        }
        self._settings = {
            "memory_of": {**dict.fromkeys(self.nodes, memory), **(memory_of or {})},
            **{"cpus": cpus, "gpus": gpus, "settings": settings},
            **{"kill_wait": kill_wait, "grace_time": grace_time, "slurmd_timeout": slurmd_timeout},
        }
        self._machines: dict[str, Machine] = {}
        self._starts = 0

    def __enter__(self) -> "Lab":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # ---------------------------------------------------------------- from start to stop

    def start(self) -> None:
        """It has no jobs, and all its nodes are idle. No job gets an id of an earlier start."""
        assert not self._machines, "it is running"
        try:
            slurm_files.write(self.root, first_job=1000 * self._starts + 1, **self._settings)
            self._starts += 1
            for name in (LOGIN, *self.nodes):
                self._machines[name] = Machine(name, self.root)
            for machine in self._machines.values():
                machine.ready()
            (self.root / "login.pid").write_text(f"{self._machines[LOGIN].pid}\n")
            self._sh(
                LOGIN,
                f"ip link add br0 type bridge; ip addr add {slurm_files.LOGIN_ADDRESS}/24 dev br0",
                "ip link set br0 up",
                f"cd {self.root}/run",
                f"munged --key-file=$PWD/munge.key --socket=$PWD/munge.sock "
                f"--pid-file=$PWD/munged.pid --seed-file=$PWD/munge.seed "
                f"--log-file={self.log}/munged.log",
                "slurmctld -c",
            )
            for node in self.nodes:
                self._join(node)
            self.wait(self._idle, 60, every=0.05)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Leaves no process, namespace or mount, however far `start` came. Files it leaves."""
        (self.root / "login.pid").unlink(missing_ok=True)
        machines, self._machines = self._machines, {}
        for machine in machines.values():
            machine.pull_the_plug()  # all at once
        for machine in machines.values():
            machine.off()

    def reset(self) -> None:
        """No jobs, all nodes on, whole and idle, nothing in their scratch and no process but
        slurmd, whatever was done to them: by starting all of it again, which takes less time than
        to cancel one job that doesn't listen."""
        self.stop()
        self.start()

    def _idle(self) -> bool:
        states = self.run("sinfo", "-h", "-N", "-p", "low", "-o", "%N %T", check=False, seconds=10)
        return sorted(states.splitlines()) == sorted(f"{node} idle" for node in self.nodes)

    def _machine(self, node: str) -> Machine:
        assert node in self._machines, f"{node} is off"
        return self._machines[node]

    def _sh(self, node: str, *lines: str) -> None:
        """Shell lines inside a node, all of which must succeed."""
        self.on(node, "sh", "-ec", "\n".join(lines))

    def _wire(self, script: str) -> None:
        """Shell lines in the login node's network, where the other end of all wires is."""
        output(self._machine(LOGIN).in_network("sh", "-ec", script), plain_environment())

    def _join(self, node: str) -> None:
        """Wire a machine that is on to the others, and start its slurmd."""
        pid = self._machine(node).pid
        self._wire(
            f"ip link del v-{node} 2>/dev/null || true\n"  # what is left after a power cut
            f"ip link add v-{node} type veth peer name eth0 netns {pid}\n"
            f"ip link set v-{node} master br0 up"
        )
        (self.root / "spool" / node).mkdir(exist_ok=True)
        link = f"ip addr add {slurm_files.address(node)}/24 dev eth0; ip link set eth0 up"
        self._sh(node, link, f"slurmd -N {node}")

    # ---------------------------------------------------------------- commands

    def run(
        self,
        *command: str | Path,
        check: bool = True,
        input: str | None = None,
        cwd: Path | str | None = None,
        env: Mapping[str, str] | None = None,
        seconds: float = 120,
    ) -> str:
        """What a command on the login node prints on stdout. With `check`, a failure is an
        AssertionError that holds stdout and stderr. `env` is added to the tests' environment."""
        outer = {k: v for k, v in os.environ.items() if not re.match("SLURM_|SBATCH_|SRUN_", k)}
        entered = self._machine(LOGIN).in_network(*map(str, command))
        environment = {**outer, **self.environment, **(env or {})}
        return output(entered, environment, check, input, cwd, seconds)

    def on(self, node: str, *command: str | Path, check: bool = True, seconds: float = 120) -> str:
        """The same inside a node (or ctl): with its processes, its scratch, its host name."""
        environment = plain_environment(SLURM_CONF=self.environment["SLURM_CONF"])
        entered = self._machine(node).inside(*map(str, command))
        return output(entered, environment, check, seconds=seconds)

    def files(self, node: str, path: Path) -> Path:
        """How the tests can reach a file that only the node sees, such as one in its scratch."""
        return Path(f"/proc/{self._machine(node).pid}/root") / path.relative_to("/")

    def pids(self, node: str, pattern: str) -> list[int]:
        """Processes of a node (or ctl) whose command line contains `pattern`, by the pids that
        the tests can kill them by. None where the node is off."""
        if node not in self._machines:
            return []
        processes = self._machines[node].processes()
        return sorted(pid for pid, words in processes.items() if pattern in words)

    def show(self, job: int | str) -> dict[str, str]:
        """`scontrol show job`; of a job array, the first that it lists. Empty if unknown."""
        text = self.run("scontrol", "show", "job", str(job), check=False).split("\n\n")[0]
        return {a or c: b if a else d for a, b, c, d in _FIELD.findall(text)}

    def state(self, job: int | str) -> str:
        """PENDING, RUNNING, COMPLETING, COMPLETED, FAILED, ...; '' if unknown."""
        return self.show(job).get("JobState", "")

    def node_state(self, node: str) -> str:
        """Such as IDLE, MIXED+DRAIN, DOWN+NOT_RESPONDING."""
        text = self.run("scontrol", "-o", "show", "node", node, check=False)
        state = re.search(r" State=(\S+)", text)
        return state[1] if state else ""

    def wait(self, condition: Callable[[], T], seconds: float = 60, every: float = 0.1) -> T:
        """The first true value of `what()`; fails, and shows what SLURM thinks, if none comes."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, f"not in {seconds:g} s.\n{self.report()}"
            time.sleep(every)
        return value

    def report(self) -> str:
        """Jobs, nodes and the ends of the logs."""
        parts = []
        for command in ("squeue -t all", "sinfo -N -l"):
            with suppress(AssertionError, subprocess.TimeoutExpired):
                parts.append(self.run(*command.split(), check=False, seconds=10))
        for path in sorted(self.log.glob("slurm*.log")):
            lines = path.read_text(errors="replace").splitlines()
            parts.append("\n".join([f"--- {path}", *lines[-25:]]))
        return "\n".join(parts)

    # ---------------------------------------------------------------- faults

    def cut(self, node: str) -> None:
        """Its network goes silent; its processes live on."""
        self._wire(f"ip link set v-{node} down")

    def heal(self, node: str) -> None:
        """Undo `cut`. Of a node that it gave up, the controller may take a minute to notice."""
        self._wire(f"ip link set v-{node} up")

    def rejoin(self, node: str) -> None:
        """Heal a node that the controller gave up as an admin would: no new work until the old
        steps there are gone, and registered at once."""
        self.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=rejoin")
        self.heal(node)
        self._signal_slurmd(node, "HUP")
        faulty = re.compile("DOWN|NOT_RESPONDING|COMPLETING")

        def fit() -> bool:
            return not (faulty.search(self.node_state(node)) or self.pids(node, "slurmstepd:"))

        self.wait(fit, 90, every=0.25)
        time.sleep(1.5)  # credentials are revoked per whole second: a new one must be younger
        self.resume(node)

    def crash(self, node: str) -> None:
        """Its processes die at once, and their peers are told: connections are reset."""
        self._machine(node).off()
        del self._machines[node]

    def power_off(self, node: str) -> None:
        """Its processes die at once, and nobody is told. Its scratch is lost."""
        self.cut(node)
        self.crash(node)

    def power_on(self, node: str) -> None:
        assert node not in self._machines, f"{node} is on"
        machine = Machine(node, self.root)
        self._machines[node] = machine
        machine.ready()
        self._join(node)

    def kill_slurmd(self, node: str) -> None:
        """Its steps survive."""
        self._signal_slurmd(node, "KILL")

    def start_slurmd(self, node: str) -> None:
        self.on(node, "slurmd", "-N", node)

    def _signal_slurmd(self, node: str, name: str) -> None:
        file = shlex.quote(f"{self.root}/run/slurmd.{node}.pid")
        self._sh(node, f"kill -{name} $(cat {file})")

    def slow(self, node: str, rate: str = "10mbit") -> None:
        """No more than `rate` to the node, and from it."""
        shape = f"root tbf rate {rate} burst 32kb latency 400ms"
        self._wire(f"tc qdisc replace dev v-{node} {shape}")
        self._sh(node, f"tc qdisc replace dev eth0 {shape}")

    def down(self, node: str) -> None:
        """As an admin takes it down: its jobs are requeued at once."""
        self.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")

    def resume(self, node: str) -> None:
        self.run("scontrol", "update", f"nodename={node}", "state=resume")
