"""Runs the cells of a study on this machine: several at once, each as its own `forescale train`.

Invariant: cells never outlive the launcher (on Linux, however it ends); the same command resumes
each from its last checkpoint. A cell that ends without a loss is reported once and starts again
only with launch.retry=true.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

from forescale.config.target import STORED
from forescale.ground.errors import DONE, INTERRUPTED, USER, UserError
from forescale.ground.processes import die_with_parent
from forescale.resilience.launcher import gpus, stop_signals_handled_by
from forescale.scaling.config import LaunchKeys
from forescale.scaling.design.cells import Cell
from forescale.scaling.study.directory import Study
from forescale.scaling.study.launching import Launcher, expect_within_cap, summary

_POLL = 0.2  # seconds
_TAIL = 4096  # bytes of a log file in which the last message is looked for


class LocalLauncher(Launcher):
    """Runs one study on this machine. On a machine with GPUs a cell has one for each of its ranks,
    and no other has those meanwhile."""

    def __init__(self, study: Study, keys: LaunchKeys, log: Callable[[str], None]):
        super().__init__(study, keys, log)
        self._stored = [] if keys.trust else [STORED]
        self._processes: dict[str, subprocess.Popen] = {}
        self._gpus, ranks = gpus(), study.plan.common.ranks
        groups = [self._gpus[i : i + ranks] for i in range(0, len(self._gpus), ranks)]
        self._free = [",".join(group) for group in groups if len(group) == ranks]
        self._used: dict[str, str] = {}  # GPUs by cell
        self._fault: str | None = None

    def go(self) -> int:
        """Run until nothing is left and return 0; 75 after a stop signal; 2 if a cell reported an
        error of the user's. Raises UserError if the cells need more GPUs than there are."""
        count, at_once, ranks = len(self._gpus), self.keys.at_once, self.study.plan.common.ranks
        if count and at_once * ranks > count:
            problem = f"{at_once} at once, {ranks} ranks each, need {at_once * ranks} GPUs; here "
            todo = f"write launch.at_once={count // ranks}"
            todo = todo if ranks <= count else "use a larger machine"
            raise UserError("launch.at_once", f"{problem}are {count}", todo)
        with stop_signals_handled_by(self._on_signal):
            self._go_on()
            while self._processes:
                time.sleep(_POLL)
                if self._reap():
                    self._go_on()
        if self._fault:
            print(f"forescale: {self._fault}", file=sys.stderr)
            return USER
        return INTERRUPTED if self.stop_signal is not None else DONE

    def _go_on(self) -> None:
        """Decide and start cells. After an error nothing starts, but running cells go on."""
        if self.stop_signal is not None or self._fault is not None:
            return
        try:
            self.advance()
        except UserError as e:
            self._fault = str(e)

    def _on_signal(self, number: int, frame) -> None:
        again, self.stop_signal = self.stop_signal is not None, number
        if not again:
            self.log(f"Stopping: {len(self._processes)} cells save a checkpoint and end.")
        for process in self._processes.values():
            process.send_signal(signal.SIGINT if again else signal.SIGTERM)

    def running(self) -> Collection[str]:
        return self._processes

    def start_ready(self) -> None:
        """Start cells; a branch needs its trunk's checkpoint."""
        started = {s.cell.name for s in self.study.states() if s.status != "ready"}
        for cell in self.study.unfinished():
            if len(self._processes) >= self.keys.at_once:
                return
            trunk, step = cell.trunk, cell.trunk_step or 0
            can_start = trunk is None or cell.name in started
            can_start = can_start or self.study.run(trunk or "").checkpoint_path(step).is_dir()
            if can_start and cell.name not in self._processes:
                expect_within_cap(self.study, cell, self._processes)
                self._start(cell)

    def _start(self, cell: Cell) -> None:
        path = self._log_of(cell.name)
        path.parent.mkdir(exist_ok=True)
        if path.is_symlink():  # to what isn't the study's
            raise UserError(str(path), "is a link, so no output is added to it", "remove it")
        at_once = 1 if cell.role == "target" else self.keys.at_once
        ranks = self.study.plan.common.ranks
        threads = max(1, len(os.sched_getaffinity(0)) // at_once // ranks)
        words = [*self.study.arguments(cell), f"launch.processes={ranks}", *self._stored]
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if self._gpus:
            self._used[cell.name] = environment["CUDA_VISIBLE_DEVICES"] = self._free.pop(0)
        with open(path, "ab") as f:
            self._processes[cell.name] = subprocess.Popen(
                [sys.executable, "-P", "-m", "forescale", "train", *words],
                stdin=subprocess.DEVNULL,
                stdout=f,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self.study.event("cell_started", cell=cell.name, pid=self._processes[cell.name].pid)

    def _log_of(self, name: str) -> Path:
        return self.study.folder / "logs" / f"{name}.log"

    def _reap(self) -> bool:
        """Record the cells that have ended; True if there are any."""
        before = len(self._processes)
        for name, process in list(self._processes.items()):
            if (code := process.poll()) is None:
                continue
            del self._processes[name]
            if name in self._used:
                self._free.insert(0, self._used.pop(name))
            path, why = self._log_of(name), ""
            if code not in (DONE, INTERRUPTED) and path.exists():
                text = path.read_bytes()[-_TAIL:].decode(errors="replace")
                _, mark, message = text.rpartition("forescale: ")  # an error message, or a line
                why = (message.strip() if mark else text.strip().rpartition("\n")[2])[:500]
            self.study.event("cell_ended", cell=name, code=code, why=why)
            state = self.study.state(next(c for c in self.study.plan.cells if c.name == name))
            self.log(summary(self.study, state))
            if code == USER and state.status != "diverged":
                self._fault = f"{name}: {why or f'see {path}'}"
        return len(self._processes) < before
