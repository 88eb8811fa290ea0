"""Starts local ranks and watches them; joins where torchrun, accelerate or srun started them.

Invariant: ranks never outlive their launcher, and restart by one policy, `after`, a pure function.
A signal to the launcher reaches every rank as a wish: they save and end with code 75, or, when the
time for that is over, end without.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from forescale.errors import DONE, INTERRUPTED, USER
from forescale.resilience import outcome
from forescale.resilience.heartbeat import node_path

WISHES = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
MOST_CRASHES = 3  # in a row, without a new checkpoint
ATTEMPT = "FORESCALE_ATTEMPT"  # the directory of the attempt that a rank is started for
_GRACE = 120.0  # seconds that ranks have to save and end, unless `launch.grace` says otherwise
_LATE = 5.0  # seconds after that, until the launcher ends ranks that can't do it themselves


def joined() -> bool:
    """Whether a launcher (ours, torchrun, accelerate, srun) has started this process as a rank."""
    # The batch script itself has SLURM_PROCID too, but it is no step.
    if "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        _adopt_slurm()
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _adopt_slurm() -> None:
    """srun's names in torch's words; the batch script sets MASTER_ADDR and MASTER_PORT."""
    words = {"RANK": "PROCID", "WORLD_SIZE": "NTASKS", "LOCAL_RANK": "LOCALID"}
    for ours, theirs in words.items():
        os.environ.setdefault(ours, os.environ[f"SLURM_{theirs}"])


@dataclass
class Wish:
    """Set by a signal, polled at every step. The first is a wish, the second is a command."""

    signal: int | None = None

    def listen(self, grace: float = _GRACE) -> "Wish":
        """Begin to hear. A process that is still there `grace` seconds after a wish ends with code
        75, wherever its main thread waits."""
        # Python calls a handler only when the main thread is back from whatever it waits in; the
        # byte in this pipe is there at once.
        heard, tell = os.pipe()
        os.set_blocking(tell, False)
        signal.set_wakeup_fd(tell, warn_on_full_buffer=False)
        threading.Thread(target=_expire, args=(heard, grace), name="grace", daemon=True).start()
        for number in WISHES:
            signal.signal(number, self._hear)
        hear_wishes()
        return self

    def _hear(self, number: int, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            os._exit(128 + number)
        self.signal = number

    def __bool__(self) -> bool:
        return self.signal is not None


def _expire(heard: int, grace: float) -> None:
    while not set(os.read(heard, 64)) & set(WISHES):
        pass
    time.sleep(grace)
    rank = os.environ.get("RANK", "0")
    sentence = f"rank {rank} could not save and end in {grace:.0f} s; the checkpoint before stands."
    print(f"forescale: {sentence}", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


def hear_wishes() -> None:
    """Let in what waited: a signal that met a rank while it imports its libraries could be lost,
    for some of them catch everything."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, WISHES)


def after(code: int, crashes: int) -> Literal["end", "give up", "restart"]:
    """What to do when an attempt ended with `code`, the `crashes`-th crash in a row without a new
    checkpoint (0: there was a new one, or it is none). Serves this launcher and the batch script.
    """
    if code in (DONE, USER, INTERRUPTED):
        return "end"
    return "give up" if crashes >= MOST_CRASHES else "restart"


