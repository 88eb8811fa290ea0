"""Launches what a study wants run, in SLURM's queue: arrays of cells, and branches that wait for
their trunks.

    ready cells -> studies/<name>/waves/NNNN.txt, a line a run -> one array, so many at once
    a branch    -> a wave of its own, which starts when its trunk's job has ended well

Invariant: a cell that the queue holds is not submitted again, whoever submitted it; and what is
submitted is within the cap. Jobs outlive the launcher: the same command goes on following them.
"""

import shlex
import time
from collections.abc import Sequence

from forescale.errors import DONE, INTERRUPTED
from forescale.resilience.launcher import heard
from forescale.scaling.design.cells import Cell
from forescale.scaling.study.decisions import Tell, add_target, advance
from forescale.scaling.study.directory import Study
from forescale.scaling.study.local import expect_within_cap
from forescale.slurm.submission import in_queue, newest
from forescale.slurm.submit import submit
from forescale.storage import write_file

_POLL = 15.0  # seconds between two questions to the queue


class Queue:
    """The queue's part in one study. words: more overrides of the jobs, the profile's first;
    follow: stay until nothing is left."""

    def __init__(
        self,
        study: Study,
        words: Sequence[str],
        at_once: int,
        tell: Tell,
        follow: bool = True,
        target: bool = False,
    ):
        self.study, self._words, self._at_once = study, list(words), at_once
        self.tell, self._follow, self._target = tell, follow, target
        self._wish: int | None = None
        self._ended = {s.cell.name for s in study.states() if s.has_ended}

    def go(self) -> int:
        """0 when nothing is left, or at once without `follow`; 75 after a signal: jobs go on."""
        with heard(self._hear):
            while self._wish is None:
                held = self._go_on()
                if not held:
                    return DONE
                if not self._follow:
                    self.tell(f"{len(held)} cells are in the queue; the same command goes on.")
                    return DONE
                self._wait()
        self.tell("Left the jobs in the queue; the same command follows them on.")
        return INTERRUPTED

    def _hear(self, number: int, frame) -> None:
        self._wish = number

    def _wait(self) -> None:
        end = time.monotonic() + _POLL
        while self._wish is None and time.monotonic() < end:
            time.sleep(0.2)

    def _go_on(self) -> dict[str, str]:
        """Decide and submit; the cells that the queue holds then, and their jobs."""
        self._tell_ended()
        advance(self.study, self.tell)
        held = self._held()
        self._submit_all(held)
        held = self._held()
        if self._target and not held and not self.study.has_target:
            add_target(self.study, self.tell)
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
        lines = [shlex.join(self.study.words(cell)) for cell in cells]
        write_file(path, ("\n".join(lines) + "\n").encode())
        wait = [f"slurm.after=['{after}']"] if after else []
        words = [*self._words, f"slurm.runs={path}", f"slurm.at_once={self._at_once}", *wait]
        submit(words)
        for cell in cells:
            self.study.event("submitted", cell=cell.name, wave=path.name, after=after)

    def _tell_ended(self) -> None:
        for s in self.study.states():
            if s.has_ended and s.cell.name not in self._ended:
                self._ended.add(s.cell.name)
                loss = f"loss {s.loss:.4f}" if s.word == "complete" else f"{s.word} ({s.why})"
                self.tell(f"{s.cell.name}: {loss}")
