"""Models that differ in their mixer alone, how fast they are, what they learn, where curves cross.

Invariant: two mixers that are compared have the same width, depth and, as far as the MLP's width
allows, number of parameters; they read the same batches in the same order.
"""

import ctypes
import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import nn

from forescale.config.sections.optimizer import AdamWConfig
from forescale.config.train import TrainJob
from forescale.data.dataset import Dataset
from forescale.data.stream import StepShare, stream
from forescale.inference.scoring import Bucket, loss_by_position
from forescale.models import ModelConfig, Transformer
from forescale.models.flops import count, flops_per_token
from forescale.models.memory import cache_bytes
from forescale.models.mixers import MIXERS
from forescale.models.part import part_of
from forescale.run.feed import feed_of
from forescale.run.start import open_sources
from tests.benchmarks.coordinates import optimizers

MB = 1e6
Settings = Mapping[str, Mapping[str, int]]  # of a mixer, by its name: keys of its own


def model_of(name: str, base: ModelConfig, settings: Settings) -> ModelConfig:
    """Return `base` with the mixer of this name (several, one a layer: mingru+attention), and the
    width of the MLP with which it has as many parameters as base."""
    names = name.split("+")
    blocks = [part_of(MIXERS, {"kind": name, **settings.get(name, {})}) for name in names]
    mixed = replace(base, mixer_pattern=blocks)
    one, two = (count(replace(mixed, mlp_width=width)).total for width in (1, 2))
    width = 1 + (count(base).total - one) / (two - one)
    return replace(mixed, mlp_width=max(8, 8 * round(width / 8)))


@dataclass(frozen=True)
class Speed:
    """Of one mixer at one length: tokens a second in training and in decoding, and MB."""

    training: float
    decoding: float
    peak: float  # weights, and what a training step adds at most
    cache: float  # of one sequence


def speeds(
    turn: Callable[..., None], config: ModelConfig, lengths: Sequence[int], rounds: int
) -> None:
    """Answer with the Speed at each of `lengths`, `rounds` times each, after a turn to warm up.

    A training step is forward and backward of as many windows as have the longest's tokens. This is
    the function of a processes.Side, so that mixers take turns. It has one thread, and its seconds
    are the processor's, without those that other work on the machine takes.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = Transformer(config)
    model(torch.zeros(1, 8, dtype=torch.long)).sum().backward()  # loads what is loaded once
    turn()
    for length in lengths:
        tokens = torch.randint(config.sizes.vocab_size, (max(lengths) // length, length))
        peak = _peak(model, tokens)
        turn()
        for _ in range(rounds):
            cache = cache_bytes(config, length, 4) / MB
            turn(Speed(_train(model, tokens), _decode(model, tokens[:1]), peak, cache))


def _train(model: Transformer, tokens: torch.Tensor) -> float:
    model.train().zero_grad()
    began = time.process_time()
    model(tokens, tokens).sum().backward()
    return tokens.numel() / (time.process_time() - began)


@torch.no_grad()
def _decode(model: Transformer, tokens: torch.Tensor, steps: int = 16) -> float:
    """Read one sequence, then one token after the other."""
    cache = model.eval().new_cache()
    model(tokens, cache=cache)
    model(tokens[:, :1], cache=cache)  # here the cache makes room
    began = time.process_time()
    for _ in range(steps):
        model(tokens[:, :1], cache=cache)
    return steps / (time.process_time() - began)


def _peak(model: nn.Module, tokens: torch.Tensor) -> float:
    """MB of the weights and of what a training step has resident at most beside them (Linux)."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    model.train().zero_grad()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew
    before = _resident("VmRSS")
    model(tokens, tokens).sum().backward()
    return (weights + _resident("VmHWM") - before) / MB


def _resident(kind: str) -> int:
    with open("/proc/self/status") as status:
        fields = dict(line.split(":", 1) for line in status)
    return int(fields[kind].split()[0]) * 1024


@dataclass(frozen=True)
class Learning:
    """marks: loss (nats a token) at each share of the budget; positions: after training."""

    rate: float
    tokens: int
    flops: float
    marks: dict[float, float]
    positions: list[Bucket]


def learn(
    config: ModelConfig, job: TrainJob, rate: float, budget: float, shares: Sequence[float],
    windows: int,
) -> Learning:  # fmt: skip
    """Train until `budget` FLOPs (causal, the last step whole) are spent, with a learning rate that
    is constant after 20 steps, and score `windows` held-out windows at each share of it and, twice
    as long as in training, by position."""
    length, batch = job.train.sequence_length, job.train.global_batch
    sources = open_sources(job.data)
    dataset = sources.first
    torch.manual_seed(0)
    model = Transformer(config)
    built = optimizers(model, AdamWConfig(learning_rate=rate, weight_decay=0.1))
    price = flops_per_token(config, length, causal=True) * batch * length
    steps = math.ceil(budget / price)
    due = {math.ceil(share * budget / price): share for share in shares}
    marks = {}
    feed = stream(feed_of(job, sources), StepShare(batch, job.train.micro_batch), range(steps), 0)
    for done, data in enumerate(feed, 1):
        for micro in data.micro:
            (model(micro.tokens, micro.targets).sum() / data.targets).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in built:
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, done / 20)
            optimizer.step()
            optimizer.zero_grad()
        if done in due:
            marks[due[done]] = _score(model, dataset, length, windows)
    twice = dict(sequence_length=2 * length, windows=windows)
    edges = [0, *(2**n for n in range(3, 40) if 2**n < 2 * length), 2 * length]
    positions = loss_by_position(model.eval(), dataset, "validation", edges=edges, **twice)
    return Learning(rate, steps * batch * length, steps * price, marks, positions)


def _score(model: Transformer, dataset: Dataset, length: int, windows: int) -> float:
    args = dict(sequence_length=length, edges=[0, length], windows=windows)
    (bucket,) = loss_by_position(model.eval(), dataset, "validation", **args)
    model.train()
    return bucket.loss


def crossings(xs: Sequence[float], a: Sequence[float], b: Sequence[float]) -> Iterator[float]:
    """Yield where the two curves through these points cross, on logarithmic axes."""
    gaps = [math.log(x / y) for x, y in zip(a, b, strict=True)]
    for (x, gap), (later, other) in pairwise(zip(xs, gaps, strict=True)):
        if gap * other < 0:
            yield x * (later / x) ** (gap / (gap - other))
