"""What runs inside the ranks of test_moe.py."""

import os
from types import SimpleNamespace

import torch

from forescale.data.stream import MicroBatch
from tests.distributed.step_scenarios import _newton_schulz_in_fp32

VOCABULARY, LENGTH, MICRO_BATCHES = 71, 16, 4  # of a step, over all ranks
# So many experts that some have no token on a rank, and odd sizes, so that borders cut matrices.
MODEL = ["model.width=24", "model.num_layers=2", "model.num_heads=3", "model.mlp=moe"]
MODEL += ["model.mlp.experts=24", "model.mlp.expert_width=13", "model.mlp.shared=1"]
MODEL += ["model.mlp.scores=sigmoid", "model.mlp.bias_speed=0.01", "model.mlp.balance_loss=0.1"]
TRAIN = ["train.steps=9", "schedule.warmup=0", "schedule.decay=1", "train.micro_batch=2"]


def job_of(stage, optimizer, world):
    from dataclasses import replace

    from forescale.config.compose import compose
    from forescale.config.train import TrainJob

    words = [
        *MODEL,
        *TRAIN,
        f"train.sequence_length={LENGTH}",
        f"train.global_batch={2 * MICRO_BATCHES}",
        f"engine=zero{stage}",
        "engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 50}}",
        "precision=fp32",
        f"optimizer={optimizer}",
    ]
    job = compose(TrainJob, [*words, f"launch.processes={world}"])
    return replace(job, model=job.model.resolved(VOCABULARY, LENGTH))


def batch(step, rank, size):
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (MICRO_BATCHES, 2, LENGTH + 1)
    data = torch.randint(0, VOCABULARY, shape, generator=generator)
    tokens, targets = data[..., :-1].contiguous(), data[..., 1:].clone()
    targets[0, 0, -7:] = -100  # padding
    part = MICRO_BATCHES // size
    mine = range(rank * part, (rank + 1) * part)
    micro = [MicroBatch(i, tokens[i], targets[i]) for i in mine]
    return SimpleNamespace(step=step, targets=int((targets != -100).sum()), micro=micro)


def trained(cases, steps):
    """For each [stage, optimizer]: every step's loss, norm, metrics, and load of the experts, and
    the biases at the end, of every rank."""
    from accelerate.state import AcceleratorState

    from forescale.engine.build import build_engine
    from forescale.engine.deepspeed_config import deepspeed_config
    from forescale.engine.world import join
    from forescale.models import Transformer

    _newton_schulz_in_fp32()
    size, results = int(os.environ["WORLD_SIZE"]), []
    for stage, optimizer in cases:
        AcceleratorState._reset_state()  # several engines follow each other in one process
        job, rows = job_of(stage, optimizer, size), []
        world = join(deepspeed_config(job, size), size, 60)
        torch.manual_seed(0)
        engine = build_engine(world, Transformer(job.model), job)
        for step in range(steps):
            data = batch(step, world.rank, size)
            if step == 3:  # a dropped step moves no bias
                engine.train_step(data, 1.0, may_apply=lambda loss, norm: False)
            facts = engine.train_step(data, 1.0)
            every = [x for part in world.gather(facts.losses.tolist()) for x in part]
            numbers = {name: float(value) for name, value in facts.extra.items()}
            load = engine.module.tallies.total("experts").tolist()
            rows.append([sum(every) / data.targets, facts.grad_norm, numbers, load])
        biases = [block.mlp.bias_steps.tolist() for block in engine.module.blocks]
        results.append([rows, world.gather(biases)])
    return results
