"""How an attempt ended and which nodes to blame, from the output of srun and of the ranks.

Invariant: a node is blamed only for an observation (a process was killed there, a rank hung, a
device failed), never for a Python error of a rank.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from forescale.errors import CRASHED, DONE, INTERRUPTED, USER
from forescale.resilience import outcome
from forescale.slurm.steps import Failure

# In the error of a rank: failures of a device, a link or a disk, not of a program.
_DEVICE = re.compile(r"CUDA error|NCCL error|\bECC\b|\bXid\b|Input/output error", re.IGNORECASE)


@dataclass(frozen=True)
class AttemptOutcome:
    """How an attempt ended.

    code: exit code of the attempt; rank: the rank that failed first; how: a sentence without a full
    stop; blamed: nodes that failed, with the reason; faulty: nodes that failed the preflight.
    """

    code: int
    rank: int
    how: str
    blamed: dict[str, str] = field(default_factory=dict)
    faulty: dict[str, str] = field(default_factory=dict)


def outcome_of(
    attempt: Path, srun_code: int, failures: Sequence[Failure], stop_requested: bool
) -> AttemptOutcome:
    """Return how the attempt ended. failures: of srun, in their order."""
    if not srun_code:
        return AttemptOutcome(DONE, 0, "done")
    first = _first(attempt, failures)
    if first is None:
        how = f"srun ended with code {srun_code}, and no task did"
        return AttemptOutcome(INTERRUPTED if stop_requested else CRASHED, 0, how)
    code = INTERRUPTED if stop_requested and first.code != USER else first.code
    how, _ = outcome.describe_end(attempt, first.rank, code, first.how.startswith("Out Of Memory"))
    if code in (DONE, INTERRUPTED, USER):
        return AttemptOutcome(code, first.rank, how)
    at = f"{how} (on {first.host})" if first.host not in how else how
    return AttemptOutcome(
        CRASHED if code > 0 else code, first.rank, at, _blamed(attempt, first, how)
    )


def _first(attempt: Path, failures: Sequence[Failure]) -> Failure | None:
    """Return the failure that explains the others, or None.

    A UserError comes first; then a rank that was killed or wrote an error; ranks that only lost a
    peer or were stopped come last. Equal ones are in the order of time.
    """

    def explains(f: Failure) -> bool:
        return f.code < 0 or outcome.has_written_error(attempt, f.rank)

    tests = (lambda f: f.code == USER, explains, lambda f: f.code != INTERRUPTED, lambda f: True)
    return next((f for test in tests for f in failures if test(f)), None)


def _blamed(attempt: Path, first: Failure, how: str) -> dict[str, str]:
    if found := outcome.hang_of(attempt):
        hang = found[0]
        # If ranks of several nodes wait in a collective, none of them is known to be faulty.
        return {hang.host: hang.sentence} if "," not in hang.host else {}
    if first.code < 0 and not first.how.startswith("Out Of Memory"):
        return {first.host: how}
    return {first.host: how} if _DEVICE.search(how) else {}
