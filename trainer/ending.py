"""How launches end, and the likely cause where they end badly.

    attempts/0003/launch.json      begun, command, host, processes; ended, code, how (seconds since
                                   the epoch). Written by the launcher alone
    attempts/0003/rank-1.fault     what a rank died of, in one line, by the rank itself

Invariant: a cause is what somebody saw (a rank's own exception, a hang report, a signal), never a
guess dressed as one. Imports no torch.
"""

import signal
import socket
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.durable import read_json, write_json
from trainer.errors import DONE, INTERRUPTED, USER, UserError
from trainer.hang import verdict
from trainer.run import Run

LAUNCH = "launch.json"
_LONGEST = 500  # characters of a cause


def begin(attempt: Path, command: list[str], processes: int) -> None:
    facts = {"begun": time.time(), "command": command, "host": socket.gethostname()}
    write_json(attempt / LAUNCH, {**facts, "processes": processes})


def end(attempt: Path, code: int, how: str) -> None:
    facts = read_json(attempt / LAUNCH)
    write_json(attempt / LAUNCH, {**facts, "ended": time.time(), "code": code, "how": how})


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


def guilty(attempt: Path, codes: Mapping[int, int]) -> int:
    """Of the ranks that ended by themselves and not well, the one whose end explains the others':
    those that only lost a peer come last."""

    def order(rank: int) -> tuple[int, int]:
        code = codes[rank]
        reasons = (code == USER, code < 0, _fault(attempt, rank).exists(), code == INTERRUPTED)
        return next((i for i, holds in enumerate(reasons) if holds), len(reasons)), rank

    return min(codes, key=order)


def how_it_ended(attempt: Path, rank: int, code: int, killed_for_memory: bool) -> tuple[str, str]:
    """The likely cause of an attempt's end, `code` of `rank` being the first that failed: one
    sentence without a full stop; and where there is more to read of it."""
    if code in (DONE, INTERRUPTED):
        return "done" if code == DONE else "interrupted", ""
    newer = [a.path for a in Run(attempt.parents[1]).attempts() if a.path.name > attempt.name]
    for path in (attempt, *newer):  # it may have rolled back into a newer one
        if hang := verdict(path):
            return hang.sentence, f"see {path}/hang-*.txt"
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
