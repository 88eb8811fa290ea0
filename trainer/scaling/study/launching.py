"""Launches the cells of a study: on this machine, or in SLURM's queue.

    here           several at once, each as its own `forescale train`; they never outlive the
                   launcher (on Linux, however it ends)
    in the queue   ready cells -> studies/<name>/waves/NNNN.txt, one line per run -> one array,
                   at_once at a time; a branch is in a wave of its own, which starts after its
                   trunk's job has succeeded; jobs outlive the launcher

Invariant: a cell starts only if its cost is still within the cap, and a cell that runs or is in the
queue is not started again, whoever started it. The same command goes on. A cell that ends without a
loss is reported once and starts again only with launch.retry=true.
"""

import re
import select
import shlex
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence

import numpy as np
from scipy.optimize import nnls

from forescale.config.compose import compose
from forescale.config.target import CELL, STORED, targets
from forescale.config.train import TrainJob
from forescale.ground.console import is_terminal, span
from forescale.ground.errors import DONE, INTERRUPTED, PREFIX, USER, UserError
from forescale.ground.storage import write_file
from forescale.resilience.launcher import stop_signals_handled_by
from forescale.resilience.pool import Pool
from forescale.run.rows import read_rows
from forescale.scaling.config import LaunchKeys
from forescale.scaling.design.cells import Cell
from forescale.scaling.study.decisions import add_target, advance
from forescale.scaling.study.directory import CellState, Study
from forescale.slurm.submission import in_queue, newest
from forescale.slurm.submit import submit

_POLL, _ASK = 0.2, 15.0  # seconds: between looks at processes; between questions to the queue
_KNOWN = 4  # complete cells from which the time of others is told


class Launcher(ABC):
    """Runs one study. keys: how; log: gets a line when a cell ends and at each decision."""

    def __init__(self, study: Study, keys: LaunchKeys, log: Callable[[str], None]):
        self.study, self.keys, self.log = study, keys, log

    @property
    @abstractmethod
    def stop_signal(self) -> int | None:
        """The stop signal that came; None before one."""

    @abstractmethod
    def go(self) -> int:
        """Run until nothing is left and return the exit code."""

    @abstractmethod
    def running(self) -> Collection[str]:
        """Return the names of the cells that run or are in the queue."""

    @abstractmethod
    def start_ready(self) -> None:
        """Start the cells that can start now, as many as may run at once."""

    def advance(self) -> None:
        """Decide and start cells; once nothing is left, predict and start the target too. A stop
        signal may come while a stage is decided: nothing starts after it."""
        advance(self.study, self.log, self._goes_on)
        if self.stop_signal is None:
            self.start_ready()
        has_target = any(c.role == "target" for c in self.study.plan.cells)
        is_over = not (self.running() or has_target) and self.stop_signal is None
        if self.keys.target and is_over:
            add_target(self.study, self.log)
            self.start_ready()

    def _goes_on(self, question: str) -> bool:
        """Return the answer of the key, or of who sits at the terminal; True without one. A stop
        signal is no."""
        if self.keys.contradiction != "ask" or not is_terminal(sys.stdin):
            return self.keys.contradiction != "stop"
        self.log(f"{question} [y/N]")
        while self.stop_signal is None:
            if select.select([sys.stdin], [], [], _POLL)[0]:
                return sys.stdin.readline().strip().lower() in ("y", "yes")
        return False


def expect_within_cap(study: Study, cell: Cell, under_way: Collection[str]) -> None:
    """Raise UserError if this cell would exceed the cap. Cells under way count with their whole
    cost. The target is exempt."""
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
        todo = "end the study here, or plan a new one with a larger cap"
        raise UserError("plan.cap", problem, todo)


def summary(study: Study, s: CellState) -> str:
    """Return a line about a cell that ended."""
    c, ended = s.cell, [x.has_ended for x in study.states()]
    result = f"{s.status} ({s.why})" if s.why else s.status
    if s.status == "complete":
        result = f"loss {s.loss:.4f}"
        if study.plan.kind == "mixtures":
            rows = read_rows(study.run(c.name).metrics, kind="validation")
            losses = {row["dataset"]: row["loss"] for row in rows}
            goal = study.job.goal or dict.fromkeys(dict(c.weights), 1.0)
            mean = sum(goal[name] * losses[name] for name in goal) / sum(goal.values())
            result = f"goal {mean:.4f}, {result}"
    return (
        f"{c.name}: N={c.shape.parameters:,} D={c.tokens:,} rate {c.learning_rate:.2g}: "
        f"{result} in {s.seconds:.0f} s | {sum(ended)}/{len(ended)} cells, "
        f"{study.spent / study.plan.cap:.1%} of the cap"
    )


