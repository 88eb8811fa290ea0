"""Runs the cells of a study in SLURM's queue: as job arrays; branches wait for their trunks.

    ready cells -> studies/<name>/waves/NNNN.txt, one line per run -> one array, at_once at a time
    a branch    -> a wave of its own, which starts after its trunk's job has succeeded

Invariant: a cell that is in the queue is not submitted again, whoever submitted it, and submitted
cells are within the cap. Jobs outlive the launcher; the same command follows them again.
"""

import shlex
import time
from collections.abc import Callable, Sequence

from forescale.ground.errors import DONE, INTERRUPTED
from forescale.ground.storage import write_file
from forescale.resilience.launcher import stop_signals_handled_by
from forescale.scaling.config import LaunchKeys
from forescale.scaling.design.cells import Cell
from forescale.scaling.study.directory import Study
from forescale.scaling.study.launching import Launcher, expect_within_cap, summary
from forescale.slurm.submission import in_queue, newest
from forescale.slurm.submit import submit

_POLL = 15.0  # seconds between two questions to the queue


class QueueLauncher(Launcher):
    """Runs one study in the queue. With keys.follow, it stays until nothing is left."""

    def __init__(self, study: Study, keys: LaunchKeys, log: Callable[[str], None]):
        super().__init__(study, keys, log)
        self._ended = {s.cell.name for s in study.states() if s.has_ended}

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
                end = time.monotonic() + _POLL
                while self.stop_signal is None and time.monotonic() < end:
                    time.sleep(0.2)
        self.log("The jobs stay in the queue. Run the same command again to follow them.")
        return INTERRUPTED

    def _on_signal(self, number: int, frame) -> None:
        self.stop_signal = number

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
