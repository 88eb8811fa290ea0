"""The life of one rank, from top to bottom: join the others, start the run, resume, train, save.

Invariant: what the ranks decide here (the attempt's number, the checkpoint to resume from), rank 0
decides, and the others receive it.
"""

import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from forescale.checkpoint.choice import newest_step
from forescale.checkpoint.mirror import Mirror, mirror_of
from forescale.checkpoint.peer import PeerMemory
from forescale.checkpoint.reader import Position
from forescale.checkpoint.restore import restore
from forescale.checkpoint.retention import hold
from forescale.config.hardware import exactness
from forescale.config.sections.objective import PreferencesConfig
from forescale.config.target import import_target, targets
from forescale.config.train import TrainJob
from forescale.engine.build import build_engine, check_world, partition_of, stage_of
from forescale.engine.compilation import compilation, without_compiler
from forescale.engine.deepspeed_config import deepspeed_config
from forescale.engine.determinism import as_refused, use_flash, use_kernels
from forescale.engine.optim import decay_multiplier
from forescale.engine.step import Engine
from forescale.engine.world import World, join
from forescale.ground.console import progress_display, silent
from forescale.ground.errors import DONE, INTERRUPTED, UserError
from forescale.resilience.diagnosis import waiting_places
from forescale.resilience.injector import injector_of
from forescale.resilience.launcher import ATTEMPT, StopRequest
from forescale.resilience.phases import PhaseTimer
from forescale.resilience.reporter import HeartbeatReporter
from forescale.run.directory import Attempt
from forescale.run.forecast import prediction_interval_of
from forescale.run.start import Start, numerics, reopen, start
from forescale.train.build import Builder
from forescale.train.guard import Halt, Rollback
from forescale.train.loop import train
from forescale.train.model import adapting, build_model, freeze
from forescale.train.outer import Late, Outer, Paused
from forescale.train.preferences import Comparison, Reference
from forescale.train.probe import as_users, examine
from forescale.train.resume import ResumePoint, resume, roll_back


