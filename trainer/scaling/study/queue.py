"""Runs the cells of a study in SLURM's queue: as job arrays; branches wait for their trunks.

    ready cells -> studies/<name>/waves/NNNN.txt, one line per run -> one array, at_once at a time
    a branch    -> a wave of its own, which starts after its trunk's job has succeeded

Invariant: a cell that is in the queue is not submitted again, whoever submitted it, and submitted
cells are within the cap. Jobs outlive the launcher; the same command follows them again.
"""

import shlex
import time
from collections.abc import Sequence

from forescale.errors import DONE, INTERRUPTED
from forescale.resilience.launcher import stop_signals_handled_by
from forescale.scaling.design.cells import Cell
from forescale.scaling.study.decisions import Log, add_target, advance
from forescale.scaling.study.directory import Study
from forescale.scaling.study.local import expect_within_cap
from forescale.slurm.submission import in_queue, newest
from forescale.slurm.submit import submit
from forescale.storage import write_file

_POLL = 15.0  # seconds between two questions to the queue


class Queue:
    """Runs one study in the queue. arguments: of `submit`, the profile's first; follow: stay until
    nothing is left; the rest as for Launcher."""

    def __init__(
        self,
        study: Study,
        arguments: Sequence[str],
        at_once: int,
        log: Log,
        follow: bool = True,
        target: bool = False,
        trust: bool = False,
    ):
        self.study, self._arguments, self._at_once = study, list(arguments), at_once
        self.log, self._follow, self._target = log, follow, target
        self._trust = trust
        self._stop_signal: int | None = None
        self._ended = {s.cell.name for s in study.states() if s.has_ended}

    def go(self) -> int:
        """Return 0 when nothing is left, or after submitting without `follow`; 75 after a stop
        signal, while the jobs go on."""
        with stop_signals_handled_by(self._on_signal):
            while self._stop_signal is None:
                held = self._go_on()
                if not held:
                    return DONE
                if not self._follow:
                    self.log(
                        f"{len(held)} cells are in the queue. Run the same command again to go on."
                    )
                    return DONE
                self._wait()
        self.log("The jobs stay in the queue. Run the same command again to follow them.")
        return INTERRUPTED

    def _on_signal(self, number: int, frame) -> None:
        self._stop_signal = number

    def _wait(self) -> None:
        end = time.monotonic() + _POLL
        while self._stop_signal is None and time.monotonic() < end:
            time.sleep(0.2)

    def _go_on(self) -> dict[str, str]:
        """Decide and submit; return the cells in the queue with their job ids."""
        self._log_ended()
        advance(self.study, self.log)
        held = self._held()
        self._submit_all(held)
        held = self._held()
        if self._target and not held and not self.study.has_target:
            add_target(self.study, self.log)
            self._submit_all(held)
            held = self._held()
        return held

    def _held(self) -> dict[str, str]:
        runs = [self.study.run(c.name) for c in self.study.plan.cells]
        found = in_queue(s for run in runs if run.config.exists() for s in newest(run))
        return {s.run.name: job.id for s, job in found}

    def _submit_all(self, held: dict[str, str]) -> None:
        waves: dict[str | None, list[Cell]] = {}
        states, under_way = {s.cell.name: s for s in self.study.states()}, set(held)
        for cell in self.study.wanted():
            if cell.name not in held:
                expect_within_cap(self.study, cell, under_way)
                under_way.add(cell.name)
                awaited = cell.trunk if cell.trunk and not states[cell.trunk].has_ended else None
                waves.setdefault(awaited, []).append(cell)
        if None in waves:
            self._wave(waves.pop(None), None)
            held = self._held() if waves else held
        for trunk, cells in waves.items():
            if trunk in held:
                self._wave(cells, held[trunk])

    def _wave(self, cells: Sequence[Cell], after: str | None) -> None:
        folder = self.study.folder / "waves"
        folder.mkdir(exist_ok=True)
        path = folder / f"{len(list(folder.glob('*.txt'))) + 1:04d}.txt"
        lines = [shlex.join(self.study.arguments(cell)) for cell in cells]
        write_file(path, ("\n".join(lines) + "\n").encode())
        wait = [f"slurm.after=['{after}']"] if after else []
        arguments = [
            *self._arguments,
            f"slurm.runs={path}",
            f"slurm.at_once={self._at_once}",
            *wait,
        ]
        submit(arguments, self._trust)
        for cell in cells:
            self.study.event("cell_submitted", cell=cell.name, wave=path.name, after=after)

    def _log_ended(self) -> None:
        for s in self.study.states():
            if s.has_ended and s.cell.name not in self._ended:
                self._ended.add(s.cell.name)
                loss = f"loss {s.loss:.4f}" if s.status == "complete" else f"{s.status} ({s.why})"
                self.log(f"{s.cell.name}: {loss}")
