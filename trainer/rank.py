"""One rank's training, from a started run to the last checkpoint: builds all parts, runs the loop.

Invariant: what ranks decide here (the attempt, the checkpoint to go on from) rank 0 decides and the
others are told.
"""

import os
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import psutil
import torch

from trainer import checkpoint
from trainer.checkpoint import Checkpoint, Position
from trainer.config import TrainJob
from trainer.data.feed import Lost
from trainer.data.stream import Batch, Share, stream
from trainer.engine import setup
from trainer.engine.derive import deepspeed_config
from trainer.engine.step import Engine
from trainer.engine.trackers import open_trackers
from trainer.engine.world import World, join
from trainer.errors import DONE, INTERRUPTED, UserError
from trainer.evaluate import Score, evaluate, pooled
from trainer.feeding import feed_of
from trainer.launch import ATTEMPT, Wish
from trainer.loop import train
from trainer.metrics import Line, Metrics, Prices
from trainer.model import build_model, prices_of
from trainer.parts import Checkpoints, Every, Validation
from trainer.profile import traced
from trainer.pulse import Pulse
from trainer.recipe import learning_rate
from trainer.run import Attempt, Parent, Run
from trainer.schema import plain
from trainer.start import numerics, start


class Rank:
    """The state of one rank while it trains a run. `train` does it all and returns an exit code."""

    def __init__(self, job: TrainJob, began: float):
        self.pulse = Pulse("startup", began)
        self.wish = Wish().listen()
        self._process = psutil.Process()
        setup.be_deterministic()
        size = int(os.environ["WORLD_SIZE"])
        setup.check_world(job, size)
        seconds = job.launch.timeout.seconds or 1800.0
        self.world: World = join(deepspeed_config(job, size), size, seconds)
        again = ATTEMPT in os.environ or not self.world.is_main
        started = self._from_main(lambda: start(job, again))
        self.run, self.job, self.sources = started.run, started.job, started.sources
        self.attempt = self._attempt()
        self.total = self.job.total_steps
        self.compilation = setup.compilation(self.job)

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

    def _attempt(self) -> Attempt:
        """The attempt that our launcher numbered; under another launcher rank 0 does."""
        path = os.environ.get(ATTEMPT)
        if path is None:
            path = self.world.from_main(
                str(self.run.new_attempt().path) if self.world.is_main else None
            )
        return Attempt(Path(path))

    def train(self) -> int:
        """Train to the end, or until a signal asks to stop. Returns DONE or INTERRUPTED."""
        job = self.job
        model = build_model(job, self.sources.vocab_size)
        self.engine: Engine = setup.build_engine(self.world, model, job)
        position = self._resume()
        if position.step >= self.total:
            self._say(f"{self.run.name} is complete: {position.step:,} steps are trained.")
            return DONE
        if any(self.world.gather(self._asked())):
            return INTERRUPTED  # during start-up: there is nothing new to save
        if self.compilation.wanted:
            self.engine.compile()
        if self.compilation.notice:
            self._say(self.compilation.notice)
        parts = self._parts(model, position)
        batches = self._batches(position)
        try:
            with traced(job.profile.interval, self.attempt.path / "trace", batches) as batches:
                position, stopped = train(
                    self.engine, batches, self._rate, parts, position, self.pulse, self._asked
                )
            parts[-1].save(position)
        finally:
            batches.close()
            parts[0].close()
        stopped = stopped and position.step < self.total
        if self.world.is_main:
            reason = "interrupted" if stopped else "complete"
            seconds = self.pulse.take()  # since the last row
            self.attempt.event("ended", step=position.step, reason=reason, seconds=seconds)
        if stopped:
            self._say(f"Stopped at step {position.step:,}; saved. The same command goes on there.")
        return INTERRUPTED if stopped else DONE

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

    def _resume(self) -> Position:
        """Load the newest whole checkpoint, or the origin's, or begin; say which."""
        found = self._from_main(lambda: self._choose())
        if found is None:
            position, parent = Position(), Parent(0)
        else:
            weights_only = found.path.parent.parent != self.run.path and (
                self.job.run.origin.what == "weights"
            )
            checkpoint.load(found, self.engine, weights_only)
            position = Position() if weights_only else found.position
            parent = Parent(position.step, str(found.path))
        if self.world.is_main:
            self.attempt.start_from(parent, self.run)
            self._tell_numerics(found)
            if found is not None:
                self._say(f"Going on from {found.path} (step {position.step:,}).")
        return position

    def _choose(self) -> Checkpoint | None:
        def tell(kind: str, **facts: Any) -> None:
            if self.world.is_main:
                self.attempt.event(kind, **facts)
                self._say(f"Warning: {kind.replace('_', ' ')}: {facts}")

        own = checkpoint.newest_whole(self.run, tell)
        origin = self.job.run.origin
        if own is not None or origin.run is None:
            return own
        return checkpoint.at_step(Run.existing(origin.run, self.job.run.root), origin.step)

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

    def _parts(self, model: torch.nn.Module, position: Position) -> list[Any]:
        job, main = self.job, self.world.is_main
        line = Line(self._every(job.logging.every), self.total, position.step, main)
        rates = {g["name"]: g["peak_learning_rate"] for g in self.engine.param_groups}
        sinks = []
        if main:
            config = plain(job)
            sinks = open_trackers(job.logging, self.run.path, self.run.name, config, position.step)
        peak = setup.peak_flops(self.world, job.logging.peak_flops, job.precision.kind)
        prices = Prices(**prices_of(job, model), peak=peak * self.world.size)
        lost = position.quarantined
        metrics = Metrics(self.attempt, prices, rates, line, sinks, self._memory, main, lost)
        validation = Validation(self._every(job.validation.every), self._score, metrics.validated)
        facts = {"numerics": self._numerics()}
        saves = Checkpoints(
            self._every(job.checkpoint.every),
            job.checkpoint.keep,
            self.run,
            self.attempt,
            self.engine,
            facts,
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
    rank.world.close()
    return code