class Trainer:
    """One rank that trains a run. `train` does it all and returns an exit code."""

    def __init__(self, job: TrainJob, began: float):
        """Join the other ranks, start the run, and begin to write heartbeats."""
        self.phases = PhaseTimer("startup", began)
        self.stop_request = StopRequest().listen(job.launch.grace.seconds or 0.0)
        size = int(os.environ["WORLD_SIZE"])
        check_world(job, size)
        seconds = job.launch.timeout.seconds or 1800.0
        self.world: World = join(deepspeed_config(job, size), size, seconds, job.mesh(size))
        self.mirror: Mirror | None = None
        start = self.world.main_first(lambda: self._start(job))
        self.run, self.job, self.sources = start.run, start.job, start.sources
        use_kernels(self.job.train.deterministic, self._on_gpu)
        if self.job.train.invariant and not self._on_gpu:
            torch.set_num_threads(1)  # a product adds in an order that depends on its threads
        use_flash(self.job.train.attention_kernel, self._on_gpu)
        self.prediction = self.world.main_first(lambda: prediction_interval_of(self.job))
        attempt = os.environ.get(ATTEMPT)  # made by our launcher; other launchers don't
        attempt = attempt or self.world.from_main(lambda: str(self.run.new_attempt().path))
        self.attempt = Attempt(Path(attempt))
        self.memory = None
        if self.job.checkpoint.peer:
            trajectory = f"{self.job.total_steps}:{self.job.batch_ramp}"
            self.memory = PeerMemory(self.run, self.world, trajectory=trajectory)
        if self.memory and not self.memory.neighbour:
            why = "ranks divide into nodes unequally" if len({*self.memory.nodes}) > 1 else ""
            why = why or "there is no other node"
            self._print(f"Note: snapshots of checkpoint.peer stay on their own node: {why}.")
        rank = self.world.rank
        self.injector = injector_of(self.job.faults, rank, self.run, self.attempt, self.phases)
        mesh = self.world.mesh
        waits = waiting_places(self.job.engine.stage, mesh.exchanges, mesh.pipeline > 1)
        pipeline = self.world.pipeline
        stage = pipeline.rank if pipeline.size > 1 else None
        self.reporter = HeartbeatReporter(
            self.phases, self.attempt, rank, size, self.job.heartbeat, waits, stage=stage
        ).start()

    @property
    def _on_gpu(self) -> bool:
        return self.world.device.type != "cpu"

    @property
    def has_stepped(self) -> bool:
        return hasattr(self, "engine") and self.engine.has_stepped

    def _start(self, job: TrainJob) -> Start:
        """Open the run. Where no launcher of ours has started it, rank 0 starts it first."""
        if ATTEMPT in os.environ or not self.world.is_main:
            return reopen(job)
        restore(job, print)
        new = start(job, examine=examine, newest=newest_step)
        held = hold(new.run, new.job.run.origin, new.job.run.root)
        for note in (*job.notes(), *new.notes, *held):
            print(f"Note: {note}", flush=True)
        if mirror := mirror_of(new.run, new.job, self._print):
            # Our own launcher copies the run in its process, which outlives the ranks.
            self.mirror = mirror.check().start()
        return new

    def train(self) -> int:
        """Train to the end, or until a signal requests a stop. Return DONE or INTERRUPTED."""
        self._build()
        try:
            return self._train()
        except Paused:  # before a step of this attempt: there is nothing new to save
            return INTERRUPTED

    def _train(self) -> int:
        if self.job.objective.are_preferences and not self._has_reference():
            return INTERRUPTED
        parts = (self.run, self.job, self.engine, self._warn, self.attempt, self.memory)
        if self.outer:
            self.outer.join(self.sources.corpus_hash[:16])
        point = self._begin(self._settled(resume(*parts), loaded=True))
        position, total = point.position, self.job.total_steps
        moved = self.outer is not None and self.outer.moved
        if position.step >= total and not moved and not self.builder.lacks_score(point):
            self._print(f"{self.run.name} is complete: {position.step:,} steps are trained.")
            return DONE
        if self.world.merged(bool(self.stop_request), any):
            return INTERRUPTED  # during start-up: there is nothing new to save
        if self.compilation.enabled:
            self.engine.compile(self.compilation.by_part, self.compilation.budget)
        if self.compilation.notice:
            self._print(self.compilation.notice)
        if self.prediction:
            self._print(self.prediction.due_message(self.job))
        while True:
            try:
                position, stopped = self._train_attempt(point)
                break
            except Rollback as rollback:
                with self.phases("recovery"):
                    point = self._roll_back(rollback)
            except Late as late:
                self._print(f"Step {late.step:,}: {late.reason}, which takes the newest weights.")
                self._follow()
                point = replace(point, position=late.position, rolled_back_from=None, history=None)
                point = self._begin(self._settled(point))
        if stopped:
            where = f"Stopped at step {position.step:,}; the state is saved."
            self._print(f"{where} Run the same command again to resume.")
        return INTERRUPTED if stopped else DONE

    def _build(self) -> None:
        """Build the model and its engine; nothing is loaded yet."""
        job = self.job
        for key, name in targets(job).items():
            import_target(key, name)  # a wrong name is reported before anything is built
        # Whether `resume` will read the weights from a checkpoint, or raise an error.
        branches = job.run.origin.run is not None
        self.reads_weights = self.world.from_main(
            lambda: branches or bool(self.run.checkpoint_steps()), self.run.path
        )
        divide = adapting(job, partition_of(job, self.world))
        stage = stage_of(job, self.world)
        model = build_model(job, self.sources.vocab_size, divide, not self.reads_weights, stage)
        freeze(job, model)
        device, threads = self.world.device.type, torch.get_num_threads()
        self.compilation = compilation(job, self.world.size, device)
        if not self.compilation.enabled:
            without_compiler()
        self.engine: Engine = build_engine(self.world, model, job)
        self.engine.mark = self.phases.mark
        if self.injector:
            self.engine.disturb = self.injector.disturb
        compiled = "parts" if self.compilation.by_part else self.compilation.enabled
        self.numerics = numerics(job, self.world.size, device, threads, compiled)
        self.builder = Builder(
            job,
            self.run,
            self.sources,
            model,
            self.engine,
            self.phases,
            self.numerics,
            self.injector,
            self.prediction,
            memory=self.memory,
        )
        self.outer: Outer | None = None
        if job.outer.every:
            parts = self.run, job, self.engine, self.phases, self.stop_request.__bool__
            self.outer = self.builder.outer = Outer(*parts, self.attempt)

    def _has_reference(self) -> bool:
        """Read or compute the references of preferences. Return False if a rank was asked to stop
        first."""
        parts = (self.run, self.job, self.sources, self.engine)
        main = self.world.is_main
        with (
            progress_display() if main else nullcontext(silent) as progress,
            self.phases("evaluation"),
        ):
            watched = (self.stop_request.__bool__, self.phases.mark, progress)
            references = Reference(*parts, *watched).find()
        self.builder.references = references
        assert isinstance(self.job.objective, PreferencesConfig)
        self.engine.combine = Comparison(self.job.objective.beta)
        return references is not None

    def _begin(self, point: ResumePoint) -> ResumePoint:
        """Begin the attempt at `point`, and report it."""
        if point.checkpoint is None and self.reads_weights:
            problem = "its checkpoints were deleted while the run started"
            raise UserError(str(self.run.checkpoints), problem, "restore them and start it again")
        self.reporter.move(self.attempt)
        if self.injector:
            self.injector.begin(self.attempt, point.position.step)
        if self.world.is_main:
            self.attempt.start_from(point.parent, self.run, point.history)
            self._report_numerics(point)
            if point.checkpoint is not None:
                step = point.position.step
                self._print(f"Resuming from {point.checkpoint.path} (step {step:,}).")
        if self.memory:
            if self.memory.source and self.world.is_main:
                self.attempt.event("snapshot_used", **self.memory.source)
                self._print(f"It came {self.memory.source['what']}.")
            self.memory.source = None
            self.memory.clear(self.attempt.number)  # of earlier attempts
        return point

    def _train_attempt(self, point: ResumePoint) -> tuple[Position, bool]:
        """Train one attempt to the end of the run or a stop request, and save there; first evaluate
        the step that it begins after, if that is still missing. Return the position, and True if it
        was stopped.

        Raises Rollback; and UserError if the guard or a callback halts the run.
        """
        position = point.position
        parts = self.builder.parts(self.attempt, point)
        reason = None
        try:
            moved = self.outer is not None and self.outer.moved
            if self.outer and moved:
                self.outer.record()
                with self.phases("checkpoint"):
                    parts.checkpoints.save(position)
            lacks_score = self.builder.lacks_score(point)
            if lacks_score or (moved and parts.validation.is_due(position.step)):
                with self.phases("evaluation"):
                    parts.validation.score(position)
            folder = self.attempt.path / "trace"
            with traced(self.job.profile.interval, folder, parts.batches) as batches:
                try:
                    position, stopped = train(
                        self.engine,
                        batches,
                        self._multipliers,
                        parts.callbacks,
                        position,
                        self.phases,
                        self.stop_request.__bool__,
                        parts.guard,
                    )
                    stopped = stopped and position.step < self.job.total_steps
                except Paused as paused:  # its round is made by the next attempt
                    position, stopped = paused.position, True
            if position.step > point.position.step:
                with self.phases("checkpoint"):
                    parts.checkpoints.save(position)
            reason = "interrupted" if stopped else "complete"
        except Rollback as rollback:
            position = rollback.position
            with self.phases("checkpoint"):
                parts.checkpoints.finish()
            reason = "rollback"
            raise
        except Late as late:
            position, reason = late.position, "late"
            with self.phases("checkpoint"):
                parts.checkpoints.finish()
            raise
        except Halt as halt:
            position = halt.position
            if halt.trusted and position.step > point.position.step:
                with self.phases("checkpoint"):
                    parts.checkpoints.save(position)
            reason = "halted"
            where, problem = f"{self.run.path}, step {halt.step:,}", f"halted: {halt.reason}"
            todo = (
                "look at the events and the data there; guard.* says when a run halts; to branch "
                "off before the step, use run.from and data.skip"
            )
            raise UserError(where, problem, todo) from None
        finally:
            self.phases.mark("closing")
            parts.close()
            if reason and parts.snapshots and self.memory:
                with suppress(UserError):  # the run goes on without it, or ends
                    parts.snapshots.finish()
                # What is newer than a rollback's checkpoint must not come back.
                self.memory.clear(self.attempt.number)
            if reason and self.world.is_main:
                seconds = self.phases.take()  # since the last row
                self.attempt.event("ended", step=position.step, reason=reason, seconds=seconds)
        return position, stopped

    def _roll_back(self, rollback: Rollback) -> ResumePoint:
        """Load a checkpoint from before an anomalous step, and begin a new attempt there."""
        self._print(f"Step {rollback.step:,}: {rollback.reason}. Rolling back.")
        point = roll_back(rollback, self.run, self.engine, self._warn)
        self._follow()
        return self._begin(self._settled(point, loaded=True))

    def _follow(self) -> None:
        """Go on in a new attempt."""
        following = self.world.from_main(
            lambda: str(self.run.attempt_after(self.attempt).path), self.run.path
        )
        self.attempt = Attempt(Path(following))

    def _settled(self, point: ResumePoint, loaded: bool = False) -> ResumePoint:
        """Return where the attempt begins, after the rounds with other clusters that the state of
        `point` lacks. loaded: the state has just been loaded."""
        if self.outer is None:
            return point
        if loaded:
            self.outer.load(point)
        with self.phases("outer"):
            return self.outer.settle(point, self.attempt)

    def _multipliers(self, step: int) -> tuple[float, float]:
        job, total = self.job, self.job.total_steps
        rate = job.schedule.rate(step, total, job.warmup_steps, job.decay_steps)
        return rate, decay_multiplier(job.optimizer, step, total)

    def _report_numerics(self, point: ResumePoint) -> None:
        """Report whether the run is bit-exact, and the changes since the checkpoint that end
        that."""
        train = self.job.train
        promise = exactness(train.deterministic, self._on_gpu, train.invariant)
        self.attempt.event("exactness", exact=promise.holds, what=promise.sentence)
        self._print(promise.sentence)
        checkpoint = point.checkpoint
        old, new = (checkpoint.state.get("numerics") or {}) if checkpoint else {}, self.numerics
        for key in sorted(old.keys() & new.keys()):
            if old[key] != new[key]:
                changed = {"step": point.position.step, "old": old[key], "new": new[key]}
                self.attempt.event("numerics_changed", key=key, **changed)
                self._print(f"Not bit-exact from here: {key} was {old[key]} and is now {new[key]}.")

    def _warn(self, kind: str, **facts: Any) -> None:
        if self.world.is_main:
            self.attempt.event(kind, **facts)
            self._print(f"Warning: {kind.replace('_', ' ')}: {facts}")

    def _print(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)


