"""Builds the parts of one attempt from the job: data stream, guard, metrics, callbacks.

Invariant: nothing here trains or decides; each attempt gets parts of its own.
"""

import socket
import sys
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor, nn

from forescale.checkpoint.peer import PeerMemory, PeerSaver
from forescale.checkpoint.reader import Position
from forescale.checkpoint.retention import keep_of
from forescale.checkpoint.saver import Saver
from forescale.config.duration import Duration
from forescale.config.schema import plain
from forescale.config.sections.objective import PreferencesConfig
from forescale.config.sections.ramp import length_ramp
from forescale.config.target import make
from forescale.config.train import TrainJob
from forescale.data.bins import Bins
from forescale.data.dataset import Sources
from forescale.data.feed import Feed, LostMember
from forescale.data.objective import Objective, window_length
from forescale.data.stream import Batch, MicroBatch, StepShare, stream, validation_windows
from forescale.engine.build import device_name, peak_flops
from forescale.engine.selfcheck import SelfCheck
from forescale.engine.state import num_parameters
from forescale.engine.step import Engine
from forescale.resilience.injector import Injector
from forescale.resilience.phases import PhaseTimer
from forescale.run.abilities import prompts_of_job, questions_of_job
from forescale.run.band import Watch
from forescale.run.directory import Attempt, Run
from forescale.run.feed import feed_of, left_out, objective_of, targets_of_a_window, whole_rows_of
from forescale.run.forecast import PredictionInterval
from forescale.run.identity import complete
from forescale.run.references import References
from forescale.train.abilities import Abilities
from forescale.train.callbacks import Callback, Checkpoints, Every, UserCallback, Validation
from forescale.train.evaluate import Score, Scored, evaluate, pooled
from forescale.train.guard import Guard, StepGuard
from forescale.train.live import Live
from forescale.train.metrics import Metrics, Prices, ProgressLine
from forescale.train.model import prices_of
from forescale.train.outer import Outer
from forescale.train.preferences import PreferenceScore, evaluate_preferences, pooled_preferences
from forescale.train.resume import ResumePoint
from forescale.train.samples import Samples

S = TypeVar("S")


@dataclass
class Parts:
    """What one attempt trains with."""

    batches: Generator[Batch, None, None]
    guard: StepGuard
    metrics: Metrics
    validation: Validation
    user_callbacks: list[UserCallback]
    checkpoints: Checkpoints
    snapshots: Checkpoints | None = None  # in the memory of nodes
    outer: Outer | None = None  # of a run on several clusters
    live: Live | None = None  # of a run with a forecast of its curve

    @property
    def callbacks(self) -> list[Callback]:
        """All callbacks in their order: a step is logged first; it is saved before it is scored,
        which may take an hour. What is saved and scored has taken
        part in the step's round."""
        rounds = [self.outer] if self.outer else []
        saving = [self.checkpoints, self.snapshots] if self.snapshots else [self.checkpoints]
        live = [self.live] if self.live else []
        return [self.metrics, *live, *self.user_callbacks, *rounds, *saving, self.validation]

    def close(self) -> None:
        """End the workers of the data stream, and write what the metrics still hold."""
        self.batches.close()
        self.metrics.close()


