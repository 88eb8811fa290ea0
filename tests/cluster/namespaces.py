"""One machine of a test cluster: namespaces with a process 1 of their own.

Invariant: a machine ends, whole, when its process 1 does; and that ends when the pipe closes that
the process which made it holds, so that no machine outlives its maker, even one killed by SIGKILL.
(Not by the parent's death signal: that comes already when the thread ends which made it.)
"""

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

SYSTEM = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NEEDED = "slurmctld slurmd munged sbatch srun scontrol unshare nsenter ip tc mount bash"
UNSHARE = ("unshare", "--net", "--pid", "--mount", "--uts", "--ipc", "--fork", "--kill-child")

# Process 1. bash, because it reaps orphans; its read returns when its stdin closes.
INIT = """\
set -e
read -r pid _ </proc/self/stat  # still the host's /proc: our pid as the host sees it
mount -t proc proc /proc
hostname "$1"
mount --bind "$2/hosts" /etc/hosts
ip link set lo up
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs "$2/scratch"
echo "$pid"
exec >/dev/null
read -r _ || exit 0
"""


def missing() -> str | None:
    """Why no cluster can be started here, in a sentence; None if one can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "a SLURM cluster in namespaces needs Linux and root"
    absent = [name for name in NEEDED.split() if not shutil.which(name, path=SYSTEM)]
    if absent:
        return f"not installed here: {', '.join(absent)}; tests/cluster/install.sh installs them"
    links = "mount -t proc proc /proc && ip link add br0 type bridge && ip link add v0 type veth"
    command = [*UNSHARE, "sh", "-c", links]
    tried = subprocess.run(command, capture_output=True, text=True, env=plain_environment())
    if tried.returncode:
        return f"this machine doesn't let us make namespaces: {tried.stderr.strip()}"
    return None


def plain_environment(**variables: str) -> dict[str, str]:
    """What a process of a freshly started machine has, whatever the tests' own environment."""
    home = pwd.getpwuid(os.getuid()).pw_dir
    return {"PATH": SYSTEM, "HOME": home, "LANG": "C.UTF-8", **variables}


def output(
    command: list[str],
    env: Mapping[str, str],
    check: bool = True,
    input: str | None = None,
    cwd: Path | str | None = None,
    seconds: float = 120,
) -> str:
    """What the command printed on stdout; all it said is in the error if it fails."""
    feed = {"stdin": subprocess.DEVNULL} if input is None else {"input": input}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, env=env, cwd=cwd, **feed
    )
    report = f"{' '.join(command)}\nended with {done.returncode}:\n{done.stdout}{done.stderr}"
    assert not check or done.returncode == 0, report
    return done.stdout


class Machine:
    """It is on from `ready` to `off`; several may boot at once."""

    def __init__(self, name: str, root: Path):
        self.name = name
        self.pid = 0  # of its process 1, as the host sees it
        self.log = root / "log" / f"{name}.boot.log"
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [*UNSHARE, "bash", "-c", INIT, "init", name, str(root)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=plain_environment(),
                start_new_session=True,  # the terminal's Ctrl-C is for the tests alone
            )

    def ready(self) -> None:
        line = self.process.stdout.readline()
        assert line, f"{self.name} did not start: {self.log.read_text()}"
        self.pid = int(line)

    def pull_the_plug(self) -> None:
        """Let it end, without waiting for it."""
        self.process.stdin.close()

    def off(self) -> None:
        """Returns when its last process is gone: the kernel lets process 1 go only then."""
        self.pull_the_plug()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:  # someone stopped process 1
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def inside(self, *command: str) -> list[str]:
        """The command that runs `command` in all its namespaces."""
        return ["nsenter", "-t", str(self.pid), "-n", "-m", "-u", "-p", "-i", "--", *command]

    def in_network(self, *command: str) -> list[str]:
        """The same in its network alone, under its host name: files and processes are the host's.

        Its name, because SLURM's clients tell it the controller, which stands still for 10 s over
        one that it can't resolve."""
        return ["nsenter", "-t", str(self.pid), "-n", "-u", "--", *command]

    def processes(self) -> dict[int, str]:
        """Pids, as the host sees them, and command lines of all its processes but process 1;
        no zombies."""
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        pids = {}
        for path in Path("/proc").glob("[1-9]*"):
            with suppress(OSError):  # it ended meanwhile
                if os.readlink(path / "ns" / "pid") == space and int(path.name) != self.pid:
                    words = (path / "cmdline").read_bytes().replace(b"\0", b" ")
                    if words:
                        pids[int(path.name)] = words.decode(errors="replace").strip()
        return pids
