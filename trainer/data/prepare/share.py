"""Several processes, as a rule one on each node of a cluster, that build one dataset together.

Each does a share of the tasks of a phase, and waits until the files of all others are there; then
it begins the next phase. What only one may do (make and remove the work directory, train the
tokenizer, write the manifest, publish) the first does.

Invariant: who does a task depends on the tasks alone, so no two processes write one file. They
exchange nothing but files of a directory that all see, and a process begins when the first has
prepared it for this very start.
"""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from forescale.ground.console import Progress
from forescale.ground.errors import UserError

_LOOK = 0.5  # seconds between looks for a file; longer the longer it takes
_LONGEST = 10.0


class Share(NamedTuple):
    """This process's place `rank` among `size` that build together; start: a word for this start
    of all of them, that no other start has."""

    rank: int
    size: int
    start: str

    @property
    def is_first(self) -> bool:
        """True for the one process that does what only one may do."""
        return self.rank == 0

    def mine(self, weights: Sequence[int]) -> list[int]:
        """Return the places of this process's tasks: the heaviest first, each to the process that
        has the least so far; alone, all as they are."""
        if self.size == 1:
            return [*range(len(weights))]
        loads, mine = [0] * self.size, []
        for place in sorted(range(len(weights)), key=lambda i: (-weights[i], i)):
            least = min(range(self.size), key=lambda i: (loads[i], i))
            loads[least] += weights[place] + 1
            if least == self.rank:
                mine.append(place)
        return mine


ALONE = Share(0, 1, "")


def share_of(environment: Mapping[str, str] = os.environ) -> Share:
    """Return the share of a task of srun, by what SLURM says; ALONE elsewhere. (A batch script that
    is no task of srun has SLURM_PROCID=0 too, but no SLURM_STEP_NUM_TASKS.)"""
    names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "SLURM_STEP_ID")
    place, count, *of_start = (environment.get(name, "") for name in names)
    if not (place.isdecimal() and count.isdecimal()) or int(count) < 2:
        return ALONE
    start = "-".join([*of_start, environment.get("SLURM_RESTART_COUNT", "0")])
    return Share(int(place), int(count), start)


def wait_for(
    paths: Sequence[Path],
    progress: Progress,
    arrived: Callable[[int], None] = lambda i: None,
    failed: Path | None = None,
) -> None:
    """Wait until all these files are there. arrived: called with the place of each that is; failed:
    a file that another process writes if it fails. Raises UserError if it is there, or if a
    directory of the files goes away."""
    missing, pause, since = dict(enumerate(paths)), _LOOK, time.monotonic()
    folders: set[Path] = set()
    while missing:
        came = [place for place, path in missing.items() if path.exists()]
        for place in came:
            missing.pop(place)
            arrived(place)
        if missing:
            if came:
                pause, since = _LOOK, time.monotonic()
            waited = int(time.monotonic() - since)
            if waited >= 5:
                progress(f"wait for {len(missing)} files of other processes", waited, None, "s")
            if failed is not None and failed.exists():
                problem = f"another process of this build failed ({failed.read_text()})"
                raise UserError(str(failed.parent), problem, "give the same command again")
            if gone := [folder for folder in folders if not folder.exists()]:
                problem = "is gone: the process that prepared it has ended"
                raise UserError(str(gone[0]), problem, "see its message")
            folders |= {path.parent for path in missing.values() if path.parent.exists()}
            time.sleep(pause)
            pause = min(1.2 * pause, _LONGEST)
