"""Starts local ranks, waits for them and restarts them; and how a rank handles stop signals.

Invariant: ranks never outlive their launcher, and are restarted by one policy, the pure function
`next_action`. A stop signal to the launcher reaches every rank as a stop request: the rank saves
and exits with code 75, or exits without saving when its time is over.
"""

import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from forescale.ground.errors import DONE, GAVE_UP, INTERRUPTED, USER, UserError
from forescale.ground.processes import die_with_parent
from forescale.ground.rendezvous import LOOPBACK, free_port
from forescale.resilience import outcome
from forescale.resilience.elastic import LocalSizes, gpus
from forescale.resilience.heartbeat import node_path
from forescale.resilience.output import close, copied_output
from forescale.resilience.template import ForkedRank, Template
from forescale.run.directory import Run

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
MAX_CRASHES = 3  # in a row without a new checkpoint
ATTEMPT = "FORESCALE_ATTEMPT"  # environment variable: the attempt's directory, set for every rank
_GRACE = 120.0  # default of launch.grace: seconds that ranks have to save and exit
_LATE = 5.0  # seconds after the grace until the launcher kills ranks that didn't exit themselves


def started_as_rank() -> bool:
    """Return True if a launcher (ours, torchrun, accelerate, srun) started this process as a rank.
    Sets torch's variables from srun's."""
    # The batch script itself has SLURM_PROCID too, but it is no job step.
    if "SLURM_STEP_ID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        names = {"RANK": "PROCID", "WORLD_SIZE": "NTASKS", "LOCAL_RANK": "LOCALID"}
        for name, slurm_name in names.items():
            os.environ.setdefault(name, os.environ[f"SLURM_{slurm_name}"])
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


