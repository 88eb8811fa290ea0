"""The watchdog: of a node's ranks the lowest that answers looks for one that the others wait for.

    somebody is stuck or silent  -> the verdict, the report, and this node's ranks end
    every `pulse.share`          -> the node's beats to the run; has another node found something?
    rank 0, now and then         -> who is slow?

Invariant: it has a thread of its own, for all of this needs the run's storage, which may be what
hangs. Where it doesn't come back from there in time, the heart ends the rank without a report.
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

import psutil

from forescale.config.runtime import PulseConfig
from forescale.errors import CRASHED
from forescale.resilience.diagnosis import Hang, diagnose, publish, python_stacks, report, verdict
from forescale.resilience.heartbeat import Node, Seen, share, shared
from forescale.resilience.stragglers import stragglers
from forescale.run.directory import Attempt

_AGAIN = 300.0  # seconds until a slow rank is told of once more
_TURNS = 30  # nodes that get a turn of their own; those beyond share one
_ANSWER = 1.0  # seconds, and two beats, that ranks have to show their stacks


class Watchdog:
    """Of one rank. `attempt` may be set anew, when the launch goes on in another one."""

    def __init__(
        self,
        node: Node,
        attempt: Attempt,
        rank: int,
        world_size: int,
        settings: PulseConfig,
        waits: Collection[str],
        leave: Callable[[int], None],
    ):
        self.node, self.attempt, self.rank, self.world_size = node, attempt, rank, world_size
        self.host, self.waits, self.leave = socket.gethostname(), waits, leave
        lengths = (settings.beat, settings.share, settings.patience)
        self.beat, self.share, self.patience = (d.seconds or 0.0 for d in lengths)
        self.factor = settings.straggler
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._seen: list[Seen] = []
        self._suspected = self._waited = 0.0
        self._next_share = self._next_look = 0.0
        self._told: dict[tuple[int, str], float] = {}

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def is_lost(self, seen: list[Seen], lived: float) -> bool:
        """Hear of the node's ranks, `lived` seconds after the last time. True where this rank has
        to act, and its watchdog hasn't come back from the storage in time."""
        self._seen = seen
        suspects = any(s.is_silent or s.is_stuck for s in seen)
        self._suspected = self._suspected + lived if suspects else 0.0
        self._waited += lived
        if not suspects or self._waited <= self.patience + _ANSWER:
            return False
        if hang := diagnose(seen, len(seen), self.waits):
            what = f"{hang.sentence}; and the run's storage doesn't answer"
            print(f"forescale: hang: {what}.", file=sys.stderr, flush=True)
        return hang is not None

    def _run(self) -> None:
        while not self._stopped.wait(self.beat):
            self._waited = 0.0
            try:
                self._look(self._seen)
            except Exception:  # it must go on: it is why nobody waits for ever
                traceback.print_exc()
        self._waited = float("-inf")

    def _look(self, seen: list[Seen]) -> None:
        answering = [s.beat.rank for s in seen if not s.is_silent and not s.beat.has_ended]
        if self.rank == min(answering, default=-1):
            self._lead(seen)
        if self.rank == 0 and seen:
            self._find_stragglers(seen)

    def _lead(self, seen: list[Seen]) -> None:
        """What one rank does for its node."""
        now = time.monotonic()
        suspected, due = self._suspected, now >= self._next_share
        if (suspected or due) and (hang := verdict(self.attempt.path)):
            return self._end(hang, seen)
        if due:
            self._next_share = now + self.share
            with suppress(OSError):  # a full disk hurts whoever must write, not this
                share(self.attempt.path, self.host, seen)
        if suspected and (hang := self._judge(seen)):
            self._end(publish(self.attempt.path, hang), seen)

    def _judge(self, seen: list[Seen]) -> Hang | None:
        if len(seen) >= self.world_size or any(s.is_silent for s in seen):
            return diagnose(seen, self.world_size, self.waits)
        # Other nodes are there. The first node speaks first, and the others one after the other, so
        # that not all read everything.
        first = min(s.beat.rank for s in seen)
        turn = 3 + min(first // len(seen), _TURNS) if first else 0
        if self._suspected < turn * self.share:
            return None
        others = shared(self.attempt.path, without=self.host, every=self.share)
        return diagnose([*seen, *others], self.world_size, self.waits)

    def _end(self, hang: Hang, seen: list[Seen]) -> None:
        """Report, and end this node's ranks, hard: none of them could leave by itself."""
        self._waited = 0.0  # the storage has just answered, and has its time for the report too
        print(f"forescale: hang: {hang.sentence}.", file=sys.stderr, flush=True)
        with suppress(OSError):
            if self.rank == 0:
                self.attempt.event("hang", **vars(hang))
            stacks = self._collect(seen)
            path = self.attempt.path / f"hang-{self.host}.txt"
            path.write_text(report(hang, seen, stacks))
            silent = [str(s.beat.rank) for s in seen if s.beat.rank not in stacks]
            but = f" (but for rank {', '.join(silent)}: no answer)" if silent else ""
            print(f"forescale: Python stacks{but}: {path}", file=sys.stderr, flush=True)
        self.node.end()
        self.leave(CRASHED)

    def _collect(self, seen: list[Seen]) -> dict[int, str]:
        """Ask the ranks of this node for their stacks; those that answer in time. Those whose heart
        doesn't beat are asked by a signal too."""
        others = [s for s in seen if not s.beat.has_ended and s.beat.rank != self.rank]
        asked = {s.beat.rank: self.node.stacks(s.beat.rank) for s in others}
        before = {rank: _size(path) for rank, path in asked.items()}
        self.node.ask()
        for s in others:
            with suppress(OSError, psutil.Error):
                # A rank that is gone may have left its number to a stranger.
                if s.is_silent and psutil.Process(s.beat.pid).create_time() <= s.beat.time:
                    os.kill(s.beat.pid, signal.SIGUSR2)
        time.sleep(_ANSWER + 2 * self.beat if others else 0.0)
        found = {self.rank: python_stacks().rstrip()}
        for rank, path in asked.items():
            with suppress(OSError):
                if text := path.read_bytes()[before[rank] :].decode(errors="replace"):
                    found[rank] = text.rstrip()
        return found

    def _find_stragglers(self, seen: list[Seen]) -> None:
        now = time.monotonic()
        if now < self._next_look:
            return
        self._next_look = now + 3 * self.share
        if len(seen) < self.world_size:
            seen = [*seen, *shared(self.attempt.path, without=self.host)]
        for slow in stragglers([s.beat for s in seen], self.factor, self.waits):
            if now - self._told.get((slow.rank, slow.at), -_AGAIN) >= _AGAIN:
                self._told[slow.rank, slow.at] = now
                self.attempt.event("straggler", **vars(slow))
                print(f"Note: {slow.sentence}.", flush=True)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
