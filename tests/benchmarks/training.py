"""The two loops over the same work: ours with all its callbacks, and DeepSpeed alone.

Both are called with a number of steps and return tokens/s. Only in a process of its own: an engine
is one a process, and `Trainer` takes over the signals.
"""

import time
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.data.dataset import Sources
from forescale.data.stream import Batch, StepShare, stream
from forescale.engine import world
from forescale.engine.compilation import compilation
from forescale.engine.deepspeed_config import deepspeed_config, merged
from forescale.engine.optim import build_optimizer, parameter_groups
from forescale.run.feed import feed_of
from forescale.run.rows import read_rows
from forescale.run.start import open_sources, settle
from forescale.train.loop import train
from forescale.train.model import build_model
from forescale.train.resume import resume
from forescale.train.trainer import Trainer
from tests.benchmarks.sizes import TrainingSizes

NEVER = "1000000 steps"


def make_job(folder: Path, sizes: TrainingSizes, *overrides: str) -> TrainJob:
    """The job of `sizes` in `folder`, with no evaluation and no checkpoint ever due."""
    endless = ["train.tokens=null", f"train.steps={NEVER.split()[0]}"]
    undue = [f"checkpoint.every={NEVER}", f"validation.every={NEVER}"]
    return compose(TrainJob, [*endless, *undue, *sizes.words(folder), *overrides])


class Product:
    """forescale.train.loop.train as a rank runs it. `spent`: seconds by part, since `forget`."""

    def __init__(self, job: TrainJob):
        world.set_environment()
        self.rank = rank = Trainer(job, time.monotonic())
        rank._build()
        point = rank._begin(resume(rank.run, rank.job, rank.engine, rank._warn, rank.attempt))
        if rank.compilation.enabled:
            rank.engine.compile(rank.compilation.by_part)
        self.position, self.parts = point.position, rank.builder.parts(rank.attempt, point)
        self._timed: set[str] = set()
        self.forget()

    def __call__(self, steps: int) -> float:
        began, rank, tokens = time.perf_counter(), self.rank, self.position.tokens
        parts, batches = self.parts, islice(self.parts.batches, steps)
        arguments = (rank._multipliers, parts.callbacks, self.position, rank.phases)
        self.position, _ = train(rank.engine, batches, *arguments, lambda: False, parts.guard)
        return (self.position.tokens - tokens) / (time.perf_counter() - began)

    def forget(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._from = self.position.step

    def watch(self) -> None:
        """Time what our loop does beside forward, backward and step, under `spent`."""
        metrics, *others = self.parts.callbacks
        engine: Any = self.rank.engine
        ranks: Any = self.rank.world
        self._time(self.rank, "_multipliers", "learning rate")
        self._time(engine, "seed_for", "seeding")
        self._time(engine, "measure", "loss and gradient norm")
        self._time(engine.layout, "prepare_step", "flattening, and Muon's iterations")
        self._time(engine.layout.optimizer, "unscale_and_clip_grads", "clipping")
        self._time(ranks, "share", "summary")
        summaries = ranks.summaries
        ranks.summaries = lambda behind: iter(list(summaries(behind)))
        self._time(ranks, "summaries", "summary")
        self._time(metrics, "see", "metrics row")
        for callback in others:
            self._time(callback, "see", "other callbacks")

    def _time(self, owner: Any, name: str, label: str) -> None:
        function = getattr(owner, name)
        self._timed.add(label)

        def timed(*args, **kwargs):
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[label] += time.perf_counter() - began

        setattr(owner, name, timed)

    def facts(self) -> dict[str, Any]:
        """What each part took, and how many of the steps were clipped, since `forget`."""
        rows = read_rows(self.rank.run.metrics, after=self._from)
        assert not (idle := self._timed - self.spent.keys()), f"no step calls {idle}"
        spent = {"data wait": sum(r["seconds"]["data"] for r in rows), **self.spent}
        clip = self.rank.job.optimizer.clip or float("inf")
        return {
            "microseconds a step": {k: round(1e6 * s / len(rows)) for k, s in spent.items()},
            "clipped steps": f"{sum(r['grad_norm'] > clip for r in rows)} of {len(rows)}",
        }


class Bare:
    """forward, backward, step on an engine of deepspeed.initialize, and nothing else: no schedule,
    no look at the loss, the data in memory. The same JSON as ours, so no norm and no clipping,
    unless DeepSpeed `clips`."""

    def __init__(self, job: TrainJob, clips: bool = False):
        world.set_environment()
        import deepspeed

        world._quiet_deepspeed()
        if not torch.distributed.is_initialized():
            deepspeed.init_distributed("gloo")
        sources = open_sources(job.data)
        job = settle(job, sources)
        self.data = batches(job, sources, 64)
        model = build_model(job, sources.vocab_size)
        o, muon = job.optimizer, model.muon_parameters()  # type: ignore[operator]
        groups = [g.as_dict() for g in parameter_groups(model.named_parameters(), o, muon)]
        optimizer = build_optimizer(o, groups)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_learning_rate"] / 10
        config = deepspeed_config(job, 1)
        if clips:
            zero = {"zero_optimization": {"compute_grad_norm": True}}
            config = merged(config, {"gradient_clipping": o.clip, **zero})
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if compilation(job, 1, "cpu").enabled:
            self.engine.compile()
        self.step = 0

    def __call__(self, steps: int) -> float:
        began, tokens = time.perf_counter(), 0
        for _ in range(steps):
            batch = self.data[self.step % len(self.data)]
            for micro in batch.micro:
                loss = self.engine(micro.tokens, micro.targets).sum() / batch.targets
                self.engine.backward(loss)
                self.engine.step()
            tokens += batch.targets
            self.step += 1
        return tokens / (time.perf_counter() - began)


def batches(job: TrainJob, sources: Sources, steps: int) -> list[Batch]:
    """The first batches of a job, in memory."""
    share = StepShare(job.train.global_batch, job.train.micro_batch)
    return list(stream(feed_of(job, sources), share, range(steps), 0))
