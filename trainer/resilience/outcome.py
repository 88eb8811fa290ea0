"""How launches end, the likely cause of a failure, and the message to a webhook.

    attempts/0003/launch.json      begun, command, host, pid, process, processes; ended, seconds,
                                   code, rank, how. Written by the launcher alone
    attempts/0003/rank-1.error     one line by the rank itself: the error that ended it

Invariant: a cause is something observed (a rank's own exception, a diagnosed hang, a signal), never
a guess. No run depends on the webhook: one try, and a failure is a line in the log. Its address is
a secret: it stands in the environment, and in no config, log or file of a run. Imports no torch.

    FORESCALE_WEBHOOK=https://...   gets a POST of JSON: text (a sentence; Slack, Mattermost and
                                    Teams show it), content (the same, for Discord), run, event and,
                                    of an end, code
"""

import json
import os
import re
import signal
import socket
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict

from forescale.ground.errors import (
    CRASHED,
    DONE,
    GAVE_UP,
    INTERRUPTED,
    USER,
    UserError,
    masked,
    storage_error,
)
from forescale.ground.storage import read_json, read_typed, write_checked_json
from forescale.ground.typed import Count, Moment, Number, Whole
from forescale.resilience.diagnosis import Hang, read_hang
from forescale.resilience.rank_log import RankLog
from forescale.run.directory import Run

LAUNCH = "launch.json"
_ROOM = ".room"  # a file that is removed to make room for the end in launch.json
WEBHOOK = "FORESCALE_WEBHOOK"
EVENTS = {DONE: "complete", CRASHED: "crashed", USER: "stopped", GAVE_UP: "gave up"}
_WEBHOOK_SECONDS = 10.0
_LONGEST = 500  # characters of an error
_TAIL = 200  # lines at the end of a rank's log
# In the error of a rank: its GPU failed, or the links of it; not the assertion of a program.
GPU = r"CUDA (?:unknown )?error(?!: device-side assert)|NCCL error|\bECC\b|\bXid\b"
_KILLED = "memory ran out, and the kernel killed it"
_MESSAGE = re.compile(r"(forescale: |(?=[A-Za-z_][\w.]*(?:Error|Exception)\b))(.+)")


class SlurmStart(TypedDict, total=False):
    """The job of a launch. restart: how often it was requeued; eligible: when it could start."""

    job: str
    restart: Count
    submission: str
    nodes: list[str]
    eligible: Moment | None


class LaunchRecord(TypedDict, total=False):
    """The content of launch.json. begun, ended: since the epoch; monotonic: `begun` by a clock that
    nobody sets; seconds: from there to the end; blamed, faulty: nodes that were the cause, with the
    reason; stop_signal: the name of the signal that ended the launch, or "growth" where its job
    wants more nodes; limit: why not more ranks or nodes, where the job allows more."""

    begun: Moment
    monotonic: Number
    command: list[str]
    host: str
    pid: Count
    process: str | None
    processes: Count
    ended: Moment
    seconds: Number
    code: Whole | None
    rank: Count
    how: str
    slurm: SlurmStart
    blamed: dict[str, str]
    faulty: dict[str, str]
    stop_signal: str | None
    refused: Count
    limit: str


def record_start(attempt: Path, command: Sequence[str], processes: int, **fields: Any) -> None:
    """Write launch.json when the ranks are started. fields: further ones."""
    facts = {"begun": time.time(), "monotonic": time.monotonic(), "command": list(command)}
    facts["host"], pid = socket.gethostname(), os.getpid()
    facts |= {"pid": pid, "process": process_mark(pid), "processes": processes}
    write_checked_json(attempt / LAUNCH, {**facts, **fields})
    with suppress(OSError):
        (attempt / _ROOM).write_bytes(bytes(1 << 16))