def run_rank(job: TrainJob, began: float | None = None) -> int:
    """Train as the one rank of `job` that this process's environment names; return the exit code.

    began: when the process started, by time.monotonic().
    """
    trainer = Trainer(job, time.monotonic() if began is None else began)
    try:
        code = trainer.train()
    except Exception as e:
        if refused := as_refused(e):
            raise refused from e
        users = None if trainer.has_stepped else as_users(e, targets(job).values())
        if users is None:
            raise
        raise users from e
    trainer.reporter.stop()
    if trainer.memory and code == DONE:  # interrupted, it may not have resumed yet
        trainer.memory.clear(trainer.attempt.number, all_of_it=True)
    trainer.world.close()
    if trainer.mirror:  # only now: no rank waits in a collective for what this one copies
        trainer.mirror.close()  # after a stop signal until the grace is over: see StopRequest
    return code


@contextmanager
def traced(interval: tuple[int, int] | None, folder: Path, batches: Any) -> Iterator[Any]:
    """Yield the batches; record steps [first, end) of `interval` to folder/rank-N.json."""
    if interval is None:
        yield batches
        return
    first, end = interval
    profiler: Any = None

    def record() -> Generator[Any, None, None]:
        nonlocal profiler
        for batch in batches:
            if batch.step == end and profiler is not None:
                _write_trace(profiler, folder)
                profiler = None
            if profiler is None and first <= batch.step < end:  # an attempt may begin inside
                profiler = torch.profiler.profile()
                profiler.start()
            yield batch

    recorder = record()
    try:
        yield recorder
    finally:
        recorder.close()
        batches.close()
        if profiler is not None:
            _write_trace(profiler, folder)


def _write_trace(profiler: Any, folder: Path) -> None:
    profiler.stop()
    folder.mkdir(exist_ok=True)
    profiler.export_chrome_trace(str(folder / f"rank-{os.environ['RANK']}.json"))
