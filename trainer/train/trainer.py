"""One rank's training, from a started run to the last checkpoint: builds all parts, runs the loop.

Invariant: what ranks decide here (the attempt, the checkpoint to go on from) rank 0 decides and the
others are told.
"""

import os
import socket
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import psutil
import torch

from forescale.checkpoint.writer import Checkpoint, Position
from forescale.config.schema import plain
from forescale.config.train import TrainJob
from forescale.data.feed import Lost
from forescale.data.stream import Batch, Share, stream
from forescale.engine import build
from forescale.engine.deepspeed_config import deepspeed_config
from forescale.engine.optim import learning_rate
from forescale.engine.ranks import Ranks
from forescale.engine.selfcheck import SelfCheck
from forescale.engine.step import Engine
from forescale.engine.trackers import open_trackers
from forescale.engine.world import World, join
from forescale.errors import DONE, INTERRUPTED, UserError
from forescale.resilience.diagnosis import waits_of
from forescale.resilience.injector import injector_of
from forescale.resilience.launcher import ATTEMPT, Wish
from forescale.resilience.phases import Pulse
from forescale.resilience.reporter import Heart
from forescale.run.directory import Attempt
from forescale.run.feed import feed_of
from forescale.run.forecast import band_of
from forescale.run.start import numerics, start
from forescale.train.callbacks import Checkpoints, Every, Validation
from forescale.train.evaluate import Score, evaluate, pooled
from forescale.train.guard import Guard, Ill, Rollback
from forescale.train.loop import train
from forescale.train.metrics import Line, Metrics, Prices
from forescale.train.model import build_model, prices_of
from forescale.train.profiler import traced
from forescale.train.resume import Departure, go_back, set_out
from forescale.train.watch import Watch


