"""The two loops over the same work: ours with all its parts, and DeepSpeed alone.

Both are called with a number of steps and return tokens/s. Only in a process of its own: an engine
is one a process, and `Rank` takes over the signals.
"""

import time
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.data.sources import Sources
from forescale.data.stream import Batch, Share, stream
from forescale.engine import build, world
from forescale.engine.deepspeed_config import deepspeed_config, merged
from forescale.engine.optim import parameter_groups
from forescale.engine.step import build_optimizer
from forescale.run.directory import read_rows
from forescale.run.feed import feed_of
from forescale.run.start import open_sources, settle
from forescale.train.loop import train
from forescale.train.model import build_model
from forescale.train.trainer import Rank

NEVER = "1000000 steps"


def make_job(folder: Path, *overrides: str) -> TrainJob:
    """The default job, but for `overrides`, with no evaluation and no checkpoint ever due."""
    endless = ["train.tokens=null", f"train.steps={NEVER.split()[0]}", f"run.root={folder}"]
    undue = [f"checkpoint.every={NEVER}", f"validation.every={NEVER}"]
    return compose(TrainJob, [*endless, *undue, *overrides])


class Ours:
    """forescale.train.loop.train as a rank runs it. `spent`: seconds by part, since `forget`."""

    def __init__(self, job: TrainJob):
        world.set_environment()
        self.rank = rank = Rank(job, time.monotonic())
        job = rank.job
        model = build_model(job, rank.sources.vocab_size)
        rank.engine = build.build_engine(rank.world, model, job)
        self.position = rank._resume()
        if rank.compilation.wanted:
            rank.engine.compile()
        self.parts = rank._parts(model, self.position)
        self.batches = rank._batches(self.position)
        self.forget()

    def __call__(self, steps: int) -> float:
        began, rank, tokens = time.perf_counter(), self.rank, self.position.tokens
        batches = islice(self.batches, steps)
        arguments = (rank._rate, self.parts, self.position, rank.pulse, rank._asked)
        self.position, _ = train(rank.engine, batches, *arguments)
        return (self.position.tokens - tokens) / (time.perf_counter() - began)

    def forget(self) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._from = self.position.step

    def watch(self) -> None:
        """Time what our loop does beside forward, backward and step, under `spent`."""
        metrics, *others = self.parts
        engine: Any = self.rank.engine
        ranks: Any = self.rank.world
        self._time(self.rank, "_rate", "learning rate")
        self._time(torch, "manual_seed", "seeding")
        self._time(engine, "gradient_norm", "gradient norm")
        self._time(engine.layout, "prepare_step", "flattening, and Muon's iterations")
        self._time(engine.layout.optimizer, "unscale_and_clip_grads", "clipping")
        self._time(ranks, "share", "word")
        words = ranks.words
        ranks.words = lambda behind: iter(list(words(behind)))
        self._time(ranks, "words", "word")
        self._time(metrics, "see", "metrics row")
        for part in others:
            self._time(part, "see", "other parts")

    def _time(self, owner: Any, name: str, label: str) -> None:
        function = getattr(owner, name)

        def timed(*args, **kwargs):
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.spent[label] += time.perf_counter() - began

        setattr(owner, name, timed)

    def facts(self) -> dict[str, Any]:
        """What each part took, and how many of the steps were clipped, since `forget`."""
        rows = [r for r in read_rows(self.rank.run.metrics) if r["step"] > self._from]
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
        groups = [vars(g) for g in parameter_groups(model.named_parameters(), o, muon)]
        settings = {"betas": (o.beta1, o.beta2), "eps": o.eps, "momentum": o.momentum}
        optimizer = build_optimizer(o.kind, groups, **settings)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_learning_rate"] / 10
        config = deepspeed_config(job, 1)
        if clips:
            zero = {"zero_optimization": {"compute_grad_norm": True}}
            config = merged(config, {"gradient_clipping": o.clip, **zero})
        self.engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if build.compilation(job).wanted:
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
    share = Share(job.train.global_batch, job.train.micro_batch)
    return list(stream(feed_of(job, sources), share, range(steps), 0))
