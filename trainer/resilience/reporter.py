"""The heart of a rank: a thread beside the training that says, every `pulse.beat`, that it lives.

Invariant: it never touches the training thread, nor any storage but the node's memory, so it beats
while the run's storage hangs. Time is counted as this thread lives through it: a job that was
suspended as a whole, and wakes up, isn't taken for one that hangs.
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

from forescale.config.runtime import PulseConfig
from forescale.errors import CRASHED
from forescale.resilience.diagnosis import WAITS, python_stacks
from forescale.resilience.heartbeat import ENDED, Beat, Node, Seen, share, sweep
from forescale.resilience.phases import Pulse
from forescale.resilience.watchdog import Watchdog
from forescale.run.directory import Attempt

_RECENT = 30  # beats that a pace is taken over
# A rank passes here at every step, and only now and then has something to do: what it took so far
# says little.
_RARE = frozenset({"evaluation", "checkpoint", "recovery"})


class Heart:
    """A rank's beat, with its watchdog. `waits`: the places where ranks wait for each other;
    `leave` ends the process."""

    def __init__(
        self,
        pulse: Pulse,
        attempt: Attempt,
        rank: int,
        world_size: int,
        settings: PulseConfig,
        waits: Collection[str] = WAITS,
        leave: Callable[[int], None] = os._exit,
    ):
        self.pulse, self.rank, self.leave = pulse, rank, leave
        self.host = socket.gethostname()
        self.began = time.time() - (time.monotonic() - pulse.began)
        self.factor = settings.factor
        lengths = (settings.beat, settings.patience, settings.startup)
        self.beat, self.patience, startup = (d.seconds or 0.0 for d in lengths)
        self.startup = max(startup, self.patience)
        self.node = Node(attempt.path)
        self.watchdog = Watchdog(self.node, attempt, rank, world_size, settings, waits, leave)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heart", daemon=True)
        self._visit, self._here = (pulse.at, pulse.since), 0.0
        self._paces: deque[tuple[int, dict[str, float]]] = deque(maxlen=_RECENT)
        self._has_answered = False
        self._heard: dict[int, tuple[int, float]] = {}  # by rank: its last sign, silence since

    def start(self) -> "Heart":
        sweep()
        self._stacks = open(self.node.stacks(self.rank), "wb", buffering=0)  # noqa: SIM115
        # For a training thread that holds the interpreter's lock, so that the heart can't answer.
        # Of it alone: others' frames would be read without the lock, which can kill the process.
        faulthandler.register(signal.SIGUSR2, file=self._stacks, all_threads=False)
        self.pulse.mirror = self.node.mirror(self.rank)
        self.node.write(self._beat())
        self._thread.start()
        self.watchdog.start()
        return self

    def move(self, attempt: Attempt) -> None:
        """The launch goes on in another attempt, which is told from now on."""
        self.watchdog.attempt = attempt

    def stop(self) -> None:
        """Say that this rank leaves, so that nobody waits for it. The last of a node clears up."""
        self._stopped.set()
        self.watchdog.stop()
        self._thread.join(timeout=10)
        self._part()

    def _part(self) -> None:
        # It still answers when it is asked for its stacks: without a handler that would kill it.
        self.node.write(self._beat(ENDED))
        beats = [beat for beat, _ in self.node.read().values()]
        if beats and all(b.has_ended for b in beats):
            with suppress(OSError):
                share(self.watchdog.attempt.path, self.host, [Seen(b, 0.0) for b in beats])
            self.node.remove()

    def _run(self) -> None:
        last = time.monotonic()
        try:
            while not self._stopped.wait(self.beat):
                now = time.monotonic()
                # Not the time in which this process stood still: the others may have, too.
                self._tick(min(now - last, 2 * self.beat))
                last = now
        except Exception:  # nobody may take this rank for dead because its heart is
            traceback.print_exc()
            print(f"Rank {self.rank} trains on without a watchdog.", file=sys.stderr, flush=True)
            self.watchdog.stop()
            self._part()

    def _tick(self, lived: float) -> None:
        self._count(lived)
        self.node.write(self._beat())
        if not self._has_answered and self.node.is_asked():
            self._has_answered = True
            self._stacks.write(python_stacks().encode())
        seen = self._look(lived)
        if self.node.is_over() or self.watchdog.is_lost(seen, lived):
            self.leave(CRASHED)

    def _count(self, lived: float) -> None:
        """How long has the training thread been where it is?"""
        pulse = self.pulse
        visit = (pulse.at, pulse.since)
        if visit == self._visit:
            self._here += lived
        else:
            self._visit, self._here = visit, min(lived, time.monotonic() - pulse.since)
        last = self._paces[-1][0] if self._paces else 0
        if pulse.step < last:  # the run has rolled back
            self._paces.clear()
        if not self._is_starting() and pulse.step != last:
            self._paces.append((pulse.step, dict(pulse.spent)))

    def _is_starting(self) -> bool:
        return self.pulse.step in (0, self.pulse.first) or not self.pulse.first

    def _limit(self) -> float:
        at = self._visit[0]
        longest = self.pulse.longest.get(at)
        if self._is_starting() or longest is None:
            return self.startup
        return max(self.startup if at in _RARE else self.patience, self.factor * longest)

    def _beat(self, phase: str | None = None) -> Beat:
        steps, pace = self._pace()
        return Beat(
            rank=self.rank,
            host=self.host,
            pid=os.getpid(),
            began=self.began,
            time=time.time(),
            step=self.pulse.step,
            phase=phase or self.pulse.phase,
            at=self._visit[0],
            here=round(self._here, 3),
            limit=self._limit(),
            quiet=self.startup if self._is_starting() else self.patience,
            starting=self._is_starting(),
            pace=pace,
            steps=steps,
        )

    def _pace(self) -> tuple[int, dict[str, float]]:
        if len(self._paces) < 2:
            return 0, {}
        (first, before), (last, now) = self._paces[0], self._paces[-1]
        steps = last - first
        return steps, {k: round((v - before.get(k, 0.0)) / steps, 7) for k, v in now.items()}

    def _look(self, lived: float) -> list[Seen]:
        """The ranks of this node, with how long each has been silent while this one was awake."""
        seen = []
        for rank, (beat, sign) in self.node.read().items():
            before, silence = self._heard.get(rank, (0, 0.0))
            silence = 0.0 if sign != before or rank == self.rank else silence + lived
            self._heard[rank] = (sign, silence)
            seen.append(Seen(beat, silence))
        return seen
