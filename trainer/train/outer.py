"""The rounds of a run on several clusters: at their steps, members exchange how far their weights
have moved, and all make the same outer step.

    deltas of this member -> its files, its record -> who counts -> files of those -> outer step

Invariant: the outer weights are a function of the first weights and the decisions in the store
alone. A member that is killed anywhere in a round makes its steps again, finds what it has sent,
and takes the decision; one that was left out drops its steps, makes the outer steps that it missed,
and goes on at the step of the last of them.
"""

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, replace
from functools import partial
from time import perf_counter
from typing import Any

from forescale.checkpoint import writer
from forescale.checkpoint.outer import Decision, OuterStore, Record, shapes_hash
from forescale.checkpoint.reader import Checkpoint, Position
from forescale.config.train import TrainJob
from forescale.data.mixture import unskipped
from forescale.engine.outer import OuterState
from forescale.engine.ranks import first
from forescale.engine.step import Engine
from forescale.engine.world import StepSummary
from forescale.ground.errors import UserError
from forescale.resilience.phases import PhaseTimer
from forescale.run.directory import Attempt, Run
from forescale.train.callbacks import Callback, Step
from forescale.train.guard import Anomaly
from forescale.train.resume import ResumePoint

_LOOK = 0.5  # seconds between two looks of the ranks whether storage has answered all of them


class Paused(Anomaly):
    """Some rank was asked to stop while it waited for other members."""

    kind = "paused"


class Late(Anomaly):
    """Later rounds were made without this member: it goes on after the last of them."""

    kind = "late"