def process_mark(pid: int) -> str | None:
    """Return a text that no other process on this machine ever has: the boot, and the clock ticks
    from it to the start of the process. None if there is no such process, or this system doesn't
    say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # The second field is the name in parentheses, which may hold spaces and parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return f"{boot}:{fields[19]}"
    except (OSError, IndexError):
        return None


def record_end(attempt: Path, code: int, how: str, rank: int = 0, **fields: Any) -> None:
    """Add the end to launch.json. rank: the one that failed first.

    The room for it was reserved at the start: a full disk is one of the ends to be recorded.
    """
    with suppress(OSError):
        (attempt / _ROOM).unlink(missing_ok=True)
    if (begun := launch_of(attempt).get("monotonic")) is not None:
        fields["seconds"] = time.monotonic() - begun
    add_to_launch(attempt, ended=time.time(), code=code, rank=rank, how=how, **fields)


def add_to_launch(attempt: Path, **fields: Any) -> None:
    """Add fields to launch.json; for the launcher alone."""
    write_checked_json(attempt / LAUNCH, {**read_json(attempt / LAUNCH), **fields})


def launch_of(attempt: Path) -> LaunchRecord:
    """Return the content of launch.json; empty if no launcher of ours started the attempt. Raises
    UserError if it is damaged."""
    path = attempt / LAUNCH
    return read_typed(LaunchRecord, path) if path.exists() else LaunchRecord()


def report_error(
    attempt: Path | None, rank: int, error: BaseException, lost_peer: bool = False
) -> int:
    """Print the error that ends a rank, record it for its launcher, and return the exit code.

    attempt: None under a launcher that isn't ours. lost_peer: the rank failed only because another
    one is gone; then nothing is recorded, because that one's error is the cause.
    """
    if lost_peer:
        problem = f"rank {rank} has lost another rank ({str(error).splitlines()[0]})"
        print(f"forescale: {problem}; see the last lines of that rank.", file=sys.stderr)
        return CRASHED
    error = (storage_error(error) if isinstance(error, OSError) else None) or error
    if attempt is not None:
        write_error(attempt, rank, error)
    if isinstance(error, UserError):
        print(f"forescale: {error}", file=sys.stderr)
        return error.code
    print(masked("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    return CRASHED


def write_error(attempt: Path, rank: int, error: BaseException) -> None:
    """Write the error that ends a rank for its launcher to read; never raises. On a full disk it
    uses the room that is reserved for the end of the attempt, and leaves most of it."""
    text = str(error)
    if not isinstance(error, UserError):
        first = (text.strip().splitlines() or [""])[0]
        frames = traceback.extract_tb(error.__traceback__)
        where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
        text = masked(f"{type(error).__name__}: {first}{where}")
    text = text[:_LONGEST] + "\n"
    try:
        _error_path(attempt, rank).write_text(text)
    except OSError:
        with suppress(OSError):
            (attempt / _ROOM).unlink(missing_ok=True)
            _error_path(attempt, rank).write_text(text)


def _error_path(attempt: Path, rank: int) -> Path:
    return attempt / f"rank-{rank}.error"


def has_written_error(attempt: Path, rank: int) -> bool:
    """Return True if a rank recorded its error; one that only lost another rank doesn't."""
    return _error_path(attempt, rank).exists()


def first_failed(attempt: Path, codes: Mapping[int, int]) -> int:
    """Return the rank whose failure caused the others', among ranks that exited with these codes:
    a user's error first, then a signal, then a recorded error; ranks that only lost another last.
    """

    def order(rank: int) -> tuple[int, int]:
        code = codes[rank]
        reasons = (code == USER, code < 0, has_written_error(attempt, rank), code == INTERRUPTED)
        return next((i for i, holds in enumerate(reasons) if holds), len(reasons)), rank

    return min(codes, key=order)


def hang_of(attempt: Path) -> tuple[Hang, Path] | None:
    """Return the hang that ended a launch and the attempt in which it happened: the launch may have
    rolled back into a newer attempt than its first."""
    newer = [a.path for a in Run(attempt.parents[1]).attempts() if a.path.name > attempt.name]
    hangs = ((hang, path) for path in (attempt, *newer) if (hang := read_hang(path)))
    return next(hangs, None)


