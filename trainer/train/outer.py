"""The rounds of a run on several clusters: at their steps, members exchange how far their weights
have moved (exchange.py), and all make the same outer step, at once or some fixed steps later.

Invariant: the outer weights are a function of the first weights and the decisions in the store
alone. A member that is killed anywhere in a round makes its steps again, finds what it has sent,
and takes the decision; deltas that are on their way are in its checkpoints. One that was left out
drops its steps, makes the outer steps that it missed, and goes on where the others made the last.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from time import perf_counter
from typing import Any

from forescale.checkpoint.outer import Decision, OuterStore, shapes_hash
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
from forescale.train.exchange import Arrival, Departure, Exchange, Paused, decision_of
from forescale.train.guard import Anomaly
from forescale.train.resume import ResumePoint


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
        self._ramp, self.attempt = job.batch_ramp, attempt
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
        self._sent: int | None = None  # of the one whose deltas are on their way
        self._stalled = 0.0  # seconds of it for which training stood still
        self._skipped_to: Position | None = None
        identity = str(run.read_identity().get("wandb_id"))
        self._store = OuterStore(job.outer, identity, run.path / "outer")
        self._exchange = Exchange(self._store, engine.world, phases, stop_requested)

    @property
    def facts(self) -> dict[str, Any]:
        """Content of state.json."""
        return {"outer": {"step": self._last} | ({"sent": self._sent} if self._sent else {})}

    def is_due(self, step: int) -> bool:
        return bool(self._due(step) or self._due(step - self._config.delay))

    def see(self, step: Step, summary: StepSummary) -> None:
        """Begin the round of a step, and end one whose result is due. Raises Paused and Late."""
        at = step.position.step
        decision = self._end(at)
        if self._due(at):
            self._begin(at, step.position)
            decision = self._end(at)
        if decision and self._store.member not in decision.members and self._missed(self._last):
            raise Late(at, "later rounds were made without this member")

    def _due(self, step: int) -> tuple[int, ...]:
        return self._config.due(step, self._total)

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
        if config.delay:
            facts |= {"overlap": config.delay, "mixing": config.mixing}
        self._world.from_main(partial(self._store.join, facts), self._run.path)

    def load(self, point: ResumePoint) -> None:
        """Take over which rounds the state has that was loaded for an attempt."""
        stored = (point.checkpoint.state.get("outer") if point.checkpoint else None) or {}
        at = point.position.step
        # A run that begins with another one's weights alone begins at step 0.
        self._last = min(stored.get("step", at), at)
        sent = stored.get("sent", at + 1)
        known = sent <= at and self._state.are_of(self._config.due(sent, self._total))
        self._sent = sent if self._world.merged(known, all) else None
        if self._sent is None:
            self._state.deltas = []  # of a trunk with other rounds: they go with the next ones

    def settle(self, point: ResumePoint, attempt: Attempt) -> ResumePoint:
        """Return where an attempt begins that would begin at `point`, after the rounds that the
        state lacks: one whose result is due, and those that were made without this member. Deltas
        on their way are sent again, unless they have come. Raises Paused."""
        self._exchange.drop()
        self.attempt, self.moved, self._skipped_to = attempt, False, None
        position = point.position
        if missed := self._missed(self._last):
            for step, decision in missed:
                self._exchange.receive(step, decision)
                self._make(step, decision)
            self._phases.mark("merge")
            self._state.take(range(self._config.fragments))
            self._sent = None
            position = self._at(self._config.applied(self._last, self._total), position)
            self.moved, self._skipped_to = True, position
            self._announce(self._last)
            left_out = position.step - point.position.step
            self._event("rejoined", step=position.step, steps_left_out=left_out)
        elif self._sent or (self._last < position.step and self._due(position.step)):
            self._begin(self._sent or position.step, position)
            self.moved = self._end(position.step) is not None
        return replace(point, position=position)

    def record(self) -> None:
        """Write a row of the step at which this attempt begins, if it made none of its own."""
        if self._skipped_to and self._world.is_main:
            at = self._skipped_to
            row = {"kind": "rejoined", "step": at.step, "attempt": self.attempt.number}
            self.attempt.metrics.add({**row, "g1": at.g, "tokens": at.tokens})

    def _steps(self, after: int) -> Iterator[int]:
        steps = range(after + 1, self._total + 1)
        return (step for step in steps if self._due(step))

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

        rounds = self._exchange.on_main(look)
        return [(step, decision_of(fields)) for step, fields in rounds]

    def _at(self, step: int, position: Position) -> Position:
        """Return the position at a later step, whose samples up to there are left out."""
        windows = self._ramp.samples(step) - self._ramp.samples(position.step)
        samples = unskipped(position.skipped, position.g, windows)
        g = samples[-1][1] if samples else position.g
        return replace(position, step=step, g=g)

    def _begin(self, step: int, position: Position) -> None:
        """Begin the round of a step; `position`: the same or later, if its deltas were loaded."""
        began, parts = perf_counter(), self._due(step)
        if self._sent is None:
            self._state.depart(parts)
        self._sent = step
        finite = self._world.merged(self._state.are_finite, all)
        facts = (self._base(parts), finite, self.attempt.number, self._last, self._needs())
        at = replace(position, step=step)
        self._exchange.depart(Departure(at, self._state.deltas, *facts, self._total))
        self._stalled = perf_counter() - began

    def _end(self, at: int) -> Decision | None:
        """End the round whose result is due after step `at`, and return who counted; None if there
        is none. Raises Paused."""
        step, began, member = self._sent, perf_counter(), self._store.member
        if step is None or at < self._config.applied(step, self._total):
            return None
        arrival: Arrival | None = self._exchange.end()
        if arrival is None:  # before all ranks had looked whether they are to stop
            raise Paused(at, "it was asked to stop")
        decision = arrival.decision
        self._make(step, decision)
        self._phases.mark("merge")
        if member in decision.refused:  # whatever else its weights and moments have
            self._state.take(range(self._config.fragments), anew=True)
        else:
            mixed = at > step and member in decision.members
            self._state.take(self._due(step), self._config.mixing if mixed else 0.0)
        self._sent = None
        if member not in decision.members:
            self._announce(step)
        mine = decision.members.get(member)
        self._event(
            "outer_step",
            step=step,
            applied=at,
            members=[*decision.members],
            waited=round(arrival.waited, 3),
            seconds=round(arrival.seconds, 3),
            stalled=round(self._stalled + perf_counter() - began, 3),
            sent_bytes=mine.bytes if mine else 0,
            received_bytes=arrival.received,
        )
        if decision.refused:
            self._event("outer_refused", step=step, members=decision.refused)
        return decision

    def _make(self, step: int, decision: Decision) -> None:
        """Make the outer step of a round, whose files are here; then they are deleted."""
        store, config, shapes = self._store, self._config, self._engine.shapes
        parts = self._due(step)
        base = self._base(parts)
        for name, record in decision.members.items():
            steps = record.steps or self._total
            if config.due(step, steps) != parts:
                problem = f"member {name} ends at step {steps:,}, and this one at {self._total:,}, "
                problem += "so they exchange other fragments"
                todo = "begin all members anew with the same train.steps and another outer.store"
                raise UserError(f"{store.where}, step {step:,}", problem, todo)
            if record.base != base:
                problem = f"the outer weights of member {name} were others than those here"
                todo = "begin all members anew with the same weights and another outer.store"
                raise UserError(f"{store.where}, step {step:,}", problem, todo)
        paths = [store.path_of(step, record) for record in decision.members.values()]

        def update() -> None:
            members = [Checkpoint(path, partial=True) for path in paths]
            for member in members:
                member.expect_shapes({name: shapes.get(name, ()) for name in member.shapes})
            readers = [member.reader for member in members]
            self._state.step(parts, readers, config.learning_rate, config.momentum)

        self._world.together(update, self._store.local, first)
        self._last = step
        self._state.deltas = []
        if self._world.is_main:
            shutil.rmtree(store.local_of(step), ignore_errors=True)

    def _base(self, parts: Sequence[int]) -> str:
        """Return the hash of the outer weights of some parts on all ranks."""
        return f"{self._world.merged(self._state.hash(parts), sum) % 2**64:016x}"

    def _announce(self, step: int) -> None:
        """Tell the others in which round this member, which was left out, takes part again."""
        if (following := next(self._steps(step), None)) is not None:
            self._exchange.on_main(partial(self._store.announce, following))

    def _needs(self) -> int:
        """Return the step of the oldest checkpoint from which the run may have to begin again."""
        steps = self._run.checkpoint_steps()[-self._keep :]
        return max(0, steps[0] - self._config.delay) if len(steps) == self._keep else 0

    def _event(self, kind: str, **facts: Any) -> None:
        if self._world.is_main:
            self.attempt.event(kind, **facts)