class Outer(Callback):
    """The rounds of one rank, which all ranks make together.

    attempt: the one that trains now. moved: `settle` has changed the state: no checkpoint has it.
    """

    phase = "outer"

    def __init__(
        self,
        run: Run,
        job: TrainJob,
        engine: Engine,
        phases: PhaseTimer,
        stop_requested: Callable[[], bool],
        attempt: Attempt,
    ):
        self._run, self._config, self._total = run, job.outer, job.total_steps
        self._engine, self._world, self._phases = engine, engine.world, phases
        self._ramp, self._stop, self.attempt = job.batch_ramp, stop_requested, attempt
        self._state = engine.outer = OuterState(engine, job.outer.fragments)
        self._keep, self.moved = job.checkpoint.keep, False
        self._order = {  # of the windows, which members read in turns
            "seed": job.train.seed,
            "sequence_length": job.train.sequence_length,
            "global_batch": job.train.global_batch,
            "weights": job.data.weights,
            "stages": job.data.stages,
            "packing": job.data.packing,
            "shuffle_shards": job.data.shuffle_shards,
        }
        self._last = 0  # the step of the last round that was made
        self._skipped_to: Position | None = None
        identity = str(run.read_identity().get("wandb_id"))
        self._store = OuterStore(job.outer, identity, run.path / "outer")

    @property
    def facts(self) -> dict[str, Any]:
        """Content of state.json."""
        return {"outer": {"step": self._last}}

    def is_due(self, step: int) -> bool:
        return bool(self._config.due(step, self._total))

    def see(self, step: Step, summary: StepSummary) -> None:
        """Make the round of a step, if there is one. Raises Paused and Late."""
        at = step.position.step
        if self.is_due(at):
            decision = self._round(step.position)
            if self._store.member not in decision.members and self._missed(at):
                raise Late(at, "later rounds were made without this member")

    def join(self, data: str) -> None:
        """Enter the store before the first step. data: hash of the corpus. Raises UserError if the
        store is another run's, or this is no member of it."""
        config = self._config
        facts = {
            "data": data,
            **self._order,
            "members": sorted(config.members),
            "every": config.steps,
            "fragments": config.fragments,
            "learning_rate": config.learning_rate,
            "momentum": config.momentum,
            "model": shapes_hash(self._engine.shapes),
        }
        self._world.from_main(partial(self._store.join, facts), self._run.path)

    def load(self, point: ResumePoint) -> None:
        """Take over which rounds the state has that was loaded for an attempt."""
        stored = (point.checkpoint.state.get("outer") if point.checkpoint else None) or {}
        # A run that begins with another one's weights alone begins at step 0.
        self._last = min(stored.get("step", point.position.step), point.position.step)

    def settle(self, point: ResumePoint, attempt: Attempt) -> ResumePoint:
        """Return where an attempt begins that would begin at `point`, after the rounds that the
        state lacks: that of its own step, and those that were made without this member. Raises
        Paused."""
        self.attempt, self.moved, self._skipped_to = attempt, False, None
        position = point.position
        if missed := self._missed(self._last):
            for step, decision in missed:
                self._receive(step, decision)
                self._make(step, decision)
            self._phases.mark("merge")
            self._state.take(range(self._config.fragments))
            position = self._at(missed[-1][0], position)
            self.moved, self._skipped_to = True, position
            self._announce(position.step)
            left_out = position.step - point.position.step
            self._event("rejoined", step=position.step, steps_left_out=left_out)
        elif self.is_due(position.step) and self._last < position.step:
            self._round(position)
            self.moved = True
        return replace(point, position=position)

    def record(self) -> None:
        """Write a row of the step at which this attempt begins, if it made none of its own."""
        if self._skipped_to and self._world.is_main:
            at = self._skipped_to
            row = {"kind": "rejoined", "step": at.step, "attempt": self.attempt.number}
            self.attempt.metrics.add({**row, "g1": at.g, "tokens": at.tokens})

    def _steps(self, after: int) -> Iterator[int]:
        steps = range(after + 1, self._total + 1)
        return (step for step in steps if self._config.due(step, self._total))

    def _missed(self, after: int) -> list[tuple[int, Decision]]:
        """Return the rounds after a step up to the last one that was made without this member, if
        there is one: (step, who counts)."""

        def look() -> list[tuple[int, dict[str, Any]]]:
            decided, without = [], 0
            for step in self._steps(after):
                if (decision := self._store.decision(step)) is None:
                    break
                decided.append((step, asdict(decision)))
                if self._store.member not in decision.members:
                    without = len(decided)
            return decided[:without]

        rounds = self._beside(look, on_main=True)
        return [(step, _decision(fields)) for step, fields in rounds]

    def _at(self, step: int, position: Position) -> Position:
        """Return the position at a later step, whose samples up to there are left out."""
        windows = self._ramp.samples(step) - self._ramp.samples(position.step)
        samples = unskipped(position.skipped, position.g, windows)
        g = samples[-1][1] if samples else position.g
        return replace(position, step=step, g=g)

    def _round(self, position: Position) -> Decision:
        """Make the round of a step from its begin or from wherever it was left. Raises Paused."""
        step, began, store = position.step, perf_counter(), self._store
        parts = self._config.due(step, self._total)
        self._phases.mark("send")
        if not self._beside(lambda: bool(store.record(step) or store.decision(step)), True):
            self._send(position, parts)
        self._phases.mark("agree")
        sent = perf_counter()

        def decide() -> dict[str, Any] | None:
            decision = store.decide(step, self._last, self._stop)
            return None if decision is None else asdict(decision)

        fields = self._beside(decide, on_main=True)
        if fields is None:  # before all ranks had looked whether they are to stop
            raise Paused(step, "it was asked to stop")
        decision = _decision(fields)
        waited = perf_counter() - sent
        received = self._receive(step, decision)
        self._make(step, decision)
        self._phases.mark("merge")
        self._state.take(parts)
        if store.member not in decision.members:
            self._announce(step)
        mine = decision.members.get(store.member)
        self._event(
            "outer_step",
            step=step,
            members=[*decision.members],
            waited=round(waited, 3),
            seconds=round(perf_counter() - began, 3),
            sent_bytes=mine.bytes if mine else 0,
            received_bytes=received,
        )
        self._beside(partial(store.prune, self._needs()), on_main=True)
        return decision

    def _send(self, position: Position, parts: Sequence[int]) -> None:
        """Write the files of this member's deltas, send them, and create its record."""
        store, world, step = self._store, self._world, position.step
        base, folder = self._base(parts), f"{store.member}.{self.attempt.number:04d}"
        path = store.path_of(step, Record(folder, "", base, 0))

        def make() -> None:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)

        world.from_main(make, path)
        deltas = [*self._state.deltas(parts)]
        counters: dict[str, Any] = {"optimizer_steps": {}, "loss_scaler": {}}
        snapshot = writer.Snapshot(position, deltas, counters, {})
        writer.write_files(path, self.attempt.number, snapshot, world, lambda step, path: None)
        names = [f"rank-{world.rank:05d}.safetensors", *(["state.json"] if world.is_main else [])]
        self._beside(lambda: sum(store.put(step, folder, path / name) for name in names))
        self._beside(partial(store.publish, step, folder, path, base), on_main=True)

    def _receive(self, step: int, decision: Decision) -> int:
        """Copy the files of those who count to the run's directory; return the bytes."""
        store, part = self._store, (self._world.rank, self._world.size)
        records = [*decision.members.values()]
        self._phases.mark("receive")
        self._beside(lambda: [store.fetch_table(step, r) for r in records], on_main=True)
        received: int = self._beside(lambda: sum(store.fetch(step, r, part) for r in records))
        return received

    def _make(self, step: int, decision: Decision) -> None:
        """Make the outer step of a round, whose files are here; then they are deleted."""
        store, config, shapes = self._store, self._config, self._engine.shapes
        parts = config.due(step, self._total)
        base = self._base(parts)
        for name, record in decision.members.items():
            if record.base != base:
                problem = f"the outer weights of member {name} were others than those here"
                todo = "begin all members anew with the same weights and another outer.store"
                raise UserError(f"{store.where}, step {step:,}", problem, todo)
        paths = [store.path_of(step, record) for record in decision.members.values()]

        def update() -> None:
            members = [Checkpoint(path) for path in paths]
            for member in members:
                member.expect_shapes({name: shapes.get(name, ()) for name in member.shapes})
            readers = [member.reader for member in members]
            self._state.step(parts, readers, config.learning_rate, config.momentum)

        self._world.together(update, self._store.local, first)
        self._last = step
        if self._world.is_main:
            shutil.rmtree(paths[0].parent, ignore_errors=True)

    def _base(self, parts: Sequence[int]) -> str:
        """Return the hash of the outer weights of some parts on all ranks."""
        return f"{self._world.merged(self._state.hash(parts), sum) % 2**64:016x}"

    def _announce(self, step: int) -> None:
        """Tell the others in which round this member, which was left out, takes part again."""
        if (following := next(self._steps(step), None)) is not None:
            self._beside(partial(self._store.announce, following), on_main=True)

    def _needs(self) -> int:
        """Return the step of the oldest checkpoint from which the run may have to begin again."""
        steps = self._run.checkpoint_steps()[-self._keep :]
        return steps[0] if len(steps) == self._keep else 0

    def _beside(self, work: Callable[[], Any], on_main: bool = False) -> Any:
        """Do `work`, which waits for storage, in a thread of each rank, or of rank 0 alone; return
        the sum of the ranks' results, or rank 0's. Meanwhile the ranks show that they live. Raises
        its error on all ranks, and Paused once some rank is asked to stop."""
        world, result = self._world, Future[Any]()

        def run() -> None:
            try:
                result.set_result(work() if world.is_main or not on_main else None)
            except BaseException as e:  # `together` raises it
                result.set_exception(e)

        threading.Thread(target=run, name="outer", daemon=True).start()
        while True:
            wait([result], _LOOK)
            here = [result.done(), bool(self._stop())]
            ready, stops = world.merged(here, _ready_and_stops)
            if ready:
                return world.together(result.result, self._store.local, first if on_main else sum)
            if stops:
                raise Paused(self._phases.step, "it was asked to stop")
            self._phases.mark(self._phases.at)

    def _event(self, kind: str, **facts: Any) -> None:
        if self._world.is_main:
            self.attempt.event(kind, **facts)


def _ready_and_stops(parts: Sequence[Sequence[bool]]) -> list[bool]:
    return [all(part[0] for part in parts), any(part[1] for part in parts)]


def _decision(fields: dict[str, Any]) -> Decision:
    """Return a decision that another rank has sent."""
    members = {name: Record(**record) for name, record in fields["members"].items()}
    return Decision(members, fields["decided_by"])
