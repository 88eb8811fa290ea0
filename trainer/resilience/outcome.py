"""How launches end, and the likely cause where they end badly.

    attempts/0003/launch.json      begun, command, host, pid, processes; ended, code, rank, how
                                   (seconds since the epoch). Written by the launcher alone
    attempts/0003/rank-1.fault     what a rank died of, in one line, by the rank itself

Invariant: a cause is what somebody saw (a rank's own exception, a hang report, a signal), never a
guess dressed as one. Imports no torch.
"""

import os
import signal
import socket
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from forescale.errors import DONE, INTERRUPTED, USER, UserError
from forescale.resilience.diagnosis import Hang, verdict
from forescale.run.directory import Run
from forescale.storage import read_json, write_json

LAUNCH = "launch.json"
_LONGEST = 500  # characters of a cause


def begin(attempt: Path, command: Sequence[str], processes: int, **more: Any) -> None:
    facts = {"begun": time.time(), "command": list(command), "host": socket.gethostname()}
    facts |= {"pid": os.getpid(), "processes": processes}
    write_json(attempt / LAUNCH, {**facts, **more})


def end(attempt: Path, code: int, how: str, rank: int = 0, **more: Any) -> None:
    """rank: the one whose end explains that of the others."""
    note(attempt, ended=time.time(), code=code, rank=rank, how=how, **more)


def note(attempt: Path, **more: Any) -> None:
    """Add to what launch.json says; for the launcher alone."""
    write_json(attempt / LAUNCH, {**read_json(attempt / LAUNCH), **more})


def launch_of(attempt: Path) -> dict[str, Any]:
    """What launch.json says; empty where no launcher of ours started the attempt."""
    try:
        return read_json(attempt / LAUNCH)
    except UserError:
        return {}


def leave_word(attempt: Path, rank: int, error: BaseException) -> None:
    """Say what a rank dies of, for its launcher to read."""
    with suppress(OSError):
        _fault(attempt, rank).write_text(_sentence(error)[:_LONGEST] + "\n")


def _sentence(error: BaseException) -> str:
    if isinstance(error, UserError):
        return str(error)
    first = (str(error).strip().splitlines() or [""])[0]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {first}{where}"


def _fault(attempt: Path, rank: int) -> Path:
    return attempt / f"rank-{rank}.fault"


def has_left_word(attempt: Path, rank: int) -> bool:
    """Whether a rank said what it died of; one that only lost a peer doesn't."""
    return _fault(attempt, rank).exists()


def guilty(attempt: Path, codes: Mapping[int, int]) -> int:
    """Of the ranks that ended by themselves and not well, the one whose end explains the others':
    those that only lost a peer come last."""

    def order(rank: int) -> tuple[int, int]:
        code = codes[rank]
        reasons = (code == USER, code < 0, has_left_word(attempt, rank), code == INTERRUPTED)
        return next((i for i, holds in enumerate(reasons) if holds), len(reasons)), rank

    return min(codes, key=order)


def hang_of(attempt: Path) -> tuple[Hang, Path] | None:
    """What a launch hung in, and the attempt in which it did: it may have rolled back into a newer
    one than it began with."""
    newer = [a.path for a in Run(attempt.parents[1]).attempts() if a.path.name > attempt.name]
    found = ((hang, path) for path in (attempt, *newer) if (hang := verdict(path)))
    return next(found, None)


def how_it_ended(attempt: Path, rank: int, code: int, killed_for_memory: bool) -> tuple[str, str]:
    """The likely cause of an attempt's end, `code` of `rank` being the first that failed: one
    sentence without a full stop; and where there is more to read of it."""
    if code in (DONE, INTERRUPTED):
        return "done" if code == DONE else "interrupted", ""
    if found := hang_of(attempt):
        return found[0].sentence, f"see {found[1]}/hang-*.txt"
    more = f"see {attempt / f'rank-{rank}.log'}" if rank else "its message is above"
    with suppress(OSError):
        said = _fault(attempt, rank).read_text(errors="replace").strip()
        if said:
            return said if code == USER else f"rank {rank} ended with {said}", more
    return f"rank {rank} ended with {_spoken(code, killed_for_memory)}", more


def _spoken(code: int, killed_for_memory: bool) -> str:
    if code >= 0:
        return f"code {code}"
    name = signal.Signals(-code).name
    if -code != signal.SIGKILL:
        return name
    if killed_for_memory:
        return f"{name}: memory ran out, and the kernel killed it"
    return f"{name} (the kernel kills so when memory runs out)"


def kills_for_memory() -> int:
    """How often this machine's kernel has killed a process because memory ran out."""
    with suppress(OSError, ValueError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0
