"""The heartbeat reporter of a rank: a thread beside the training that writes its heartbeats.

Invariant: it never touches the training thread, nor any storage but the node's memory, so that
heartbeats go on while the run's storage hangs. It counts time only while it runs itself: a job that
was suspended as a whole and wakes up isn't taken for one that hangs.
"""

import faulthandler
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress

from forescale.config.sections.faults import ROUND
from forescale.config.sections.runtime import HeartbeatConfig
from forescale.ground.errors import CRASHED
from forescale.resilience.diagnosis import WAITING_PLACES, python_stacks
from forescale.resilience.heartbeat import (
    ENDED,
    Heartbeat,
    NodeDirectory,
    RankStatus,
    remove_stale,
    write_node,
)
from forescale.resilience.outcome import process_mark
from forescale.resilience.phases import PhaseTimer
from forescale.resilience.watchdog import Watchdog
from forescale.run.directory import Attempt

_RECENT = 30  # heartbeats over which the pace is taken
# A rank comes to these places at every step, but only now and then has work there: the longest
# visit so far doesn't bound the next one.
_RARE = frozenset({"evaluation", "checkpoint", "recovery", "outer", *ROUND})


class HeartbeatReporter:
    """Writes the heartbeats of one rank, and runs its watchdog.

    waits: places where ranks wait for each other; leave: ends the process with an exit code; stage:
    of the pipeline, None without one.
    """

    def __init__(
        self,
        phases: PhaseTimer,
        attempt: Attempt,
        rank: int,
        world_size: int,
        settings: HeartbeatConfig,
        waits: Collection[str] = WAITING_PLACES,
        leave: Callable[[int], None] = os._exit,
        stage: int | None = None,
    ):
        self.phases, self.rank, self.leave, self.stage = phases, rank, leave, stage
        self.host, self.process = socket.gethostname(), process_mark(os.getpid())
        self.began = time.time() - (time.monotonic() - phases.began)
        self.factor, self.interval = settings.factor, settings.interval
        self.patience, startup = (d.seconds or 0.0 for d in (settings.patience, settings.startup))
        self.startup = max(startup, self.patience)
        self.node = NodeDirectory(attempt.path)
        self.watchdog = Watchdog(self.node, attempt, rank, world_size, settings, waits, leave)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._visit, self._here = (phases.at, phases.since), 0.0
        self._paces: deque[tuple[int, dict[str, float]]] = deque(maxlen=_RECENT)
        self._has_answered = False
        self._last: dict[int, tuple[int, float]] = {}  # by rank: its last change, silence since

    def start(self) -> "HeartbeatReporter":
        """Start both threads, and make the rank answer requests for its Python stacks."""
        remove_stale(self.node)
        self._stacks = open(self.node.stacks(self.rank), "wb", buffering=0)  # noqa: SIM115
        # Answers while the training thread holds the interpreter's lock and this thread can't run.
        # Only that thread's stack: other threads' frames would be read without the lock, which can
        # crash the process.
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=False)
        self.phases.mirror = self.node.mirror(self.rank)
        self.node.write(self._heartbeat())
        self._thread.start()
        self.watchdog.start()
        return self

    def move(self, attempt: Attempt) -> None:
        """Report to another attempt from now on: the launch goes on there."""
        self.watchdog.attempt = attempt

    def stop(self) -> None:
        """Announce that this rank exits, so that no other waits for it. The last rank of a node
        deletes the node's directory."""
        self._stopped.set()
        self.watchdog.stop()
        self._thread.join(timeout=10)
        self._announce_end()

    def _announce_end(self) -> None:
        # SIGUSR2 stays registered: without a handler a request for stacks would kill the rank.
        self.node.write(self._heartbeat(ENDED))
        last = [heartbeat for heartbeat, _ in self.node.read().values()]
        if last and all(b.has_ended for b in last):
            with suppress(OSError):
                write_node(
                    self.watchdog.attempt.path, self.host, [RankStatus(b, 0.0) for b in last]
                )
            self.node.remove()

    def _run(self) -> None:
        last = time.monotonic()
        try:
            while not self._stopped.wait(self.interval):
                now = time.monotonic()
                # Time in which this process stood still doesn't count: the others may have, too.
                self._tick(min(now - last, 2 * self.interval))
                last = now
        except Exception:  # the rank must not count as dead because this thread is
            traceback.print_exc()
            print(f"Rank {self.rank} trains on without a watchdog.", file=sys.stderr, flush=True)
            self.watchdog.stop()
            self._announce_end()

    def _tick(self, elapsed: float) -> None:
        self._count(elapsed)
        self.node.write(self._heartbeat())
        if not self._has_answered and self.node.stacks_are_requested():
            self._has_answered = True
            self._stacks.write(python_stacks().encode())
        ranks = self._read_node(elapsed)
        if self.node.exit_is_requested() or self.watchdog.is_stuck_on_storage(ranks, elapsed):
            self.leave(CRASHED)

    def _count(self, elapsed: float) -> None:
        """Update how long the training thread has been at its place, and its pace."""
        phases = self.phases
        visit = (phases.at, phases.since)
        if visit == self._visit:
            self._here += elapsed
        else:
            self._visit, self._here = visit, min(elapsed, time.monotonic() - phases.since)
        last = self._paces[-1][0] if self._paces else 0
        if phases.step < last:  # the run has rolled back
            self._paces.clear()
        if not self._is_starting() and phases.step != last:
            self._paces.append((phases.step, dict(phases.spent)))

    def _is_starting(self) -> bool:
        return self.phases.step in (0, self.phases.first) or not self.phases.first

    def _limit(self) -> float:
        at = self._visit[0]
        longest = self.phases.longest.get(at)
        if self._is_starting() or longest is None:
            return self.startup
        return max(self.startup if at in _RARE else self.patience, self.factor * longest)

    def _heartbeat(self, phase: str | None = None) -> Heartbeat:
        steps, pace = self._pace()
        return Heartbeat(
            rank=self.rank,
            host=self.host,
            pid=os.getpid(),
            began=self.began,
            time=self.began + time.monotonic() - self.phases.began,
            step=self.phases.step,
            phase=phase or self.phases.phase,
            at=self._visit[0],
            here=round(self._here, 3),
            limit=self._limit(),
            quiet=self.startup if self._is_starting() else self.patience,
            starting=self._is_starting(),
            pace=pace,
            steps=steps,
            process=self.process,
            stage=self.stage,
        )

    def _pace(self) -> tuple[int, dict[str, float]]:
        if len(self._paces) < 2:
            return 0, {}
        (first, before), (last, now) = self._paces[0], self._paces[-1]
        steps = last - first
        return steps, {k: round((v - before.get(k, 0.0)) / steps, 7) for k, v in now.items()}

    def _read_node(self, elapsed: float) -> list[RankStatus]:
        """Return the ranks of this node; silence counts only while this process runs."""
        statuses = []
        for rank, (heartbeat, changed) in self.node.read().items():
            before, silence = self._last.get(rank, (0, 0.0))
            silence = 0.0 if changed != before or rank == self.rank else silence + elapsed
            self._last[rank] = (changed, silence)
            statuses.append(RankStatus(heartbeat, silence))
        return statuses