def describe_code(code: int) -> str:
    """Return the exit code of a process, or the name of the signal -code that ended it."""
    return f"code {code}" if code >= 0 else signal.Signals(-code).name


def describe_end(
    attempt: Path, rank: int, code: int, killed_for_memory: bool, why: str = ""
) -> tuple[str, str]:
    """Return the likely cause of an attempt's end as a sentence without a full stop, and where to
    read more. rank, code: of the rank that failed first; why: it was killed, where that is
    known."""
    if code in (DONE, INTERRUPTED):
        return "done" if code == DONE else "interrupted", ""
    if match := hang_of(attempt):
        hang, path = match
        return hang.sentence, f"see {path}/hang-*.txt"
    log = log_of(attempt, rank)
    hint = f"see {log}" if rank else "its message is above"
    with suppress(OSError):
        error = _error_path(attempt, rank).read_text(errors="replace").strip().rstrip(".")
        if error:
            return error if code == USER else f"rank {rank} ended with {error}", hint
    message = _last_message(log) if code > 0 else ""
    if message:  # it could write no error where the storage failed
        return message if code == USER else f"rank {rank} ended with code {code}: {message}", hint
    end = describe_code(code)
    if -code == signal.SIGKILL and killed_for_memory:
        end += f": {_KILLED}"
    elif -code == signal.SIGKILL:
        end += f" ({why or 'the kernel sends it when memory runs out'})"
    return f"rank {rank} ended with {end}", hint


def cause_of(attempt: Path) -> Literal["memory", "gpu"] | None:
    """Return what failed in an attempt that ended, where fewer ranks would need less of it: the
    memory of the machine, or a GPU; None for every other end."""
    how = launch_of(attempt).get("how", "")
    if how.endswith(_KILLED):
        return "memory"
    return "gpu" if re.search(GPU, how, re.IGNORECASE) else None


def log_of(attempt: Path, rank: int) -> RankLog:
    """Return the log of a rank, which may not exist: its own, or the lines in that of its node."""
    log, launch = RankLog(attempt / f"rank-{rank}.log"), launch_of(attempt)
    nodes = launch.get("slurm", {}).get("nodes")
    if not nodes or log.exists:
        return log
    node = rank * len(nodes) // (launch.get("processes") or 1)  # srun deals ranks in blocks
    return RankLog(attempt / f"node-{node}.log", rank)


def _last_message(log: RankLog) -> str:
    """Return the last message of forescale or of Python at the end of a rank's log, "" without
    one."""
    try:
        lines = log.last(_TAIL)[::-1]
    except OSError:
        return ""
    message = next((match for line in lines if (match := _MESSAGE.match(line))), None)
    return masked(message[2])[:_LONGEST].rstrip(".") if message else ""


def notify(run: Run, code: int, why: str, report: Callable[[str], object]) -> None:
    """Post the end of a run to the webhook, if the environment has one. why: a sentence; report:
    prints a line. An interrupted run, which resumes, is not posted."""
    if (event := EVENTS.get(code)) is None:
        return
    post(run, event, why, report, code=code)


def post(run: Run, event: str, why: str, report: Callable[[str], object], **facts: Any) -> None:
    """Post an event of a run to the webhook, if the environment has one; see `notify`."""
    if not (address := os.environ.get(WEBHOOK)):
        return
    text = f"forescale run {run.name}: {event}. {why}"
    facts = {"text": text, "content": text, "run": run.name, "event": event, **facts}
    try:
        if not address.startswith(("https://", "http://")):
            raise ValueError("its address doesn't begin with https://")
        headers = {"Content-Type": "application/json", "User-Agent": "forescale"}
        request = urllib.request.Request(address, json.dumps(facts).encode(), headers)
        urllib.request.urlopen(request, timeout=_WEBHOOK_SECONDS).close()
    except (OSError, ValueError, HTTPException) as e:
        problem = str(e).replace(address, "the address")
        report(f"The webhook of {WEBHOOK} fails: {problem}. The run is not affected.")


def kills_for_memory() -> int:
    """Return how many processes this machine's kernel has killed because memory ran out."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