def seconds_left(states: Sequence[CellState], at_once: int) -> float | None:
    """Return the wall clock until all planned cells have ended, in seconds; None before it can be
    told. What a cell takes is a start, so much a step and so much a FLOP, all of them fitted to the
    cells that are complete (non-negative least squares)."""

    def parts(s: CellState) -> tuple[float, float, float]:
        return 1.0, float(s.cell.steps), s.cell.cost

    complete = [s for s in states if s.status == "complete"]
    if len(complete) < _KNOWN:
        return None
    X = np.array([parts(s) for s in complete])
    scale = X.max(axis=0)
    costs, _ = nnls(X / scale, np.array([s.seconds for s in complete]))
    left = [(1 - s.done) * (parts(s) / scale @ costs) for s in states if not s.has_ended]
    return float(sum(left)) / at_once


def expect_no_code(study: Study) -> None:
    """Raise UserError if the study's files name classes of the user's own, or read the environment
    by a resolver such as ${oc.env:NAME}, or a secret by its name: launching would do what a file
    says, and not the command. The job of each cell is judged again where it is composed."""
    todo = "give launch.trust=true if you trust the study"
    for cell in study.plan.cells:
        for text in study.arguments(cell):
            if re.search(r"\$\{.*:", text) or f"${PREFIX}" in text:
                problem = f"the stored argument {text} reads more than the study's own files"
                raise UserError(str(study.folder), problem, todo)
    for recipe in [r.arguments for r in study.plan.recipes] or [()]:
        job = compose(TrainJob, [*study.job.plan.shared, *recipe])
        for key, target in targets(job).items():
            problem = f"plan.arguments names code to run, {key}={target}"
            raise UserError(str(study.folder / "study.yaml"), problem, todo)


class LocalLauncher(Launcher):
    """Runs one study on this machine, its cells in a pool. Raises UserError if the cells need more
    GPUs than there are."""

    def __init__(self, study: Study, keys: LaunchKeys, log: Callable[[str], None]):
        super().__init__(study, keys, log)
        self._words = [CELL] if keys.trust else [CELL, STORED]
        ranks = study.plan.common.ranks
        self._pool = Pool(study.folder / "logs", keys.at_once, log, ranks=ranks)
        self._fault: UserError | None = None

    @property
    def stop_signal(self) -> int | None:
        return self._pool.stop_signal

    def go(self) -> int:
        """Run until nothing is left and return 0; 75 after a stop signal. Raises UserError, once no
        cell runs, if one reported an error of the user's, or if nothing could be decided."""
        with self._pool.stopping():
            self._go_on()
            while self._pool.running:
                time.sleep(_POLL)
                if self._reap():
                    self._go_on()
        if self._fault:
            raise self._fault
        if self.stop_signal is not None:
            self.log(f"{len(self.study.unfinished())} cells are left: run the same command again.")
        return INTERRUPTED if self.stop_signal is not None else DONE

    def _go_on(self) -> None:
        """Decide and start cells. After an error nothing starts, but running cells go on."""
        if self.stop_signal is not None or self._fault is not None:
            return
        try:
            self.advance()
        except UserError as e:
            self._fault = e

    def running(self) -> Collection[str]:
        return self._pool.running

    def start_ready(self) -> None:
        """Start cells; a branch needs its trunk's checkpoint."""
        started = {s.cell.name for s in self.study.states() if s.status != "ready"}
        for cell in self.study.unfinished():
            if not self._pool.has_room:
                return
            trunk, step = cell.trunk, cell.trunk_step or 0
            can_start = trunk is None or cell.name in started
            can_start = can_start or self.study.run(trunk or "").checkpoint_path(step).is_dir()
            if can_start and cell.name not in self._pool.running:
                expect_within_cap(self.study, cell, self._pool.running)
                self._start(cell)

    def _start(self, cell: Cell) -> None:
        ranks = f"launch.processes={self.study.plan.common.ranks}"
        words = [*self.study.arguments(cell), ranks, *self._words]
        process = self._pool.start(cell.name, words, alone=cell.role == "target")
        self.study.event("cell_started", cell=cell.name, pid=process)

    def _left(self) -> str:
        seconds = seconds_left(self.study.states(), self.keys.at_once)
        return f", about {span(seconds)} left" if seconds else ""

    def _reap(self) -> bool:
        """Record the cells that have ended; True if there are any."""
        ends = self._pool.ended()
        for end in ends:
            self.study.event("cell_ended", cell=end.name, code=end.code, why=end.why)
            state = self.study.state(next(c for c in self.study.plan.cells if c.name == end.name))
            self.log(summary(self.study, state) + self._left())
            if end.code == USER and state.status != "diverged":
                where = self.study.folder / "logs" / f"{end.name}.log"
                problem = end.why.rstrip(".") or "ended with an error"
                self._fault = UserError(end.name, problem, f"see {where}")
        return bool(ends)


