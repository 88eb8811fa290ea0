"""Saves the engine's state: copied between two steps, then written, published and followed by
retention in a thread of its own, while training goes on.

Invariant: at most one save is in flight. Its decisions (that it failed, that it is tried again,
what is deleted) are the same on all ranks, through a process group of its own. A rank that is
killed before the one rename leaves the previous checkpoint as the newest.
"""

import shutil
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from forescale.checkpoint.reader import Position
from forescale.checkpoint.retention import Keep, Retention, leftovers
from forescale.checkpoint.writer import Midway, Snapshot, write
from forescale.engine.portable.fragments import HostCopy
from forescale.engine.ranks import Ranks
from forescale.engine.step import Engine
from forescale.ground.errors import Transient, retried
from forescale.run.directory import Attempt, Run

T = TypeVar("T")


class Saver:
    """The saves of one attempt. Every rank makes one and calls its methods at the same time.

    facts: returns further content of state.json, at the moment of the copy. background: write from
    a copy in memory while training goes on; otherwise `begin` itself writes, and nothing is copied.
    midway: called with the step and this rank's file when half of it is written, in the writing
    thread. `failed`: True if the save in flight has failed on this rank; `finish` raises the error.
    """

    _group = "saves"  # of ranks in the background

    def __init__(
        self,
        run: Run,
        attempt: Attempt,
        engine: Engine,
        facts: Callable[[], dict[str, Any]],
        keep: Keep,
        background: bool = True,
        midway: Midway = lambda step, path: None,
    ):
        world = engine.world
        self._ranks: Ranks = world.in_background(self._group) if background else world
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
        facts = self._facts()
        if self._ranks.is_main:  # size and sha256 of the attempt's files of rows so far
            files = (self._attempt.metrics, self._attempt.events)
            facts = {**facts, "logged": {f.path.name: vars(f.state()) for f in files}}
        snapshot = Snapshot.of(self._engine, position, facts, copied)
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
        except BaseException as e:  # of any kind: `finish` raises it in the training thread
            self._fault = e
            self.failed = True

    def _publish(self, snapshot: Snapshot, began: float, stall: float | None) -> None:
        ranks, step = self._ranks, snapshot.position.step
        self._retried(step, self._prepare)
        number, midway = self._attempt.number, self._midway
        size = self._retried(step, lambda: write(self._run, number, snapshot, ranks, midway))
        self._retention.saved(step)
        seconds = time.perf_counter() - began
        facts = {
            "step": step,
            "bytes": size,
            "seconds": round(seconds, 6),
            "stall_seconds": round(seconds if stall is None else stall, 6),
        }
        events = self._attempt.events.path
        report = lambda: self._attempt.event("checkpoint_saved", **facts)  # noqa: E731
        self._retried(step, lambda: ranks.from_main(report, events))
        self._retried(step, lambda: self._retention(ranks))

    def _prepare(self) -> None:
        def sweep() -> None:
            """Remove unfinished saves and deletions of earlier attempts."""
            names = []
            for path in leftovers(self._run, self._attempt.number):
                shutil.rmtree(path, ignore_errors=True)
                names.append(path.name)
            if names:
                self._attempt.event("leftovers_removed", names=names)

        if not self._swept:
            self._ranks.from_main(sweep, self._run.checkpoints)
            self._swept = True
        # No checkpoint may hold a step that has no durable row.
        metrics = self._attempt.metrics
        self._ranks.from_main(metrics.sync, metrics.path)

    def _retried(self, step: int, work: Callable[[], T]) -> T:
        """Do `work`, and again if the storage fails for a moment; every rank calls it. Each failure
        is an event, written before the next try, and if that fails, before the one after."""
        faults: list[dict[str, Any]] = []

        def report() -> None:
            while faults:
                self._attempt.event("save_retried", step=step, **faults[0])
                del faults[0]

        def tried() -> T:
            if faults:
                self._ranks.from_main(report, self._attempt.events.path)
            return work()

        def failed(error: Transient, pause: float) -> None:
            faults.append({"error": str(error), "pause": pause})
            if self._ranks.is_main:
                text = f"forescale: the save of step {step:,} failed, next try in {pause:g} s"
                print(f"{text}: {error}", file=sys.stderr, flush=True)

        return retried(tried, failed)