@dataclass
class Builder:
    """Builds Parts. numerics: what state.json records of the numerics; see run.start.numerics."""

    job: TrainJob
    run: Run
    sources: Sources
    model: nn.Module
    engine: Engine
    phases: PhaseTimer
    numerics: dict[str, Any]
    injector: Injector | None
    prediction: PredictionInterval | None
    references: References | None = None  # of preferences
    memory: PeerMemory | None = None
    outer: Outer | None = None

    @cached_property
    def objective(self) -> Objective:
        """The objective of held-out text, which decides what its targets are."""
        return objective_of(self.job, self.sources.vocab_size, held_out=True)

    @cached_property
    def _held_out_rows(self) -> dict[str, Bins]:
        """Tables of the held-out text; rank 0 makes those that are missing from the cache."""
        return self.engine.world.main_first(
            lambda: whole_rows_of(self.job, self.sources, "validation")
        )

    @cached_property
    def _abilities(self) -> Abilities | None:
        questions = questions_of_job(self.job, self.sources)
        return Abilities(questions, self.engine, self.phases.mark) if questions else None

    @cached_property
    def _samples(self) -> Samples | None:
        if not self.job.validation.prompts:
            return None
        rows, end = prompts_of_job(self.job, self.sources), self.sources.end_of_text
        decode = partial(self.sources.tokenizer.decode, skip_special_tokens=False)
        count = self.job.validation.prompt_tokens
        return Samples(rows, count, decode, end, self.engine, self.phases.mark)

    @property
    def _window_length(self) -> int:
        return window_length(self.objective, self.job.train.sequence_length)

    def parts(self, attempt: Attempt, point: ResumePoint) -> Parts:
        """Return the parts of an attempt that begins at `point`. Every rank calls it."""
        ranks, began = self.engine.world, point.position.step
        references = self.references.values["train"] if self.references else None
        feed = ranks.main_first(  # rank 0 makes tables that are missing from the cache
            lambda: feed_of(self.job, self.sources, point.position.skipped, references=references)
        )
        rollbacks = ranks.from_main(self.run.rollbacks, self.run.path)
        tables = dict(zip(feed.names, feed.bins or (), strict=False))
        for name, sentence in left_out(feed).items() if ranks.is_main else ():
            facts = tables[name].facts
            attempt.event("documents_left_out", source=name, what=sentence, **facts)
        judge = Guard(self.job.guard, rollbacks, point.guard)
        metrics = self._metrics(attempt, point.position, feed)
        due = self._every(self.job.validation.every)
        samples = self._samples
        write = (lambda position: metrics.wrote(position, samples())) if samples else None
        validation = Validation(due, self._score, metrics.scored, self._abilities, write)
        self.engine.norms_at = validation.is_due
        live = self._live(metrics, point)
        saving = checkpoints, _ = self._checkpoints(attempt, judge, live)
        replay = self.job.guard.replay
        guard = StepGuard(
            judge,
            SelfCheck(self.engine, self._place, self.numerics["exact"]),
            self.job.cadence(replay) if replay else None,
            attempt,
            self.phases,
            began,
            has_checkpoint=lambda: began > 0 or checkpoints.saved is not None,
            is_main=ranks.is_main,
        )
        batches = self._batches(attempt, point.position, feed)
        user_callbacks = self._user_callbacks(
            attempt, self.job.guard.most_rollbacks - len(rollbacks)
        )
        parts = batches, guard, metrics, validation, user_callbacks
        return Parts(*parts, *saving, self.outer, live)

    def _live(self, metrics: Metrics, point: ResumePoint) -> Live | None:
        """Return what compares the run with the band of its forecast, if there is one."""
        if metrics.band is None or self.prediction is None:
            return None
        # The state of a checkpoint is of another band in a branch, or with another forecast.
        name, total = f"{self.prediction.hash}:{self.job.total_steps}", self.job.total_steps
        state = point.watch if point.watch and point.watch["of"] == name else {}
        watch = Watch(metrics.band, total, {**state, "of": name})
        rules = self.job.checkpoint
        due, halts = self._every(rules.every, tuple(rules.at)), self.job.guard.forecast == "halt"
        return Live(self.run, watch, self.prediction, due, metrics, halts)

    @property
    def _place(self) -> str:
        """The host of this rank, with its stage of the pipeline if there is one."""
        pipeline, host = self.engine.world.pipeline, socket.gethostname()
        return host if pipeline.size == 1 else f"{host} (stage {pipeline.rank})"

    def lacks_score(self, point: ResumePoint) -> bool:
        """True if the run ended between the save that it resumes from and the evaluation of the
        same step. Every rank calls it, after the attempt has taken over the earlier rows."""
        step, checkpoint = point.position.step, point.checkpoint
        if checkpoint is None or checkpoint.path.parent != self.run.checkpoints:
            return False  # the rows of another run tell nothing of this one
        if not self._every(self.job.validation.every)(step):
            return False
        return not self.engine.world.from_main(
            lambda: self.run.is_evaluated(step), self.run.metrics
        )

    def _every(self, length: Duration, at: tuple[int, ...] = ()) -> Every:
        return Every(self.job.cadence(length), self.job.total_steps, at, length.seconds)

    def _batches(
        self, attempt: Attempt, position: Position, feed: Feed
    ) -> Generator[Batch, None, None]:
        job, world = self.job, self.engine.world
        fed, train = world.data, job.train
        share = StepShare(
            train.global_batch, train.micro_batch, fed.rank, fed.size, not train.invariant
        )
        shared = feed.substitute and world.size > 1

        def log(sentence: str) -> None:
            print(f"Rank {world.rank}: {sentence}.", file=sys.stderr, flush=True)
            if world.is_main:
                attempt.event("data_stalled", what=sentence)

        return stream(
            feed,
            share,
            range(position.step, job.total_steps),
            position.g,
            workers=job.data.workers,
            quarantine=frozenset(LostMember(*lost) for lost in position.quarantined),
            agree=world.union_in_background(LostMember) if shared else None,
            log=log,
            pin=world.device.type == "cuda",
            length=length_ramp(job).length,
            windows=job.batch_ramp.windows,
        )

    def _metrics(self, attempt: Attempt, position: Position, feed: Feed) -> Metrics:
        job, world = self.job, self.engine.world
        main, total = world.is_main, job.total_steps
        trackers = []
        if main:
            known = complete(self.run, num_parameters(self.engine), device_name(world))
            opening = (self.run.path, known, plain(job), position.step)
            trackers = [tracker.open(*opening) for tracker in job.logging.trackers]
        memory: Callable[[], int] = torch.cuda.max_memory_allocated
        if world.device.type != "cuda":  # no allocator's peak: the resident memory of this process
            process = psutil.Process()
            memory = lambda: process.memory_info().rss  # noqa: E731
        peak = peak_flops(world, job.logging.peak_flops, job.precision.kind)
        each = 1.0
        if not job.objective.is_next_token:  # rows count targets, of which a window then has fewer
            columns = job.train.sequence_length * job.objective.rows
            each = columns / targets_of_a_window(job, feed)
        return Metrics(
            attempt,
            self._prices(each, peak * world.size),
            {g["name"]: g["peak_learning_rate"] for g in self.engine.param_groups},
            ProgressLine(
                self._every(job.logging.every),
                total,
                position.step,
                main,
                job.objective.counted,
                job.batch_ramp.samples,
            ),
            trackers,
            memory,
            main,
            position.quarantined,
            self.prediction,
            job.objective.targets,
            self.prediction.band(job) if self.prediction else None,
            job.validation.prompts,
        )

    def _prices(self, each: float, peak: float) -> Callable[[int], tuple[Prices, Prices]]:
        """Return what Metrics takes as `prices`. each: tokens of a target; peak: see Prices."""
        ramp, samples = length_ramp(self.job), self.job.batch_ramp.samples

        @cache
        def of(length: int) -> Prices:
            flops_of = prices_of(self.job, self.model, length)
            return Prices(**{name: each * flops for name, flops in flops_of.items()}, peak=peak)

        def prices(step: int) -> tuple[Prices, Prices]:
            shares = ramp.shares(step, samples)
            full, causal, six_n = (
                sum(share * getattr(of(length), name) for length, share in shares)
                for name in ("full", "causal", "six_n")
            )
            return of(ramp.length(step - 1)), Prices(full, causal, six_n, peak)

        return prices

    def _user_callbacks(self, attempt: Attempt, rollbacks_left: int) -> list[UserCallback]:
        main = self.engine.world.is_main
        event = attempt.event if main else lambda *_, **__: None
        callbacks = []
        for i, config in enumerate(self.job.callbacks):
            callback = make(f"callbacks.{i}", config, engine=self.engine, folder=attempt.path)
            callbacks.append(UserCallback(callback, event, rollbacks_left))
        return callbacks

    def _checkpoints(
        self, attempt: Attempt, judge: Guard, live: Live | None
    ) -> tuple[Checkpoints, Checkpoints | None]:
        job, rules = self.job, self.job.checkpoint
        scale = {"adapter_scale": job.lora.scale} if job.lora.rank else {}

        def facts() -> dict[str, Any]:
            rounds = self.outer.facts if self.outer else {}
            watch = {"watch": live.watch.copy()} if live else {}
            return {"numerics": self.numerics, "guard": judge.state, **watch, **scale, **rounds}

        parts = self.run, attempt, self.engine, facts, keep_of(job)
        extra: dict[str, Any] = {"midway": self.injector.writing} if self.injector else {}
        saver = Saver(*parts, background=rules.background, **extra)
        checkpoints = Checkpoints(self._every(rules.every, tuple(rules.at)), saver)
        if self.memory is None or rules.peer is None:
            return checkpoints, None
        snapshots = PeerSaver(*parts, **extra)
        snapshots.memory = self.memory
        due = Every(job.cadence(rules.peer), 0, (), rules.peer.seconds)  # none at the end
        return checkpoints, Checkpoints(due, snapshots)

    def _score(self, complete: bool) -> Mapping[str, Scored]:
        """Return the scores of the held-out split of each source of a mixture, and of all
        together."""
        job, world = self.job, self.engine.world
        if self.references is not None:
            return self._preference_scores(None if complete else job.validation.windows)
        scores: dict[str, Score] = {}
        for name, split in self.sources.split("validation").items():
            scores[name] = evaluate(
                partial(self.engine.losses, everywhere=False),
                split,
                self.sources.token_bytes,
                sequence_length=self._window_length,
                micro_batch=job.train.micro_batch,
                windows=None if complete else job.validation.windows,
                documents=job.data.document_mask,
                objective=self.objective,
                bins=self._held_out_rows.get(name),
                ranks=world.scoring,
                mark=self.phases.mark,
            )
        return with_pooled(scores, pooled)

    def _preference_scores(self, windows: int | None) -> Mapping[str, PreferenceScore]:
        assert self.references is not None
        ranks, scores = self.engine.world.data, {}

        def nats(micro: MicroBatch) -> Tensor:
            self.phases.mark("evaluation")
            return self.engine.losses(micro)

        for name, split in self.sources.split("validation").items():
            micros = validation_windows(
                split,
                self._window_length,
                self.job.train.micro_batch,
                ranks.rank,
                ranks.size,
                windows,
                objective=self.objective,
                bins=self._held_out_rows[name],
                references=self.references.values["validation"][name],
            )
            assert isinstance(self.job.objective, PreferencesConfig)
            beta = self.job.objective.beta
            scores[name] = evaluate_preferences(nats, micros, beta, ranks)
        return with_pooled(scores, pooled_preferences)


def with_pooled(scores: dict[str, S], pooled: Callable[[list[S]], S]) -> dict[str, S]:
    """Return the scores of the sources of a mixture, and of all together as "validation"."""
    together = pooled(list(scores.values()))
    return {**(scores if len(scores) > 1 else {}), "validation": together}