@dataclass
class StopRequest:
    """True once a stop signal has arrived; polled at every step. A second SIGINT exits at once.
    deadline: of a launcher, by time.monotonic(): when the time of its ranks is over."""

    signal: int | None = None
    deadline: float = math.inf

    def listen(self, grace: float = _GRACE) -> "StopRequest":
        """Handle stop signals from now on. `grace` seconds after the first one the process exits
        with code 75, whatever its main thread waits for."""
        # Python runs a handler only when the main thread returns from whatever it waits in; the
        # byte in this pipe arrives at once.
        received, wakeup = os.pipe()
        os.set_blocking(wakeup, False)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
        threading.Thread(
            target=_exit_after_grace, args=(received, grace), name="grace", daemon=True
        ).start()
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)
        unblock_stop_signals()
        return self

    def _receive(self, number: int, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            os._exit(128 + number)
        self.signal = number

    def __bool__(self) -> bool:
        return self.signal is not None


def _exit_after_grace(received: int, grace: float) -> None:
    while not set(os.read(received, 64)) & set(STOP_SIGNALS):
        pass
    time.sleep(grace)
    rank = os.environ.get("RANK", "0")
    sentence = f"rank {rank} could not save and exit in {grace:.0f} s; the last checkpoint remains."
    print(f"forescale: {sentence}", file=sys.stderr, flush=True)
    os._exit(INTERRUPTED)


def unblock_stop_signals() -> None:
    """Deliver the stop signals that were blocked while the rank imported its libraries: some of
    those catch everything, and a signal could be lost in them."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


@contextmanager
def stop_signals_handled_by(handler: Callable) -> Iterator[None]:
    """Send stop signals to `handler` within the block; then restore the previous handlers."""
    previous = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def next_action(code: int, crashes: int) -> Literal["end", "give up", "restart"]:
    """Return what to do after an attempt that ended with `code`. Also used by the batch script.

    crashes: crashes in a row without a new checkpoint, this attempt included.
    """
    if code in (DONE, USER, INTERRUPTED):
        return "end"
    return "give up" if crashes >= MAX_CRASHES else "restart"


def run_attempts(
    run: Run,
    command: list[str],
    sizes: LocalSizes,
    grace: float = _GRACE,
    stop: StopRequest | None = None,
    template: Template | None = None,
) -> int:
    """Start attempt after attempt until the run is complete, is interrupted, or has crashed
    MAX_CRASHES times without a new checkpoint; those after which it goes on with fewer ranks don't
    count. Returns the exit code. sizes: choose the ranks of each attempt; stop: records a signal;
    template: forks the ranks.

    Raises UserError if another launcher has started a newer attempt of the run, or if the machine
    has too little for its first attempt.
    """
    stop = stop or StopRequest()

    def note_stop(number: int, frame) -> None:
        stop.signal, stop.deadline = number, time.monotonic() + grace + _LATE

    with stop_signals_handled_by(note_stop):  # also between two attempts
        return _run_attempts(run, command, sizes, grace, stop, template)


def _run_attempts(
    run: Run,
    command: list[str],
    sizes: LocalSizes,
    grace: float,
    stop: StopRequest,
    template: Template | None,
) -> int:
    crashes, how = 0, ""
    while True:
        before = set(run.checkpoint_steps())
        try:
            size = sizes.choose()
        except UserError as e:
            if not how:
                raise
            attempt = run.new_attempt()
            outcome.record_start(attempt.path, command, 0)
            outcome.record_end(attempt.path, e.code, str(e).rstrip("."))
            return outcome.report_error(None, 0, e)
        if how and not stop:
            print(f"Restarting ({how}).")
        attempt = run.new_attempt()
        ranks = size.ranks, attempt.path, print, grace, stop
        code = start_ranks(command, *ranks, size.devices, size.limit, template)
        progress = set(run.checkpoint_steps()) - before
        crashes = 1 if progress else crashes + 1
        action = next_action(code, crashes)
        if has_shrunk := action != "end" and sizes.has_shrunk(attempt.path, bool(progress)):
            action, crashes = "restart", 0
        if action == "end":
            if code == INTERRUPTED:
                print("Interrupted. Give the same command again to resume.")
            return code
        if action == "give up":
            print(
                f"Gave up after {crashes} crashes without a new checkpoint. Likely cause: "
                f"{outcome.launch_of(attempt.path)['how']}. Attempts: {attempt.path.parent}",
                file=sys.stderr,
            )
            return GAVE_UP
        for _ in range(0 if progress or has_shrunk else 10 * 2**crashes):
            if not stop:  # the next attempt records it
                time.sleep(0.05)
        for newer in [a for a in run.attempts() if a.number > attempt.number]:
            # One that began with a rollback has no launcher: the ranks of this one made it.
            if outcome.launch_of(newer.path):
                problem = f"another launcher has started attempt {newer.number} meanwhile"
                raise UserError(str(newer.path), problem, "do nothing: the newer attempt goes on")
        how = f"crash {crashes} of {MAX_CRASHES} without a new checkpoint"
        how = "with fewer ranks" if has_shrunk else how


def last_end(run: Run) -> str:
    """Return how the newest attempt with a launcher ended, as a sentence; "" if unknown."""
    launches = (outcome.launch_of(attempt.path) for attempt in reversed(run.attempts()))
    how = next((launch.get("how", "") for launch in launches if launch), "")
    return f"{how[0].upper()}{how[1:].rstrip('.')}." if how else ""


def _environment(
    processes: int, attempt: Path, devices: Sequence[str] | None = None
) -> dict[str, str]:
    """Return the environment that all ranks have in common. devices: of start_ranks."""
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    return {
        "OMP_NUM_THREADS": str(threads),
        # Threads that wait for each other spin for 16 ms before they sleep. One busy process beside
        # us then costs a factor of seven; with a shorter spin 2.8, and nothing on a quiet machine.
        "GOMP_SPINCOUNT": "10000",
        **os.environ,
        **({"CUDA_VISIBLE_DEVICES": ",".join(devices)} if devices else {}),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        ATTEMPT: str(attempt),
    }


def start_ranks(
    command: list[str],
    processes: int,
    attempt: Path,
    report: Callable,
    grace: float = _GRACE,
    stop: StopRequest | None = None,
    devices: Sequence[str] | None = None,
    limit: str = "",
    template: Template | None = None,
) -> int:
    """Run `command` as ranks 0 to processes - 1 of a world of their own; return its exit code.

    Rank N prints to attempt/rank-N.log, rank 0 also to this terminal. When one fails, the others
    are stopped: no rank waits in a collective for a dead one. Signal handlers are restored at the
    end. launch.json records start and end. grace: seconds that ranks have to save and exit after a
    stop signal; report: prints a line; stop: records such a signal; devices: GPUs to use; None: all
    that are visible; limit: why there are not more ranks, for launch.json; template: forks the
    ranks, which without it, or where it has failed, are new processes.
    """
    outcome.record_start(attempt, command, processes, **({"limit": limit} if limit else {}))
    kills = outcome.kills_for_memory()
    environment = _environment(processes, attempt, devices)
    ranks: list[subprocess.Popen | ForkedRank] = []
    stop = stop or StopRequest()

    def pass_on(number: int, frame) -> None:
        again = stop.signal is not None
        stop.signal = number
        if not again:
            stop.deadline = time.monotonic() + grace + _LATE
            kill = " A second Ctrl-C kills them." if number == signal.SIGINT else ""
            report(f"Stopping: the ranks save and exit within {grace:.0f} s.{kill}")
        for rank in ranks:
            if rank.returncode is None:
                rank.send_signal(signal.SIGKILL if again and number == signal.SIGINT else number)

    def start(rank: int) -> subprocess.Popen | ForkedRank:
        variables = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        path = attempt / f"rank-{rank}.log" if rank else None
        forked = template and template.fork(rank, variables, path, *ends.values())
        if forked:
            close(ends)
            return forked
        log = open(path, "ab") if path else None  # noqa: SIM115
        started = subprocess.Popen(
            command,
            env=variables,
            stdout=log or ends["stdout"],
            stderr=log or ends["stderr"],
            start_new_session=True,
            preexec_fn=die_with_parent,  # stop signals wait until it calls `unblock_stop_signals`
        )
        close(ends)
        if log:
            log.close()
        return started

    with stop_signals_handled_by(pass_on), copied_output(attempt / "rank-0.log") as ends:
        if template and (reason := template.begin(environment, stop.__bool__)):
            report(f"Note: each rank imports its libraries itself: {reason}.")
        # A signal is held back until every rank is there to get it.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            ranks += map(start, range(0 if stop else processes))
            if stop:  # it came before all ranks were there
                for started in ranks:
                    started.send_signal(signal.SIGTERM)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        too_late = lambda: time.monotonic() > stop.deadline  # noqa: E731
        rank, code = _wait(ranks, attempt, too_late) if ranks else (0, INTERRUPTED)
    shutil.rmtree(node_path(attempt, environment["MASTER_PORT"]), ignore_errors=True)
    # A signal before the rank handled it kills the rank there: nothing is lost by that.
    result = INTERRUPTED if stop and code not in (DONE, USER) else code
    why = getattr(ranks[rank], "why", "") if ranks else ""
    for_memory = outcome.kills_for_memory() > kills
    how, hint = outcome.describe_end(attempt, rank, result, for_memory, why)
    outcome.record_end(attempt, result, how, rank)
    if result == USER and rank:  # the last message of forescale in the rank's log
        log = attempt / f"rank-{rank}.log"
        _, mark, text = log.read_text(errors="replace").rpartition("forescale: ")
        report((mark + text).strip() if mark else f"see {log}")
    elif result not in (DONE, USER, INTERRUPTED):
        report(f"{how}; {hint}")
    return result


def _wait(
    ranks: list[subprocess.Popen | ForkedRank], attempt: Path, too_late: Callable[[], bool]
) -> tuple[int, int]:
    """Wait for all ranks; return (rank, code) of the one that failed first, or (0, DONE)."""
    while True:
        codes = [r.poll() for r in ranks]  # of all: any() would stop at the first that runs
        failed = {i: code for i, code in enumerate(codes) if code}
        if failed or too_late():
            patient = not set(failed.values()).isdisjoint((USER, INTERRUPTED)) and not too_late()
            killed = _stop(ranks, grace=5.0 if patient else 1.0)
            ended = {i: r.returncode for i, r in enumerate(ranks) if i not in killed}
            failures = {i: code for i, code in ended.items() if code}
            rank = outcome.first_failed(attempt, failures) if failures else min(killed)
            return rank, ranks[rank].returncode
        if None not in codes:
            return 0, DONE
        time.sleep(0.05)


def _stop(ranks: list[subprocess.Popen | ForkedRank], grace: float) -> set[int]:
    """Wait `grace` seconds, then kill the ranks that are left (SIGKILL ends suspended ones too);
    return those."""
    deadline = time.monotonic() + grace
    while time.monotonic() < deadline and any(r.poll() is None for r in ranks):
        time.sleep(0.05)
    left = {i for i, r in enumerate(ranks) if r.poll() is None}
    for i in left:
        ranks[i].kill()
    for r in ranks:
        r.wait()
    return left


def asked_of_accelerate() -> int | None:
    """Return the number of ranks in the command of `accelerate launch`, if it has started this one
    process instead, as it does without GPUs: it doesn't tell its process the number."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or started_as_rank():
        return None
    import psutil

    parent = psutil.Process().parent()
    words = " ".join(parent.cmdline()) if parent else ""
    match = re.search(r"--num[-_]processes[ =](\d+)", words)
    return int(match[1]) if match and int(match[1]) > 1 else None


def default_processes(can: Callable[[int], bool]) -> int:
    """Return the number of local ranks: what `accelerate launch` was asked for, else one per GPU.

    Without GPUs one per core, or fewer: the most for which `can` is true. Two ranks share the rows
    of a step and exchange gradients once, two threads of a rank share each product: of the small
    matrices that a CPU trains that takes half as long again on idle cores, and three times as long
    beside other work. One rank where OMP_NUM_THREADS is set, for then the user has divided the
    cores. Doesn't import torch.
    """
    if (number := asked_of_accelerate()) is not None:
        return number
    if devices := gpus():
        return len(devices)
    if "OMP_NUM_THREADS" in os.environ:
        return 1
    return next((n for n in range(len(os.sched_getaffinity(0)), 1, -1) if can(n)), 1)
