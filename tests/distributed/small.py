"""A small model, its data, and an engine on it, for the tests on real ranks.

The model has what makes states hard to carry: tied embeddings, a matrix cut by partition borders
(odd sizes), a frozen parameter, a buffer, and three parameter groups.
"""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from forescale.config.mesh import Mesh
from forescale.config.sections.optimizer import OPTIMIZERS, OptimizerConfig
from forescale.data.stream import MicroBatch

VOCABULARY, WIDTH, LENGTH = 101, 24, 16


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 67)
        self.down = nn.Linear(67, WIDTH, bias=False)
        self.frozen = nn.Parameter(torch.linspace(0.5, 1.5, WIDTH), requires_grad=False)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("offset", torch.linspace(-0.1, 0.1, WIDTH))

    def forward(self, tokens, targets):
        x = self.embedding(tokens) + self.position
        x = x.cumsum(1) / torch.arange(1, LENGTH + 1, device=x.device, dtype=x.dtype)[:, None]
        h = self.norm(x) * self.frozen + self.offset.to(x.dtype)
        x = x + self.down(functional.relu(self.up(h)).square())
        logits = self.head(x).float()
        losses = functional.cross_entropy(
            logits.transpose(1, 2), targets, ignore_index=-100, reduction="none"
        )
        return losses.sum(1)


@dataclass
class Batch:
    step: int
    targets: int
    micro: list[MicroBatch] = field(default_factory=list)
    micro_batches: int = 4  # of the step


def batch(step: int, rank: int, size: int, micro_batches: int = 4) -> Batch:
    """This rank's part of a step of `micro_batches` x 2 windows, the same windows at any size."""
    generator = torch.Generator().manual_seed(1000 + step)
    data = torch.randint(0, VOCABULARY, (micro_batches, 2, LENGTH + 1), generator=generator)
    tokens, targets = data[..., :-1].contiguous(), data[..., 1:].clone()
    targets[0, 0, -3:] = -100  # a shard's last window is padded
    mine = range(micro_batches * rank // size, micro_batches * (rank + 1) // size)
    count = int((targets != -100).sum())
    micro = [MicroBatch(i, tokens[i], targets[i]) for i in mine]
    return Batch(step, count, micro, micro_batches)


def groups(model: nn.Module, optimizer: str) -> list[dict]:
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    is_muon = optimizer.startswith("muon")
    muon = [p for n, p in named if is_muon and n in ("up.weight", "down.weight")]
    rest = [p for _, p in named if all(p is not m for m in muon)]
    parts = [("muon", muon, True, 0.1, 0.02)]
    parts += [("decay", [p for p in rest if p.ndim > 1], False, 0.1, 3e-3)]
    parts += [("no_decay", [p for p in rest if p.ndim < 2], False, 0.0, 3e-3)]
    return [
        {"name": n, "params": p, "use_muon": m, "weight_decay": d, "peak_learning_rate": r}
        for n, p, m, d, r in parts
        if p
    ]


SETTINGS = {"betas": (0.9, 0.95), "eps": 1e-8, "momentum": 0.95}  # of a plain loop


def settings(optimizer: str) -> OptimizerConfig:
    """The same, as a config; a second word, cautious, is of its decay."""
    optimizer, _, word = optimizer.partition(" ")
    muon = {"adam_learning_rate": 3e-3} if optimizer == "muon" else {}
    cls: type[Any] = OPTIMIZERS[optimizer]
    config: OptimizerConfig = cls(
        learning_rate=3e-4, beta1=0.9, beta2=0.95, cautious_decay=bool(word), **muon
    )
    return config


def job(
    stage: int,
    optimizer: str,
    precision: str,
    offload: bool = False,
    gradients: str | None = None,
    **zero,
) -> SimpleNamespace:
    """The part of a training job that the engine reads."""
    zero |= {"stage3_param_persistence_threshold": 50} if stage == 3 else {}
    engine = {"stage": stage, "offload_optimizer": offload, "offload_parameters": False}
    engine |= {
        "bucket_bytes": 4096,
        "hierarchical_partition": 1,
        "quantized_weights": False,
        "deepspeed": {"zero_optimization": zero},
    }
    added = gradients or precision
    return SimpleNamespace(
        model=None,  # a class that is not ours
        train=SimpleNamespace(micro_batch=2, compile="off"),
        engine=SimpleNamespace(**engine),
        precision=SimpleNamespace(kind=precision),
        optimizer=settings(optimizer),
        on_gpu=False,
        gradient_dtype=lambda world_size: added,
        adds_in_fp32=lambda world_size: added != precision,
        mesh=Mesh,
    )


def build(
    stage: int,
    optimizer: str,
    precision: str,
    clip=None,
    offload=False,
    seed=0,
    gradients=None,
    invariant=False,
    **zero,
):
    """An engine over all ranks of this process's environment."""
    import os

    from accelerate.state import AcceleratorState

    from forescale.engine.deepspeed_config import deepspeed_config
    from forescale.engine.optim import build_optimizer
    from forescale.engine.step import Engine
    from forescale.engine.world import join

    AcceleratorState._reset_state()  # several engines follow each other in one process
    size = int(os.environ["WORLD_SIZE"])
    mine = job(stage, optimizer, precision, offload, gradients, **zero)
    world = join(deepspeed_config(mine, size), size, 60)
    torch.manual_seed(seed)
    model = Model()
    base = build_optimizer(settings(optimizer), groups(model, optimizer))
    fp32 = mine.adds_in_fp32(size)
    return Engine(world, model, base, seed=7, clip=clip, fp32_gradients=fp32, invariant=invariant)


def grown(step: int) -> int:
    """The micro-batches of a step whose batch grows: 2, then 4, then 8."""
    return 2 << min(2, step // 6)


def train(
    engine, steps, micro_batches=lambda step: 4, multiplier=1.0, decay=lambda step: 1.0
) -> list[float]:
    """Mean losses over all ranks' micro-batches, added in global order, and the norms. decay: of
    the weight decay, by step."""
    world, losses = engine.world, []
    for step in steps:
        data = batch(step, world.rank, world.size, micro_batches(step))
        facts = engine.train_step(data, multiplier, decay=decay(step))
        every = [x for part in world.gather(facts.losses.tolist()) for x in part]
        losses.append([sum(every) / data.targets, facts.grad_norm])
    return losses
