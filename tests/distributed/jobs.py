"""Jobs of our own models, the same inside of the ranks and outside; data and engines of them."""

import os
from dataclasses import replace
from types import SimpleNamespace

from forescale.config.train import TrainJob

VOCABULARY, LENGTH, MICRO_BATCHES = 71, 16, 4  # micro-batches of 2 windows, over all ranks
TRAIN = ["train.steps=9", "schedule.warmup=0", "schedule.decay=1", "train.micro_batch=2"]
TRAIN += [f"train.sequence_length={LENGTH}", f"train.global_batch={2 * MICRO_BATCHES}"]


def zero(*settings):
    return f"engine.deepspeed={{zero_optimization: {{{', '.join(settings)}}}}}"


SMALL = "stage3_param_persistence_threshold: 50"  # so that stage 3 divides small parameters too


def compose_job(words, world):
    from forescale.config.compose import compose

    job = compose(TrainJob, [*words, f"launch.processes={world}"])
    return replace(job, model=job.model.resolved(VOCABULARY, LENGTH))


def batch(step, rank, size, documents=False):
    """The part of a step of a data rank among `size`: the same windows at any size."""
    import torch

    from forescale.data.stream import MicroBatch

    generator = torch.Generator().manual_seed(1000 + step)
    shape = (MICRO_BATCHES, 2, LENGTH + 1)
    data = torch.randint(0, VOCABULARY, shape, generator=generator)
    tokens, targets = data[..., :-1].contiguous(), data[..., 1:].clone()
    targets[0, 0, -7:] = -100  # padding, which one half of the columns has alone
    begins = torch.rand(tokens.shape, generator=generator) < 0.2
    numbers = begins.cumsum(-1).int() if documents else [None] * MICRO_BATCHES
    micro = [
        MicroBatch(i, tokens[i], targets[i], numbers[i])
        for i in range(MICRO_BATCHES * rank // size, MICRO_BATCHES * (rank + 1) // size)
    ]
    count = int((targets != -100).sum())
    return SimpleNamespace(step=step, targets=count, micro=micro, micro_batches=MICRO_BATCHES)


def build_job(job, seed=0, divides=True):
    """The engine of a job over all ranks of this process's environment. divides: the model is
    divided among the ranks while it is built, as in training; else it is whole at first."""
    import torch
    from accelerate.state import AcceleratorState

    from forescale.engine.build import build_engine, partition_of, stage_of
    from forescale.engine.deepspeed_config import deepspeed_config
    from forescale.engine.world import join
    from forescale.models import Transformer
    from forescale.train.model import adapting, freeze

    AcceleratorState._reset_state()  # several engines follow each other in one process
    size = int(os.environ["WORLD_SIZE"])
    world = join(deepspeed_config(job, size), size, 60, job.mesh(size))
    torch.manual_seed(seed)
    divide = adapting(job, partition_of(job, world) if divides else None)
    model = Transformer(job.model, divide, stage_of(job, world))
    model = divide(model) if divide and divides else model
    freeze(job, model)
    return build_engine(world, model, job)


def steps_of(engine, steps):
    """Make these steps; return the loss and the norm of each."""
    world, rows = engine.world, []
    engine.norms_at = lambda step: True
    for step in steps:
        data = batch(step, world.data.rank, world.data.size)
        facts = engine.train_step(data, 1.0)
        together = sum(norm**2 for norm in facts.layer_norms.values()) ** 0.5
        assert abs(together / facts.grad_norm - 1) < 1e-4, facts
        nats = world.sum(facts.losses.double().sum())
        rows.append([float(nats) / data.targets, facts.grad_norm])
    return rows
