"""Makes faults happen on one rank, each once a run, however often its step is made again.

Invariant: a fault is on disk before it strikes, in attempts/NNNN/faults-rank-N.jsonl, which this
rank alone writes; what stands there in any attempt doesn't strike again. A run without faults has
no injector.
"""

import errno
import math
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from forescale.config.faults import Fault, read
from forescale.resilience.phases import Pulse
from forescale.run.directory import Attempt, Rows, Run, read_rows
from forescale.storage import fsync_path

if TYPE_CHECKING:
    from torch import nn

_SPIKE = 1000.0  # what the gradient is multiplied by
_SLEEP, _SLEEPY_STEPS = 0.1, 20  # seconds a step, and for how many steps, of a slow rank
_RECORDS = "faults-rank-*.jsonl"


class Injected(Exception):
    """A crash that somebody asked for."""


def injector_of(
    faults: Iterable[str], rank: int, run: Run, attempt: Attempt, pulse: Pulse
) -> "Injector | None":
    """The injector of a rank, or None where nothing is left to happen on it. faults: without
    problems, see faults.problems."""
    struck = {row["fault"] for row in records(run)}
    left = [f for f in map(read, faults) if f.rank == rank and str(f) not in struck]
    return Injector(left, run, attempt, pulse) if left else None


def records(run: Run) -> list[dict]:
    """The faults that have struck a run, each with its "time" (seconds since the epoch), in the
    order of time."""
    files = (path for a in run.attempts() for path in a.path.glob(_RECORDS))
    return sorted((row for f in files for row in read_rows(f)), key=lambda row: row["time"])


class Injector:
    """Hears of every place that the rank comes to (as `pulse.hook`), of every step before its
    forward (`disturb`), of every checkpoint's file that it writes (`writing`), and of every attempt
    that it works for (`begin`)."""

    def __init__(self, faults: list[Fault], run: Run, attempt: Attempt, pulse: Pulse):
        self.run, self.attempt, self.pulse = run, attempt, pulse
        self._left = list(faults)
        self._made = self._stood = pulse.step  # steps made or being made; where the pulse stood
        self._lock = Lock()  # checkpoints may be written by another thread
        self._sleepy: tuple[str, int] | None = None  # a slow rank: the place, and its last step
        self._slept = 0  # the last step that it slept in
        pulse.hook = self._arrive

    def begin(self, attempt: Attempt, step: int) -> None:
        """Go on in `attempt`, after `step` steps."""
        self.attempt, self._made, self._stood = attempt, step, self.pulse.step

    def _arrive(self) -> None:
        place = self.pulse.at
        if self.pulse.step != self._stood:
            self._made = self._stood = self.pulse.step
        step = self._made + (place == "data")  # what the data is for has not begun yet
        for fault in self._left_at(place, step):
            self._strike(fault)
        if self._sleepy and place == self._sleepy[0] and self._slept < step <= self._sleepy[1]:
            self._slept = step  # once a step, however many micro-batches it has
            time.sleep(_SLEEP)

    def _left_at(self, place: str, step: int) -> list[Fault]:
        return [f for f in self._left if f.place == place and self._is_due(f, step)]

    def _is_due(self, fault: Fault, step: int) -> bool:
        if fault.kind in ("nan", "spike", "flip", "enospc"):
            return False  # `disturb` and `writing` see to them
        if fault.kind == "corrupt":
            return step >= fault.step and bool(self.run.checkpoint_steps())
        return step == fault.step

    def disturb(self, step: int, module: "nn.Module") -> float:
        """Called before the forward of the update that makes `step`: may flip a bit of the weights,
        and returns what the step's loss is multiplied by on this rank before its backward."""
        factor = 1.0
        for fault in [f for f in self._left if f.step == step]:
            if fault.kind in ("nan", "spike", "flip"):
                self._record(fault)
            if fault.kind == "flip":
                flip_a_weight(module)
            elif fault.kind in ("nan", "spike"):
                factor *= math.nan if fault.kind == "nan" else _SPIKE
        return factor

    def writing(self, step: int, path: Path) -> None:
        """Called while this rank's file of the checkpoint at `step` is being written, by the thread
        that writes. Raises OSError where the disk is to be full."""
        for fault in [f for f in self._left if step >= f.step]:
            if fault.kind == "enospc":
                self._record(fault)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            if fault.place == "write":
                self._strike(fault)

    def _record(self, fault: Fault) -> None:
        with self._lock:
            self._left.remove(fault)
            facts = {"fault": str(fault), "time": time.time(), "at": self.pulse.at}
            rows = Rows(self.attempt.path / _RECORDS.replace("*", str(fault.rank)))
            rows.add(facts)
            rows.sync()
            fsync_path(self.attempt.path)
            if fault.rank == 0:  # who writes the events
                self.attempt.event("fault_injected", fault=str(fault), step=fault.step)

    def _strike(self, fault: Fault) -> None:
        self._record(fault)
        match fault.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "freeze":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "hang":
                while True:
                    time.sleep(60)
            case "exit":
                raise Injected(f"the fault {fault}, as `faults` asked for")
            case "slow":
                self._sleepy = (fault.place, fault.step + _SLEEPY_STEPS - 1)
            case "corrupt":
                damage(self.run.checkpoint_path(self.run.checkpoint_steps()[-1]))


def flip_a_weight(module: "nn.Module") -> None:
    """Flip the lowest bit of the exponent of the first parameter's largest weight: it doubles or
    halves, and stays a number."""
    import torch

    first = next(module.parameters())
    # What ZeRO stage 3 leaves of a parameter on this rank, where the parameter itself is empty.
    held = getattr(first, "ds_tensor", first).data.view(-1)
    mantissa = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}[held.dtype]
    largest = int(held.abs().argmax())
    bits = held.view(torch.int32 if held.dtype == torch.float32 else torch.int16)
    bits[largest] ^= 1 << mantissa


def damage(checkpoint: Path) -> Path:
    """Flip a bit in the middle of a checkpoint's largest file, and return it."""
    path = max(checkpoint.iterdir(), key=lambda p: (p.stat().st_size, p.name))
    with open(path, "r+b") as f:
        f.seek(path.stat().st_size // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))
        f.flush()
        os.fsync(f.fileno())
    return path