class Rank:
    """The state of one rank while it trains a run. `train` does it all and returns an exit code."""

    def __init__(self, job: TrainJob, began: float):
        self.pulse = Pulse("startup", began)
        self.wish = Wish().listen(job.launch.grace.seconds or 0.0)
        self._process = psutil.Process()
        build.be_deterministic()
        size = int(os.environ["WORLD_SIZE"])
        build.check_world(job, size)
        seconds = job.launch.timeout.seconds or 1800.0
        self.world: World = join(deepspeed_config(job, size), size, seconds)
        world = self.world
        self.ranks = Ranks(world.rank, world.size, world.gather, world.to_main)
        again = ATTEMPT in os.environ or not self.world.is_main
        started = self._from_main(lambda: start(job, again))
        self.run, self.job, self.sources = started.run, started.job, started.sources
        self.band = self.ranks.from_main(lambda: band_of(self.job), self.run.path)
        self.attempt = self._attempt()
        rank = self.world.rank
        self.injector = injector_of(self.job.faults, rank, self.run, self.attempt, self.pulse)
        waits = waits_of(self.job.engine.stage)
        self.heart = Heart(self.pulse, self.attempt, rank, size, self.job.pulse, waits).start()
        self.total = self.job.total_steps
        self.compilation = build.compilation(self.job)

    def _from_main(self, work) -> Any:
        """Do `work` on rank 0 first, then (it is idempotent) on the others; a UserError of rank 0
        ends all with the same words."""
        fault, value = None, None
        if self.world.is_main:
            try:
                value = work()
            except UserError as e:
                fault = e
        if fault := self.world.from_main(fault):
            raise fault
        return value if self.world.is_main else work()

    def _attempt(self, new: bool = False) -> Attempt:
        """The attempt that our launcher numbered; a `new` one, or under another launcher, rank 0
        does."""
        path = None if new else os.environ.get(ATTEMPT)
        if path is None:
            path = self.world.from_main(
                str(self.run.new_attempt().path) if self.world.is_main else None
            )
        return Attempt(Path(path))

    def train(self) -> int:
        """Train to the end, or until a signal asks to stop. Returns DONE or INTERRUPTED."""
        self.model = build_model(self.job, self.sources.vocab_size)
        self.engine: Engine = build.build_engine(self.world, self.model, self.job)
        self.engine.mark = self.pulse.mark
        if self.injector:
            self.engine.disturb = self.injector.disturb
        departure = self._begin(set_out(self.run, self.job, self.engine, self.ranks, self._tell))
        position = departure.position
        if position.step >= self.total:
            self._say(f"{self.run.name} is complete: {position.step:,} steps are trained.")
            return DONE
        if any(self.world.gather(self._asked())):
            return INTERRUPTED  # during start-up: there is nothing new to save
        if self.compilation.wanted:
            self.engine.compile()
        if self.compilation.notice:
            self._say(self.compilation.notice)
        if self.band:
            self._say(self.band.due(self.job))
        while True:
            try:
                position, stopped = self._follow(departure)
                break
            except Rollback as rollback:
                with self.pulse("recovery"):
                    departure = self._go_back(rollback)
        if stopped:
            self._say(f"Stopped at step {position.step:,}; saved. The same command goes on there.")
        return INTERRUPTED if stopped else DONE

    def _follow(self, departure: Departure) -> tuple[Position, bool]:
        """One attempt: to the end or a wish to stop, both of which are saved. Raises
        guard.Rollback; UserError where the guard stops the run."""
        position, began = departure.position, departure.position.step
        rollbacks = self.ranks.from_main(self.run.rollbacks, self.run.path)
        guard = Guard(self.job.guard, rollbacks, departure.guard)
        metrics, validation, saves = self._parts(position, guard)
        watch = self._watch(guard, began, lambda: began > 0 or saves.saved is not None)
        batches = self._batches(position)
        reason = None
        try:
            with traced(self.job.profile.interval, self.attempt.path / "trace", batches) as steps:
                position, stopped = train(
                    self.engine,
                    steps,
                    self._rate,
                    [metrics, validation, saves],
                    position,
                    self.pulse,
                    self._asked,
                    watch,
                )
            stopped = stopped and position.step < self.total
            with self.pulse("checkpoint"):
                saves.save(position)
            reason = "interrupted" if stopped else "complete"
        except Ill as ill:
            position = ill.position
            if isinstance(ill, Rollback):
                with self.pulse("checkpoint"):
                    saves.finish()
                reason = "rollback"
                raise
            if ill.trusted and position.step > began:
                with self.pulse("checkpoint"):
                    saves.save(position)
            reason = "halted"
            raise self._stopped_by(ill) from None
        finally:
            self.pulse.mark("closing")
            batches.close()
            metrics.close()
            if reason and self.world.is_main:
                seconds = self.pulse.take()  # since the last row
                self.attempt.event("ended", step=position.step, reason=reason, seconds=seconds)
        return position, stopped

    def _stopped_by(self, halt: Ill) -> UserError:
        todo = (
            "look at the events and the data there; guard.* says when a run stops, "
            "run.from and data.skip branch off before it"
        )
        return UserError(f"{self.run.path}, step {halt.step:,}", f"stopped: {halt.reason}", todo)

    def _watch(self, guard: Guard, began: int, can_go_back: Callable[[], bool]) -> Watch:
        replay = self.job.guard.replay
        return Watch(
            self.job.guard,
            guard,
            SelfCheck(self.engine, socket.gethostname()),
            self.job.steps_of(replay) if replay else None,
            self.attempt,
            self.pulse,
            began,
            can_go_back,
            self.world.is_main,
        )

    def _asked(self) -> bool:
        return bool(self.wish)

    def _rate(self, step: int) -> float:
        return learning_rate(self.job.schedule, step, self.total, self.job.tokens_per_step)

    def _batches(self, position: Position) -> Generator[Batch, None, None]:
        job, world = self.job, self.world
        feed = feed_of(job, self.sources, position.skipped)
        share = Share(job.train.global_batch, job.train.micro_batch, world.rank, world.size)
        shared = feed.substitute and world.size > 1
        return stream(
            feed,
            share,
            range(position.step, self.total),
            position.g,
            workers=job.data.workers,
            quarantine=frozenset(Lost(*lost) for lost in position.quarantined),
            agree=world.union_in_background() if shared else None,
            tell=self._tell_stall,
        )

    def _tell_stall(self, sentence: str) -> None:
        print(f"Rank {self.world.rank}: {sentence}.", file=sys.stderr, flush=True)
        if self.world.is_main:
            self.attempt.event("data_stalled", what=sentence)

    def _begin(self, departure: Departure) -> Departure:
        """Begin the attempt there, and say so."""
        self.heart.move(self.attempt)
        if self.injector:
            self.injector.begin(self.attempt, departure.position.step)
        if self.world.is_main:
            self.attempt.start_from(departure.parent, self.run)
            self._tell_numerics(departure.found)
            if departure.found is not None:
                step = departure.position.step
                self._say(f"Going on from {departure.found.path} (step {step:,}).")
        return departure

    def _go_back(self, rollback: Rollback) -> Departure:
        """To a checkpoint before an ill step, in an attempt of its own."""
        self._say(f"Step {rollback.step:,}: {rollback.reason}. Rolling back.")
        departure = go_back(rollback, self.run, self.engine, self.ranks, self._tell)
        self.attempt = self._attempt(new=True)
        return self._begin(departure)

    def _tell(self, kind: str, **facts: Any) -> None:
        if self.world.is_main:
            self.attempt.event(kind, **facts)
            self._say(f"Warning: {kind.replace('_', ' ')}: {facts}")

    def _tell_numerics(self, found: Checkpoint | None) -> None:
        old = (found.state.get("numerics") or {}) if found else {}
        new = self._numerics()
        for key in sorted(old.keys() & new.keys()):
            if old[key] != new[key]:
                self.attempt.event("numerics_changed", key=key, old=old[key], new=new[key])
                self._say(f"Not exact to the bit from here: {key} was {old[key]}, is {new[key]}.")

    def _numerics(self) -> dict[str, Any]:
        world, compiled = self.world, self.compilation.wanted
        return numerics(self.job, world.size, world.device.type, torch.get_num_threads(), compiled)

    def _parts(self, position: Position, guard: Guard) -> list[Any]:
        job, main = self.job, self.world.is_main
        line = Line(self._every(job.logging.every), self.total, position.step, main)
        rates = {g["name"]: g["peak_learning_rate"] for g in self.engine.param_groups}
        sinks = []
        if main:
            config = plain(job)
            sinks = open_trackers(job.logging, self.run.path, self.run.name, config, position.step)
        peak = build.peak_flops(self.world, job.logging.peak_flops, job.precision.kind)
        prices = Prices(**prices_of(job, self.model), peak=peak * self.world.size)
        lost, band = position.quarantined, self.band
        metrics = Metrics(self.attempt, prices, rates, line, sinks, self._memory, main, lost, band)
        validation = Validation(self._every(job.validation.every), self._score, metrics.validated)
        numerics = self._numerics()

        def facts() -> dict[str, Any]:
            return {"numerics": numerics, "guard": guard.state}

        rules = job.checkpoint
        saves = Checkpoints(
            Every(rules.every, job.steps_of(rules.every), self.total, rules.at),
            rules.keep,
            self.run,
            self.attempt,
            self.engine,
            facts,
            keep_every=job.steps_of(rules.keep_every) if rules.keep_every else None,
            at=rules.at,
            keep_best=rules.keep_best,
            background=rules.background,
            **({"midway": self.injector.writing} if self.injector else {}),
        )
        return [metrics, validation, saves]

    def _every(self, length) -> Every:
        return Every(length, self.job.steps_of(length), self.total)

    def _score(self, whole: bool) -> dict[str, Score]:
        """The held-out split of each source of a mixture, and of all together."""
        job, world, scores = self.job, self.world, {}
        for name, split in self.sources.split("validation").items():
            scores[name] = evaluate(
                self.engine.losses,
                split,
                self.sources.token_bytes,
                sequence_length=job.train.sequence_length,
                micro_batch=job.train.micro_batch,
                windows=None if whole else job.validation.windows,
                documents=job.data.document_mask,
                rank=world.rank,
                world_size=world.size,
                gather=world.gather,
            )
        together = pooled(list(scores.values()))
        return {**(scores if len(scores) > 1 else {}), "validation": together}

    def _memory(self) -> int:
        """Bytes: peak of the GPU's allocator, else resident in this process."""
        if self.world.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        return self._process.memory_info().rss

    def _say(self, text: str) -> None:
        if self.world.is_main:
            print(text, flush=True)


def run_rank(job: TrainJob, began: float | None = None) -> int:
    """Be one rank of `job`, as this process's environment says. Returns the exit code."""
    rank = Rank(job, time.monotonic() if began is None else began)
    code = rank.train()
    rank.heart.stop()
    rank.world.close()
    return code
