"""How many local ranks an attempt has: the largest size of its job that the machine has GPUs for
now, or cores where it has no GPU.

Invariant: a GPU that failed in an attempt, and a size at which memory ran out, are not used again
before the run has a newer checkpoint. A size that the user has fixed never changes.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from forescale.config.sizes import in_words
from forescale.ground.errors import UserError
from forescale.resilience import outcome


@dataclass(frozen=True)
class LocalSize:
    """The number of ranks of an attempt. limit: why not more, "" if nothing hinders; devices: GPUs
    that they may use, of a size that may change."""

    ranks: int
    limit: str = ""
    devices: Sequence[str] | None = None


class LocalSizes:
    """Chooses the size of each attempt. sizes: those at which the job can run, the largest first;
    is_fixed: the first, whatever the machine has."""

    def __init__(self, sizes: Sequence[int], is_fixed: bool = False):
        self.sizes, self._is_fixed, self._on_gpu = sizes, is_fixed, bool(gpus())
        self._failed: dict[str, str] = {}  # GPUs, with the reason
        self._most, self._why = math.inf, ""
        self.now = LocalSize(0)

    def choose(self) -> LocalSize:
        """Return the size of the next attempt. Raises UserError if the machine has too little."""
        self.now = LocalSize(self.sizes[0]) if self._is_fixed else self._largest()
        return self.now

    def _largest(self) -> LocalSize:
        devices = [name for name in gpus() if name not in self._failed]
        count = len(devices) if self._on_gpu else len(os.sched_getaffinity(0))
        possible = [size for size in self.sizes if size <= count]
        has = f"{count} {'GPU' if self._on_gpu else 'core'}{'s' * (count != 1)}"
        if not possible:
            problem = f"this machine has {has}, and the job can run at {in_words(self.sizes)}"
            raise UserError("launch.processes", problem, "allow fewer, or take a larger machine")
        ranks = next((size for size in possible if size <= self._most), possible[-1])
        limit = "" if ranks == self.sizes[0] else f"this machine has {has}"
        if self._failed and limit:
            limit = "; ".join(self._failed.values())
        if ranks < possible[0]:
            limit = self._why
        return LocalSize(ranks, limit, devices if self._on_gpu else None)

    def has_shrunk(self, attempt: Path, has_saved: bool) -> bool:
        """Return whether the next attempt has fewer ranks, because memory or a GPU was the cause of
        the failure of `attempt`. has_saved: a checkpoint, so that it tries more first."""
        if has_saved:
            self._failed.clear()
            self._most = math.inf
        smaller = [size for size in self.sizes if size < self.now.ranks]
        cause, launch = outcome.cause_of(attempt), outcome.launch_of(attempt)
        if self._is_fixed or not smaller or cause is None:
            return False
        if cause == "memory":
            self._most = smaller[0]
            self._why = f"memory ran out at {self.now.ranks} ranks"
        elif (used := self.now.devices) and len(used) > smaller[-1]:
            name = used[launch.get("rank", 0)]  # rank n has the nth
            self._failed[name] = f"GPU {name} failed ({launch.get('how', '')})"
        return self._largest().ranks < self.now.ranks


def gpus(listed: Path = Path("/proc/driver/nvidia/gpus")) -> list[str]:
    """Return the GPUs that this process may use now, as CUDA_VISIBLE_DEVICES names them. listed:
    where the driver lists them; replaced in tests."""
    count = len([*listed.glob("*")])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return [str(i) for i in range(count)]
    names = [name for d in visible.split(",") if (name := d.strip()) not in ("", "-1")]
    # In a container without the list nothing is known.
    return [name for name in names if not (count and name.isdecimal() and int(name) >= count)]