def start_ranks(
    command: list[str], processes: int, attempt: Path, tell: Callable, grace: float = _GRACE
) -> int:
    """Run `command` as ranks 0 to processes - 1 of a world of their own; the code of the attempt.

    Rank 0 speaks to this terminal, the others to attempt/rank-N.log. When one fails the others are
    ended: nobody waits in a collective for the dead. grace: seconds that they have after a signal.
    Afterwards signals mean what they did before. How it went stands in launch.json.
    """
    outcome.begin(attempt, command, processes)
    kills = outcome.kills_for_memory()
    environment = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        ATTEMPT: str(attempt),
    }
    threads = max(1, (len(os.sched_getaffinity(0))) // processes)
    environment.setdefault("OMP_NUM_THREADS", str(threads))
    # Threads that wait for each other spin for 16 ms before they sleep. One busy process beside us
    # then costs a factor of seven; with a shorter spin 2.8, and nothing on a quiet machine.
    environment.setdefault("GOMP_SPINCOUNT", "10000")
    ranks: list[subprocess.Popen] = []
    wish = Wish()
    deadline = [float("inf")]

    def pass_on(number: int, frame) -> None:
        again = wish.signal is not None
        wish.signal = number
        if not again:
            deadline[0] = time.monotonic() + grace + _LATE
            kill = " Once more kills them." if number == signal.SIGINT else ""
            tell(f"Stopping: the ranks save and end, in at most {grace:.0f} s.{kill}")
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(signal.SIGKILL if again and number == signal.SIGINT else number)

    def begin(rank: int) -> subprocess.Popen:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = open(attempt / f"rank-{rank}.log", "ab") if rank else None  # noqa: SIM115
        made = subprocess.Popen(
            command,
            env={**environment, **own},
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        if log:
            log.close()
        return made

    with heard(pass_on):
        # A signal waits until every rank is there to get it.
        signal.pthread_sigmask(signal.SIG_BLOCK, WISHES)
        try:
            ranks += map(begin, range(processes))
            if wish:  # it came before there was anybody to tell
                for started in ranks:
                    started.send_signal(signal.SIGTERM)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, WISHES)
        rank, code = _watch(ranks, attempt, lambda: time.monotonic() > deadline[0])
    shutil.rmtree(node_path(attempt, environment["MASTER_PORT"]), ignore_errors=True)
    # A signal that came before the rank could listen ends it there: nothing is lost by that.
    result = INTERRUPTED if wish and code not in (DONE, USER) else code
    how, more = outcome.how_it_ended(attempt, rank, result, outcome.kills_for_memory() > kills)
    outcome.end(attempt, result, how, rank)
    if result == USER and rank:
        tell(_last_words(attempt / f"rank-{rank}.log"))
    elif result not in (DONE, USER, INTERRUPTED):
        tell(f"{how}; {more}")
    return result


@contextmanager
def heard(handler: Callable) -> Iterator[None]:
    """Wishes go to `handler` meanwhile; afterwards they mean what they did before."""
    previous = {number: signal.signal(number, handler) for number in WISHES}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _watch(
    ranks: list[subprocess.Popen], attempt: Path, too_late: Callable[[], bool]
) -> tuple[int, int]:
    """Wait for all: (rank, code) of the one whose end explains that of the others; code 0 only if
    all ended well."""
    while True:
        codes = [r.poll() for r in ranks]  # of all: any() would stop at the first that runs
        failed = {i: code for i, code in enumerate(codes) if code}
        if failed or too_late():
            patient = not set(failed.values()).isdisjoint((USER, INTERRUPTED)) and not too_late()
            killed = _end(ranks, grace=5.0 if patient else 1.0)
            own = {i: r.returncode for i, r in enumerate(ranks) if r.returncode and i not in killed}
            rank = outcome.guilty(attempt, own) if own else min(killed)
            return rank, ranks[rank].returncode
        if None not in codes:
            return 0, DONE
        time.sleep(0.05)


def _end(ranks: list[subprocess.Popen], grace: float) -> set[int]:
    """Wait so long, then kill (SIGKILL ends stopped ones too); those that had to be."""
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(r.poll() is None for r in ranks):
        time.sleep(0.05)
    left = {i for i, r in enumerate(ranks) if r.poll() is None}
    for i in left:
        ranks[i].kill()
    for r in ranks:
        r.wait()
    return left


def _last_words(log: Path) -> str:
    """What a rank said last before it ended with a user's fault."""
    _, mark, said = log.read_text(errors="replace").rpartition("forescale: ")
    return (mark + said).strip() if mark else f"see {log}"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def die_with_parent() -> None:
    """In the new process: on Linux the kernel kills it when its parent dies, however that was.

    Wishes stay blocked, and so wait, until the rank listens; `hear_wishes` lets them in.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def default_processes() -> int:
    """One rank a GPU, else one; without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return max(1, len([d for d in visible.split(",") if d.strip() not in ("", "-1")]))
    return max(1, len(list(Path("/proc/driver/nvidia/gpus").glob("*"))))
