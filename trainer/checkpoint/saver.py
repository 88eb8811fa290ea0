"""Saves the engine's state: copied between two steps, then written, published and followed by
retention in a thread of its own, while training goes on.

Invariant: at most one save is in flight. Its decisions (that it failed, what is deleted) are the
same on all ranks, through a process group of its own. A rank that is killed before the one rename
leaves the previous checkpoint as the newest.
"""

import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forescale.checkpoint.reader import Position
from forescale.checkpoint.retention import Keep, Retention, leftovers
from forescale.checkpoint.writer import Snapshot, write
from forescale.engine.ranks import Ranks
from forescale.engine.state import HostCopy
from forescale.engine.step import Engine
from forescale.run.directory import Attempt, Run


def _ignore(step: int, path: Path) -> None:
    """The default of `midway`."""


class Saver:
    """The saves of one attempt. Every rank makes one and calls its methods at the same time.

    facts: returns further content of state.json, at the moment of the copy. background: write from
    a copy in memory while training goes on; otherwise `begin` itself writes, and nothing is copied.
    midway: called with the step and this rank's file when half of it is written, in the writing
    thread. `failed`: True if the save in flight has failed on this rank; `finish` raises the error.
    """

    def __init__(
        self,
        run: Run,
        attempt: Attempt,
        engine: Engine,
        facts: Callable[[], dict[str, Any]],
        keep: Keep,
        background: bool = True,
        midway: Callable[[int, Path], None] = _ignore,
    ):
        world = engine.world
        self._ranks: Ranks = world.in_background("saves") if background else world
        self._run, self._attempt, self._engine, self._facts = run, attempt, engine, facts
        self._copy = HostCopy() if background else None
        self._midway = midway
        self._retention = Retention(run, attempt.number, keep, attempt.metrics.path, attempt.event)
        self._swept = False
        self._thread: threading.Thread | None = None
        self._fault: BaseException | None = None
        self.failed = False

    def begin(self, position: Position) -> None:
        """Save the engine's state at `position`. Raises on every rank the error of the previous
        save, and in the foreground also of this one."""
        began = time.perf_counter()
        self.finish()
        copied = self._copy.take if self._copy else list
        snapshot = Snapshot.of(self._engine, position, self._facts(), copied)
        stall = time.perf_counter() - began if self._copy else None
        work = threading.Thread(
            target=self._save, args=(snapshot, began, stall), name="save", daemon=True
        )
        if self._copy:
            self._thread = work
            work.start()
        else:
            work.run()
            self.finish()

    def finish(self) -> None:
        """Wait until the save in flight is published; raises its error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault

    def _save(self, snapshot: Snapshot, began: float, stall: float | None) -> None:
        try:
            self._publish(snapshot, began, stall)
            self._retention(self._ranks)
        except BaseException as e:  # of any kind: `finish` raises it in the training thread
            self._fault = e
            self.failed = True

    def _publish(self, snapshot: Snapshot, began: float, stall: float | None) -> None:
        attempt, step = self._attempt, snapshot.position.step
        if not self._swept:
            self._ranks.from_main(self._sweep, self._run.checkpoints)
            self._swept = True
        # No checkpoint may hold a step that has no durable row.
        self._ranks.from_main(attempt.metrics.sync, attempt.metrics.path)
        written = write(self._run, attempt.number, snapshot, self._ranks, self._midway)
        self._retention.saved(step)
        if self._ranks.is_main:
            seconds = time.perf_counter() - began
            attempt.event(
                "checkpoint_saved",
                step=step,
                bytes=written.bytes,
                seconds=round(seconds, 6),
                stall_seconds=round(seconds if stall is None else stall, 6),
            )

    def _sweep(self) -> None:
        """Remove unfinished saves and deletions of earlier attempts."""
        names = []
        for path in leftovers(self._run, self._attempt.number):
            shutil.rmtree(path, ignore_errors=True)
            names.append(path.name)
        if names:
            self._attempt.event("leftovers_removed", names=names)
