"""What a member sends and receives in a round, in a thread of its own: training may go on.

    deltas -> files, record -> who counts -> the files of those

Invariant: one work at a time, which the ranks do together over a process group of their own. What
fails in it is raised on all ranks alike, once they wait for its end; meanwhile they show that they
live, at the places that the work has come to.
"""

import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import partial
from queue import Empty, SimpleQueue
from time import perf_counter, sleep
from typing import Any

from forescale.checkpoint import writer
from forescale.checkpoint.outer import Decision, OuterStore, Record
from forescale.checkpoint.reader import Position
from forescale.engine.portable.fragments import Fragment
from forescale.engine.ranks import first
from forescale.engine.world import World
from forescale.resilience.phases import PhaseTimer
from forescale.train.guard import Anomaly

_LOOK = 0.5  # seconds between two looks of the ranks whether the work of all of them is done
# A rank may wait for another one's files; that one of them is dead is noticed elsewhere.
_LONG = timedelta(days=30)


class Paused(Anomaly):
    """Some rank was asked to stop while it waited for other members."""

    kind = "paused"


@dataclass(frozen=True)
class Departure:
    """What a member sends of a round, and `needs`: the first step whose files it may read again."""

    position: Position
    deltas: list[Fragment]
    base: str
    finite: bool
    attempt: int
    previous: int
    needs: int
    steps: int


@dataclass(frozen=True)
class Arrival:
    """What came of it. waited: seconds until it was decided; seconds: in all; received: bytes."""

    decision: Decision
    waited: float
    seconds: float
    received: int


class Exchange:
    """The exchanges of one rank, one after the other; every rank calls its methods together."""

    def __init__(
        self, store: OuterStore, world: World, phases: PhaseTimer, stop: Callable[[], bool]
    ):
        self._store, self._world, self._phases, self._stop = store, world, phases, stop
        self._ranks = world.in_background("outer", timeout=_LONG)
        self._places: SimpleQueue[str] = SimpleQueue()
        self._work: Future[Any] | None = None
        self._dropped = False

    def begin(self, work: Callable[[], Any]) -> None:
        """Begin a work of all ranks, in a thread."""
        future = self._work = Future[Any]()

        def do() -> None:
            try:
                future.set_result(work())
            except BaseException as e:  # `end` raises it
                future.set_exception(e)
            self._places.put("")

        threading.Thread(target=do, name="outer", daemon=True).start()

    def end(self) -> Any:
        """Wait for the end of the work, and return what this rank has of it. Raises its error, and
        Paused once some rank is asked to stop."""
        work, results, ready = self._work, list[Any](), False
        assert work is not None
        while not ready:
            place = ""
            with suppress(Empty):
                place = self._places.get(timeout=_LOOK)
            self._mark(place)
            ready, stops = self._world.merged([work.done(), bool(self._stop())], _ready_and_stops)
            if stops and not ready:
                raise Paused(self._phases.step, "it was asked to stop")
        while not self._places.empty():
            self._mark(self._places.get())
        self._work = None
        self._world.together(lambda: results.append(work.result()), self._store.local, first)
        return results[0]

    def drop(self) -> None:
        """End a work whose result isn't needed any more."""
        self._dropped = True
        while self._work and not self._world.merged(self._work.done(), all):
            self._mark("")
            sleep(_LOOK)
        self._work, self._dropped, self._places = None, False, SimpleQueue()

    def on_main(self, work: Callable[[], Any]) -> Any:
        """Return what `work`, which waits for storage, returns on rank 0."""
        self.begin(lambda: self._ranks.from_main(work, self._store.local))
        return self.end()

    def receive(self, step: int, decision: Decision) -> None:
        """Copy the files of those who count to the run's directory."""
        self.begin(lambda: self._receive(step, decision))
        self.end()

    def depart(self, sent: Departure) -> None:
        """Begin the exchange of a round: `end` returns its Arrival, or None if this rank was asked
        to stop before it was decided who counts."""
        self._phases.mark("send")
        self.begin(lambda: self._exchange(sent))

    def _mark(self, place: str) -> None:
        self._phases.mark(place or self._phases.at)

    def _exchange(self, sent: Departure) -> Arrival | None:
        ranks, store, step, began = self._ranks, self._store, sent.position.step, perf_counter()
        known = lambda: bool(store.record(step) or store.decision(step))  # noqa: E731
        if not ranks.from_main(known, store.local):
            self._send(sent)
        self._places.put("agree")
        ready = perf_counter()

        def decide() -> dict[str, Any] | None:
            stop = lambda: self._dropped or bool(self._stop())  # noqa: E731
            decision = store.decide(step, sent.previous, stop)
            return None if decision is None else asdict(decision)

        fields = ranks.from_main(decide, store.local)
        if fields is None:
            return None
        decision, waited = decision_of(fields), perf_counter() - ready
        self._places.put("receive")
        received = self._receive(step, decision)
        ranks.from_main(partial(store.prune, sent.needs), store.local)
        return Arrival(decision, waited, perf_counter() - began, received)

    def _send(self, sent: Departure) -> None:
        """Write the files of this member's deltas, send them, and create its record."""
        ranks, store, step = self._ranks, self._store, sent.position.step
        folder = f"{store.member}.{sent.attempt:04d}"
        path = store.path_of(step, Record(folder, "", sent.base, 0))

        def make() -> None:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)

        ranks.from_main(make, path)
        counters: dict[str, Any] = {"optimizer_steps": {}, "loss_scaler": {}}
        snapshot = writer.Snapshot(sent.position, sent.deltas, counters, {})
        writer.write_files(path, sent.attempt, snapshot, ranks, lambda step, path: None)
        names = [f"rank-{ranks.rank:05d}.safetensors", *(["state.json"] if ranks.is_main else [])]
        put = lambda: sum(store.put(step, folder, path / name) for name in names)  # noqa: E731
        ranks.together(put, path, sum)
        facts = {"base": sent.base, "finite": sent.finite, "steps": sent.steps}
        ranks.from_main(partial(store.publish, step, folder, path, **facts), path)

    def _receive(self, step: int, decision: Decision) -> int:
        """Copy the files of those who count to the run's directory; return the bytes."""
        ranks, store, records = self._ranks, self._store, [*decision.members.values()]
        part = ranks.rank, ranks.size
        ranks.from_main(lambda: [store.fetch_table(step, r) for r in records], store.local)
        fetch = lambda: sum(store.fetch(step, r, part) for r in records)  # noqa: E731
        received: int = ranks.together(fetch, store.local, sum)
        return received


def decision_of(fields: dict[str, Any]) -> Decision:
    """Return a decision that another rank has sent."""
    members = {name: Record(**record) for name, record in fields["members"].items()}
    return Decision(members, fields["decided_by"], fields["refused"])


def _ready_and_stops(parts: Sequence[Sequence[bool]]) -> list[bool]:
    return [all(part[0] for part in parts), any(part[1] for part in parts)]
