"""How a step ended, and which node is to blame, from what srun and the ranks said.

Invariant: a node is blamed for what was seen of it (a process killed there, a rank that hung, a
device that failed), never because a rank that lives there had a Python error.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from forescale.errors import CRASHED, DONE, INTERRUPTED, USER
from forescale.resilience import outcome
from forescale.slurm.steps import Failure

# Of a rank's last words: what a device, a link or a disk does, and no program.
_DEVICE = re.compile(r"CUDA error|NCCL error|\bECC\b|\bXid\b|Input/output error", re.IGNORECASE)


@dataclass(frozen=True)
class Verdict:
    """code: of the whole attempt; rank: whose end explains it; how: in a sentence without a full
    stop; blamed: nodes, and why; unfit: nodes on which no rank was started, and why."""

    code: int
    rank: int
    how: str
    blamed: dict[str, str] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)


def judge(attempt: Path, srun_code: int, failures: Sequence[Failure], asked: bool) -> Verdict:
    """failures: of srun, in their order; asked: the ranks were asked to end."""
    if not srun_code:
        return Verdict(DONE, 0, "done")
    first = _first(attempt, failures)
    if first is None:
        how = f"srun ended with code {srun_code}, and no task did"
        return Verdict(INTERRUPTED if asked else CRASHED, 0, how)
    code = INTERRUPTED if asked and first.code != USER else first.code
    how, _ = outcome.how_it_ended(attempt, first.rank, code, first.how.startswith("Out Of Memory"))
    if code in (DONE, INTERRUPTED, USER):
        return Verdict(code, first.rank, how)
    at = f"{how} (on {first.host})" if first.host not in how else how
    return Verdict(CRASHED if code > 0 else code, first.rank, at, _blamed(attempt, first, how))


def _first(attempt: Path, failures: Sequence[Failure]) -> Failure | None:
    """The one that explains the others: a user's fault; else, in the order of time, one that was
    killed or left a word; those that only lost a peer, or were asked to end, come last."""

    def speaks(f: Failure) -> bool:
        return f.code < 0 or outcome.has_left_word(attempt, f.rank)

    tests = (lambda f: f.code == USER, speaks, lambda f: f.code != INTERRUPTED, lambda f: True)
    return next((f for test in tests for f in failures if test(f)), None)


def _blamed(attempt: Path, first: Failure, how: str) -> dict[str, str]:
    if found := outcome.hang_of(attempt):
        hang = found[0]
        # Where ranks of several nodes stand in a collective, none of them is known to be ill.
        return {hang.host: hang.sentence} if "," not in hang.host else {}
    if first.code < 0 and not first.how.startswith("Out Of Memory"):
        return {first.host: how}
    return {first.host: how} if _DEVICE.search(how) else {}
