"""Launches what a study wants run, here: some cells at once, each a `forescale train` of its own.

Invariant: a cell begins only where its cost is still within the cap. Cells never outlive the
launcher (on Linux, whatever ends it): the same command goes on with each where it was saved. What
ended without a loss is told once and not begun again until it is asked for.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path

from forescale.errors import DONE, INTERRUPTED, USER, UserError
from forescale.resilience.launcher import die_with_parent, heard
from forescale.scaling.design.cells import Cell
from forescale.scaling.study.decisions import add_target, advance
from forescale.scaling.study.directory import State, Study

_POLL = 0.2  # seconds
_TAIL = 4096  # bytes of a log in which the last words are looked for


def ready(study: Study) -> list[Cell]:
    """What could begin or go on now; a branch, once its trunk has saved where it leaves."""
    begun = {s.cell.name for s in study.states() if s.word != "ready"}
    return [
        cell
        for cell in study.wanted()
        if cell.trunk is None
        or cell.name in begun
        or study.run(cell.trunk).checkpoint_path(cell.trunk_step or 0).is_dir()
    ]


def expect_within_cap(study: Study, cell: Cell, under_way: Collection[str]) -> None:
    """Raises UserError where a cell would pass the cap. What is under way counts as spent to its
    end; the target has been asked for by its own price."""
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
        what = f"{spent:.4g} of {study.plan.cap:.4g} FLOPs are spent or under way"
        what = f"{what}, and {cell.name} needs {left:.3g}"
        raise UserError("plan.cap", what, "the study ends here, or plan a new one with more")


class Launcher:
    """Of one study, on this machine. at_once: cells; tell: hears a line each time one ends and at
    each decision; target: train it when all else has ended."""

    def __init__(
        self, study: Study, at_once: int, tell: Callable[[str], None], target: bool = False
    ):
        self.study, self.at_once, self.tell, self._target = study, at_once, tell, target
        self._running: dict[str, subprocess.Popen] = {}
        self._wish: int | None = None
        self._fault: str | None = None

    def go(self) -> int:
        """Until nothing is left: 0. 75 after a signal; 2 after a fault of the user's in a cell."""
        with heard(self._hear):
            self._go_on()
            while self._running:
                time.sleep(_POLL)
                if self._reap():
                    self._go_on()
        if self._fault:
            print(f"forescale: {self._fault}", file=sys.stderr)
            return USER
        return INTERRUPTED if self._wish is not None else DONE

    def _go_on(self) -> None:
        """Decide and begin. What stands in the way lets those that run come to their end."""
        if self._wish is not None or self._fault is not None:
            return
        try:
            advance(self.study, self.tell)
            self._begin()
            if self._target and not self._running and not self.study.has_target:
                add_target(self.study, self.tell)
                self._begin()
        except UserError as e:
            self._fault = str(e)

    def _hear(self, number: int, frame) -> None:
        again, self._wish = self._wish is not None, number
        if not again:
            self.tell(f"Stopping: {len(self._running)} cells save and end.")
        for process in self._running.values():
            process.send_signal(signal.SIGINT if again else signal.SIGTERM)

    def _begin(self) -> None:
        for cell in ready(self.study):
            if len(self._running) >= self.at_once:
                return
            if cell.name not in self._running:
                expect_within_cap(self.study, cell, self._running)
                self._start(cell)

    def _start(self, cell: Cell) -> None:
        log = self.study.folder / "logs" / f"{cell.name}.log"
        log.parent.mkdir(exist_ok=True)
        alone = cell.role == "target"
        threads = max(1, len(os.sched_getaffinity(0)) // (1 if alone else self.at_once))
        with open(log, "ab") as f:
            self._running[cell.name] = subprocess.Popen(
                [sys.executable, "-P", "-m", "forescale", "train", *self.study.words(cell)],
                stdin=subprocess.DEVNULL,
                stdout=f,
                stderr=subprocess.STDOUT,
                env={"OMP_NUM_THREADS": str(threads), **os.environ},
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self.study.event("begun", cell=cell.name, pid=self._running[cell.name].pid)

    def _reap(self) -> bool:
        """Whether a cell has ended."""
        before = len(self._running)
        for name, process in list(self._running.items()):
            if (code := process.poll()) is None:
                continue
            del self._running[name]
            log = self.study.folder / "logs" / f"{name}.log"
            why = "" if code in (DONE, INTERRUPTED) else last_words(log)
            self.study.event("ended", cell=name, code=code, why=why)
            state = self.study.state(next(c for c in self.study.plan.cells if c.name == name))
            self.tell(line(self.study, state))
            if code == USER and state.word != "diverged":
                self._fault = f"{name}: {why or f'see {log}'}"
        return len(self._running) < before


def line(study: Study, s: State) -> str:
    """What became of a cell."""
    c, ended = s.cell, [x.has_ended for x in study.states()]
    result = f"loss {s.loss:.4f}" if s.word == "complete" else f"{s.word} ({s.why})" * bool(s.why)
    return (
        f"{c.name}: N={c.shape.parameters:,} D={c.tokens:,} rate {c.learning_rate:.2g}: "
        f"{result or s.word} in {s.seconds:.0f} s | {sum(ended)}/{len(ended)} cells, "
        f"{study.spent / study.plan.cap:.1%} of the cap"
    )


def last_words(log: Path) -> str:
    """What a command said last of a fault of the user's, or its last line."""
    text = log.read_bytes()[-_TAIL:].decode(errors="replace") if log.exists() else ""
    _, mark, said = text.rpartition("forescale: ")
    return (said.strip() if mark else text.strip().rpartition("\n")[2])[:500]