class QueueLauncher(Launcher):
    """Runs one study in the queue. With keys.follow, it stays until nothing is left."""

    def __init__(self, study: Study, keys: LaunchKeys, log: Callable[[str], None]):
        super().__init__(study, keys, log)
        self._ended = {s.cell.name for s in study.states() if s.has_ended}
        self._signal: int | None = None

    @property
    def stop_signal(self) -> int | None:
        return self._signal

    def go(self) -> int:
        """Return 0 when nothing is left, or after submitting without `follow`; 75 after a stop
        signal, while the jobs go on."""
        with stop_signals_handled_by(self._on_signal):
            while self.stop_signal is None:
                for s in self.study.states():
                    if s.has_ended and s.cell.name not in self._ended:
                        self._ended.add(s.cell.name)
                        self.log(summary(self.study, s))
                self.advance()
                if not (jobs := self.running()):
                    return DONE
                if not self.keys.follow:
                    count = f"{len(jobs)} cells are in the queue."
                    self.log(f"{count} Run the same command again to go on.")
                    return DONE
                end = time.monotonic() + _ASK
                while self.stop_signal is None and time.monotonic() < end:
                    time.sleep(0.2)
        self.log("The jobs stay in the queue. Run the same command again to follow them.")
        return INTERRUPTED

    def _on_signal(self, number: int, frame) -> None:
        self._signal = number

    def running(self) -> dict[str, str]:
        runs = [self.study.run(c.name) for c in self.study.plan.cells]
        jobs = in_queue(s for run in runs if run.config.exists() for s in newest(run))
        return {s.run.name: job.id for s, job in jobs}

    def start_ready(self) -> None:
        jobs = self.running()
        waves: dict[str | None, list[Cell]] = {}
        states, under_way = {s.cell.name: s for s in self.study.states()}, set(jobs)
        for cell in self.study.unfinished():
            if cell.name not in jobs:
                expect_within_cap(self.study, cell, under_way)
                under_way.add(cell.name)
                awaited = cell.trunk if cell.trunk and not states[cell.trunk].has_ended else None
                waves.setdefault(awaited, []).append(cell)
        if None in waves:
            self._submit(waves.pop(None), None)
            jobs = self.running() if waves else jobs
        for trunk, cells in waves.items():
            if trunk in jobs:
                self._submit(cells, jobs[trunk])

    def _submit(self, cells: Sequence[Cell], after: str | None) -> None:
        folder, keys = self.study.folder / "waves", self.keys
        folder.mkdir(exist_ok=True)
        path = folder / f"{len(list(folder.glob('*.txt'))) + 1:04d}.txt"
        lines = [shlex.join(self.study.arguments(cell)) for cell in cells]
        write_file(path, ("\n".join(lines) + "\n").encode())
        wait = [f"slurm.after=['{after}']"] if after else []
        options = [f"slurm={keys.slurm}", *keys.arguments]
        options += [f"slurm.runs={path}", f"slurm.at_once={keys.at_once}", *wait]
        submit(options, keys.trust)
        for cell in cells:
            self.study.event("cell_submitted", cell=cell.name, wave=path.name, after=after)
