"""Injects faults on one rank, each once per run, even if its step is made again.

Invariant: a fault is recorded durably before it strikes, in attempts/NNNN/faults-rank-N.jsonl,
which this rank alone writes; a fault recorded in any attempt doesn't strike again. A run without
faults has no injector.
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

from forescale.config.sections.faults import Fault, read
from forescale.ground.storage import fsync_path
from forescale.resilience.phases import PhaseTimer
from forescale.run.directory import Attempt, Run
from forescale.run.rows import RowWriter, read_rows

if TYPE_CHECKING:
    from torch import nn

_SPIKE = 1000.0  # factor on the gradient
_SLEEP, _SLOW_STEPS = 0.1, 20  # a slow rank: seconds of sleep per step, and number of steps
_RECORDS = "faults-rank-*.jsonl"


class Injected(Exception):
    pass


def injector_of(
    faults: Iterable[str], rank: int, run: Run, attempt: Attempt, phases: PhaseTimer
) -> "Injector | None":
    """Return the injector of a rank, or None if no fault is left for it. faults: texts without
    problems (see config/sections/faults.py)."""
    struck = {row["fault"] for row in records(run)}
    left = [f for f in map(read, faults) if f.rank == rank and str(f) not in struck]
    return Injector(left, run, attempt, phases) if left else None


def records(run: Run) -> list[dict]:
    """Return the faults that have struck a run in the order of time, each a row with "fault" and
    "time" (seconds since the epoch)."""
    files = (path for a in run.attempts() for path in a.path.glob(_RECORDS))
    return sorted((row for f in files for row in read_rows(f)), key=lambda row: row["time"])


class Injector:
    """The faults of one rank that are left.

    It is called at every place the rank comes to (as the phase timer's hook), before the forward of
    every step (`disturb`), within every checkpoint file (`writing`), and when an attempt begins.
    """

    def __init__(self, faults: list[Fault], run: Run, attempt: Attempt, phases: PhaseTimer):
        self.run, self.attempt, self.phases = run, attempt, phases
        self._left = list(faults)
        self._step = self._seen_step = phases.step  # the step being made; the timer's last
        self._lock = Lock()  # checkpoints may be written by another thread
        self._slow: tuple[str, int] | None = None  # place and last step of a slow rank
        self._slept = 0  # the last step in which it slept
        phases.hook = self._arrive

    def begin(self, attempt: Attempt, step: int) -> None:
        """Go on in `attempt`, which has made `step` steps so far."""
        self.attempt, self._step, self._seen_step = attempt, step, self.phases.step

    def _arrive(self) -> None:
        place = self.phases.at
        if self.phases.step != self._seen_step:
            self._step = self._seen_step = self.phases.step
        step = self._step + (place == "data")  # data is read before its step begins
        for fault in [f for f in self._left if f.place == place and self._is_due(f, step)]:
            self._strike(fault)
        if self._slow and place == self._slow[0] and self._slept < step <= self._slow[1]:
            self._slept = step  # once per step, not per micro-batch
            time.sleep(_SLEEP)

    def _is_due(self, fault: Fault, step: int) -> bool:
        if fault.kind in ("nan", "spike", "flip", "enospc"):
            return False  # injected by `disturb` and `writing`
        if fault.kind == "corrupt":
            return step >= fault.step and bool(self.run.checkpoint_steps())
        return step == fault.step

    def disturb(self, step: int, module: "nn.Module") -> float:
        """Inject the faults of `step`, which is about to begin its forward; may flip a bit of the
        weights. Returns the factor on this rank's loss before the backward."""
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
        """Inject faults while this rank's file of the checkpoint at `step` is half written, in the
        writing thread. Raises OSError for a disk that is to be full."""
        for fault in [f for f in self._left if step >= f.step]:
            if fault.kind == "enospc":
                self._record(fault)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            if fault.place == "write":
                self._strike(fault)

    def _record(self, fault: Fault) -> None:
        with self._lock:
            self._left.remove(fault)
            facts = {"fault": str(fault), "time": time.time(), "at": self.phases.at}
            rows = RowWriter(self.attempt.path / _RECORDS.replace("*", str(fault.rank)))
            rows.add(facts)
            rows.sync()
            fsync_path(self.attempt.path)
            if fault.rank == 0:  # which writes the events
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
                raise Injected(f"the fault {fault}, set by the key `faults`")
            case "slow":
                self._slow = (fault.place, fault.step + _SLOW_STEPS - 1)
            case "corrupt":
                damage(self.run.checkpoint_path(self.run.checkpoint_steps()[-1]))


def flip_a_weight(module: "nn.Module") -> None:
    """Flip the lowest exponent bit of the first parameter's largest weight: the weight doubles or
    halves and stays finite."""
    import torch

    first = next(module.parameters())
    # At ZeRO stage 3 the parameter itself is empty; ds_tensor is this rank's part of it.
    held = getattr(first, "ds_tensor", first).data.view(-1)
    mantissa = {torch.float32: 23, torch.bfloat16: 7, torch.float16: 10}[held.dtype]
    largest = int(held.abs().argmax())
    bits = held.view(torch.int32 if held.dtype == torch.float32 else torch.int16)
    bits[largest] ^= 1 << mantissa


def damage(checkpoint: Path) -> Path:
    """Flip a bit in the middle of a checkpoint's largest file; return the file."""
    path = max(checkpoint.iterdir(), key=lambda p: (p.stat().st_size, p.name))
    with open(path, "r+b") as f:
        f.seek(path.stat().st_size // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))
        f.flush()
        os.fsync(f.fileno())
    return path
