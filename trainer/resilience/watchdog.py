"""The watchdog: finds ranks that hang, reports them and ends the launch; reports slow ranks too.

    a rank is stuck or silent    -> diagnose, publish, report, and end this node's ranks
    every share_interval         -> write the node's heartbeats to the run directory; read whether
                                    another node has published a diagnosis
    rank 0, now and then         -> look for slow ranks

The lowest answering rank of each node does this. Invariant: it has a thread of its own, because all
of this needs the run's storage, which may be what hangs. If the thread doesn't come back from there
in time, the heartbeat reporter ends the rank without a report.
"""

import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from forescale.config.sections.runtime import HeartbeatConfig
from forescale.ground.errors import CRASHED
from forescale.resilience.diagnosis import (
    Hang,
    diagnose,
    hang_report,
    publish_hang,
    python_stacks,
    read_hang,
    stragglers,
)
from forescale.resilience.heartbeat import NodeDirectory, RankStatus, read_nodes, write_node
from forescale.resilience.outcome import process_mark
from forescale.run.directory import Attempt

_AGAIN = 300.0  # seconds until a slow rank is reported once more
_TURNS = 30  # nodes that get a turn of their own; all later nodes share one
_ANSWER = 1.0  # seconds, besides two heartbeats, that ranks get to write their stacks


class Watchdog:
    """The watchdog of one rank. `attempt` is replaced when the launch goes on in another one."""

    def __init__(
        self,
        node: NodeDirectory,
        attempt: Attempt,
        rank: int,
        world_size: int,
        settings: HeartbeatConfig,
        waits: Collection[str],
        leave: Callable[[int], None],
    ):
        self.node, self.attempt, self.rank, self.world_size = node, attempt, rank, world_size
        self.host, self.waits, self.leave = socket.gethostname(), waits, leave
        self.interval, self.share_interval = settings.interval, settings.share_interval
        self.patience = settings.patience.seconds or 0.0
        self.factor = settings.straggler
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._ranks: list[RankStatus] = []
        # Seconds since a rank became suspect, and since this thread last came back from storage.
        self._suspected = self._waited = 0.0
        self._next_share = self._next_look = 0.0
        self._reported: dict[tuple[int, str], float] = {}

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def is_stuck_on_storage(self, ranks: list[RankStatus], elapsed: float) -> bool:
        """Take in the node's ranks, `elapsed` seconds after the last call. Returns True if there is
        a hang to report and the watchdog's thread hasn't come back from the storage in time."""
        self._ranks = ranks
        suspects = any(s.is_silent or s.is_stuck for s in ranks)
        self._suspected = self._suspected + elapsed if suspects else 0.0
        self._waited += elapsed
        if not suspects or self._waited <= self.patience + _ANSWER:
            return False
        if hang := diagnose(ranks, len(ranks), self.waits):
            mine = hang.sentence.partition(";")[0]  # of other nodes nothing is known
            problem = f"{mine}; and the run's storage doesn't answer"
            print(f"forescale: hang: {problem}.", file=sys.stderr, flush=True)
        return hang is not None

    def _run(self) -> None:
        while not self._stopped.wait(self.interval):
            self._waited = 0.0
            try:
                self._look(self._ranks)
            except Exception:  # it must go on: without it a hang would last for ever
                traceback.print_exc()
        self._waited = float("-inf")

    def _look(self, ranks: list[RankStatus]) -> None:
        running = [s for s in ranks if not s.heartbeat.has_ended]
        answering = [s.heartbeat.rank for s in running if not s.is_silent]
        if self.rank == min(answering, default=-1):
            self._watch_node(ranks)
        if self.rank == 0 and ranks:
            self._find_stragglers(ranks)

    def _watch_node(self, ranks: list[RankStatus]) -> None:
        """Do what one rank does for its node."""
        now = time.monotonic()
        suspected, due = self._suspected, now >= self._next_share
        if (suspected or due) and (hang := read_hang(self.attempt.path)):
            return self._end(hang, ranks)
        if due:
            self._next_share = now + self.share_interval
            with suppress(OSError):  # training itself reports a full disk
                write_node(self.attempt.path, self.host, ranks)
        if suspected and (hang := self._diagnose(ranks)):
            self._end(publish_hang(self.attempt.path, hang), ranks)

    def _diagnose(self, ranks: list[RankStatus]) -> Hang | None:
        if len(ranks) >= self.world_size or any(s.is_silent for s in ranks):
            return diagnose(ranks, self.world_size, self.waits)
        # There are other nodes. The first node diagnoses first, the others one after the other, so
        # that not all nodes read all heartbeats.
        first = min(s.heartbeat.rank for s in ranks)
        turn = 3 + min(first // len(ranks), _TURNS) if first else 0
        if self._suspected < turn * self.share_interval:
            return None
        others = read_nodes(self.attempt.path, without=self.host, every=self.share_interval)
        return diagnose([*ranks, *others], self.world_size, self.waits)

    def _end(self, hang: Hang, ranks: list[RankStatus]) -> None:
        """Report the hang, and end this node's ranks at once: none of them can leave by itself."""
        self._waited = 0.0  # the storage has just answered; the report gets the full time again
        print(f"forescale: hang: {hang.sentence}.", file=sys.stderr, flush=True)
        with suppress(OSError):
            if self.rank == 0:
                self.attempt.event("hang", **vars(hang))
            stacks = self._collect_stacks(ranks)
            path = self.attempt.path / f"hang-{self.host}.txt"
            path.write_text(hang_report(hang, ranks, stacks))
            silent = [str(s.heartbeat.rank) for s in ranks if s.heartbeat.rank not in stacks]
            but = f" (but for rank {', '.join(silent)}: no answer)" if silent else ""
            print(f"forescale: Python stacks{but}: {path}", file=sys.stderr, flush=True)
        self.node.request_exit()
        self.leave(CRASHED)

    def _collect_stacks(self, ranks: list[RankStatus]) -> dict[int, str]:
        """Request the stacks of this node's ranks, and return those that come in time. Ranks
        without heartbeats get a signal as well."""
        others = [s for s in ranks if not s.heartbeat.has_ended and s.heartbeat.rank != self.rank]
        files = {s.heartbeat.rank: self.node.stacks(s.heartbeat.rank) for s in others}
        before = {rank: _size(path) for rank, path in files.items()}
        self.node.request_stacks()
        for s in others:
            with suppress(OSError):
                # The process id of a rank that is gone may belong to another process by now.
                mark = process_mark(s.heartbeat.pid)
                if s.is_silent and mark and mark == s.heartbeat.process:
                    os.kill(s.heartbeat.pid, signal.SIGUSR2)
        time.sleep(_ANSWER + 2 * self.interval if others else 0.0)
        stacks = {self.rank: python_stacks().rstrip()}
        for rank, path in files.items():
            with suppress(OSError):
                if text := path.read_bytes()[before[rank] :].decode(errors="replace"):
                    stacks[rank] = text.rstrip()
        return stacks

    def _find_stragglers(self, ranks: list[RankStatus]) -> None:
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + 3 * self.share_interval
        if len(ranks) < self.world_size:
            ranks = [*ranks, *read_nodes(self.attempt.path, without=self.host)]
        for slow in stragglers([s.heartbeat for s in ranks], self.factor, self.waits):
            if now - self._reported.get((slow.rank, slow.at), -_AGAIN) >= _AGAIN:
                self._reported[slow.rank, slow.at] = now
                self.attempt.event("straggler", **vars(slow))
                print(f"Note: {slow.sentence}.", flush=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
