"""Runs the cells of a study on this machine: several at once, each as its own `forescale train`.

Invariant: a cell starts only if its cost is still within the cap. Cells never outlive the launcher
(on Linux, however it ends); the same command resumes each from its last checkpoint. A cell that
ends without a loss is reported once and starts again only with launch.retry=true.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

from forescale.config.target import STORED
from forescale.errors import DONE, INTERRUPTED, USER, UserError
from forescale.resilience.launcher import die_with_parent, gpus, stop_signals_handled_by
from forescale.scaling.design.cells import Cell
from forescale.scaling.study.decisions import add_target, advance
from forescale.scaling.study.directory import Study
from forescale.scaling.study.states import CellState

_POLL = 0.2  # seconds
_TAIL = 4096  # bytes of a log file in which the last message is looked for


def ready(study: Study) -> list[Cell]:
    """Return the cells that can start or resume now; a branch needs its trunk's checkpoint."""
    started = {s.cell.name for s in study.states() if s.status != "ready"}
    return [
        cell
        for cell in study.wanted()
        if cell.trunk is None
        or cell.name in started
        or study.run(cell.trunk).checkpoint_path(cell.trunk_step or 0).is_dir()
    ]


def expect_within_cap(study: Study, cell: Cell, under_way: Collection[str]) -> None:
    """Raise UserError if this cell would exceed the cap.

    Cells under way count with their whole cost. The target is exempt.
    """
    if cell.role == "target":
        return
    states = {s.cell.name: s for s in study.states()}
    spent = sum(
        max(s.spent, s.cell.cost) if name in under_way else s.spent
        for name, s in states.items()
        if s.cell.role != "target"
    )
    left = cell.cost * (1 - states[cell.name].done)
    if spent + left > study.plan.cap:
        problem = f"{spent:.4g} of {study.plan.cap:.4g} FLOPs are spent or under way"
        problem = f"{problem}, and {cell.name} needs {left:.3g} more"
        raise UserError(
            "plan.cap", problem, "end the study here, or plan a new one with a larger cap"
        )


class Launcher:
    """Runs one study on this machine. at_once: cells at the same time; log: gets a line when a cell
    ends and at each decision; target: whether to train the target after all others; trust: whether
    cells may run classes that the study's files name.

    On a machine with GPUs a cell has one for each of its ranks, and no other has those meanwhile.
    """

    def __init__(
        self,
        study: Study,
        at_once: int,
        log: Callable[[str], None],
        target: bool = False,
        trust: bool = False,
    ):
        self.study, self.at_once, self.log, self._target = study, at_once, log, target
        self._stored = [] if trust else [STORED]
        self._running: dict[str, subprocess.Popen] = {}
        self._gpus, ranks = gpus(), study.plan.common.ranks
        groups = [self._gpus[i : i + ranks] for i in range(0, len(self._gpus), ranks)]
        self._free = [",".join(group) for group in groups if len(group) == ranks]
        self._used: dict[str, str] = {}  # GPUs by cell
        self._stop_signal: int | None = None
        self._fault: str | None = None

    def go(self) -> int:
        """Run until nothing is left and return 0; 75 after a stop signal; 2 if a cell reported an
        error of the user's. Raises UserError if the cells need more GPUs than there are."""
        _expect_gpus(len(self._gpus), self.at_once, self.study.plan.common.ranks)
        with stop_signals_handled_by(self._on_signal):
            self._go_on()
            while self._running:
                time.sleep(_POLL)
                if self._reap():
                    self._go_on()
        if self._fault:
            print(f"forescale: {self._fault}", file=sys.stderr)
            return USER
        return INTERRUPTED if self._stop_signal is not None else DONE

    def _go_on(self) -> None:
        """Decide and start cells. After an error nothing starts, but running cells go on."""
        if self._stop_signal is not None or self._fault is not None:
            return
        try:
            advance(self.study, self.log)
            self._start_ready()
            if self._target and not self._running and not self.study.has_target:
                add_target(self.study, self.log)
                self._start_ready()
        except UserError as e:
            self._fault = str(e)

    def _on_signal(self, number: int, frame) -> None:
        again, self._stop_signal = self._stop_signal is not None, number
        if not again:
            self.log(f"Stopping: {len(self._running)} cells save a checkpoint and end.")
        for process in self._running.values():
            process.send_signal(signal.SIGINT if again else signal.SIGTERM)

    def _start_ready(self) -> None:
        for cell in ready(self.study):
            if len(self._running) >= self.at_once:
                return
            if cell.name not in self._running:
                expect_within_cap(self.study, cell, self._running)
                self._start(cell)

    def _start(self, cell: Cell) -> None:
        path = self.study.folder / "logs" / f"{cell.name}.log"
        path.parent.mkdir(exist_ok=True)
        alone = cell.role == "target"
        ranks = self.study.plan.common.ranks
        threads = max(1, len(os.sched_getaffinity(0)) // (1 if alone else self.at_once) // ranks)
        words = [*self.study.arguments(cell), f"launch.processes={ranks}", *self._stored]
        own: dict[str, str] = {}
        if self._gpus:
            self._used[cell.name] = own["CUDA_VISIBLE_DEVICES"] = self._free.pop(0)
        with open(path, "ab") as f:
            self._running[cell.name] = subprocess.Popen(
                [sys.executable, "-P", "-m", "forescale", "train", *words],
                stdin=subprocess.DEVNULL,
                stdout=f,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(threads), **os.environ, **own},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self.study.event("cell_started", cell=cell.name, pid=self._running[cell.name].pid)

    def _reap(self) -> bool:
        """Record the cells that have ended; True if there are any."""
        before = len(self._running)
        for name, process in list(self._running.items()):
            if (code := process.poll()) is None:
                continue
            del self._running[name]
            if name in self._used:
                self._free.insert(0, self._used.pop(name))
            path = self.study.folder / "logs" / f"{name}.log"
            why = "" if code in (DONE, INTERRUPTED) else last_message(path)
            self.study.event("cell_ended", cell=name, code=code, why=why)
            state = self.study.state(next(c for c in self.study.plan.cells if c.name == name))
            self.log(summary(self.study, state))
            if code == USER and state.status != "diverged":
                self._fault = f"{name}: {why or f'see {path}'}"
        return len(self._running) < before


def _expect_gpus(found: int, at_once: int, ranks: int) -> None:
    if not found or at_once * ranks <= found:
        return
    problem = (
        f"{at_once} at once, {ranks} ranks each, need {at_once * ranks} GPUs; here are {found}"
    )
    todo = f"write launch.at_once={found // ranks}" if ranks <= found else "use a larger machine"
    raise UserError("launch.at_once", problem, todo)


def summary(study: Study, s: CellState) -> str:
    """Return a line about a cell that ended."""
    c, ended = s.cell, [x.has_ended for x in study.states()]
    result = (
        f"loss {s.loss:.4f}" if s.status == "complete" else f"{s.status} ({s.why})" * bool(s.why)
    )
    return (
        f"{c.name}: N={c.shape.parameters:,} D={c.tokens:,} rate {c.learning_rate:.2g}: "
        f"{result or s.status} in {s.seconds:.0f} s | {sum(ended)}/{len(ended)} cells, "
        f"{study.spent / study.plan.cap:.1%} of the cap"
    )


def last_message(log: Path) -> str:
    """Return the last error message of a command in its log, or its last line."""
    text = log.read_bytes()[-_TAIL:].decode(errors="replace") if log.exists() else ""
    _, mark, message = text.rpartition("forescale: ")
    return (message.strip() if mark else text.strip().rpartition("\n")[2])[:500]
