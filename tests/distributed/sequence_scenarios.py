"""What runs inside the ranks of test_sequence.py: one model over ranks that divide its columns."""

import os
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from forescale.data.stream import MicroBatch
from tests.models.checks import kept_bytes, objective

VOCABULARY, LENGTH, MICRO_BATCHES = 71, 16, 4  # of a step, over all ranks
MODEL = ["model.width=32", "model.num_layers=2", "model.num_heads=4", "model.mlp_width=41"]
TRAIN = ["train.steps=9", "schedule.warmup=0", "schedule.decay=1", "train.micro_batch=2"]
SMALL = "engine.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 50}}"


def job_of(case, world, near):
    """case: [stage, more overrides]; near: the ranks that divide a row."""
    from forescale.config.compose import compose
    from forescale.config.train import TrainJob

    stage, *overrides = case
    words = [
        *MODEL,
        *TRAIN,
        f"train.sequence_length={LENGTH}",
        f"train.global_batch={2 * MICRO_BATCHES}",
        f"engine=zero{stage}",
        f"engine.sequence_parallel={near}",
        SMALL,
        "precision=fp32",
        "optimizer=adamw",
        *(word for word in overrides if word != "documents"),
    ]
    job = compose(TrainJob, [*words, f"launch.processes={world}"])
    return replace(job, model=job.model.resolved(VOCABULARY, LENGTH))


def batch(step, rank, size, documents=False):
    """The part of a step of a data rank among `size`: the same windows at any size."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (MICRO_BATCHES, 2, LENGTH + 1)
    data = torch.randint(0, VOCABULARY, shape, generator=generator)
    tokens, targets = data[..., :-1].contiguous(), data[..., 1:].clone()
    targets[0, 0, -7:] = -100  # padding, which one half of the columns has alone
    begins = torch.rand(tokens.shape, generator=generator) < 0.2
    numbers = begins.cumsum(-1).int() if documents else [None] * MICRO_BATCHES
    part = MICRO_BATCHES // size
    mine = range(rank * part, (rank + 1) * part)
    micro = [MicroBatch(i, tokens[i], targets[i], numbers[i]) for i in mine]
    return SimpleNamespace(step=step, targets=int((targets != -100).sum()), micro=micro)


def build(case, near):
    from accelerate.state import AcceleratorState

    from forescale.engine.build import build_engine, partition_of
    from forescale.engine.deepspeed_config import deepspeed_config
    from forescale.engine.world import join
    from forescale.models import Transformer

    AcceleratorState._reset_state()  # several engines follow each other in one process
    size = int(os.environ["WORLD_SIZE"])
    job = job_of(case, size, near)
    world = join(deepspeed_config(job, size), size, 60, job.mesh(size))
    torch.manual_seed(0)
    divide = partition_of(job, world)
    model = Transformer(job.model, divide)
    return build_engine(world, divide(model) if divide else model, job)


def trained(cases, near, steps, documents=False, compiled=False):
    """For each case: every step's loss and norm, then the held-out losses of each window."""
    return [_trained(build(case, near), steps, documents, compiled) for case in cases]


def _trained(engine, steps, documents, compiled):
    world, rows = engine.world, []
    if compiled:
        compile_blocks(engine.module)
    for step in range(steps):
        data = batch(step, world.data.rank, world.data.size, documents)
        facts = engine.train_step(data, 1.0)
        nats = world.sum(facts.losses.double().sum())
        rows.append([float(nats) / data.targets, facts.grad_norm])
    held_out = batch(99, world.data.rank, world.data.size, documents)
    results = [engine.losses(micro).tolist() for micro in held_out.micro]
    return rows, [losses for part in world.data.gather(results) for losses in part]


def gradients(cases, near):
    """For each case at stage 0, the gradient of each parameter, by name."""
    results = []
    for case in cases:
        engine = build(case, near)
        engine.backward(batch(0, engine.world.data.rank, engine.world.data.size, True))
        results.append({name: p.grad.tolist() for p, name in engine.names.items()})
    return results


def checked(cases, near):
    """For each case, the fault that the self-check finds in two healthy steps."""
    from forescale.engine.selfcheck import SelfCheck, fault_of

    faults = []
    for case in cases:
        engine = build(case, near)
        check, step_faults = SelfCheck(engine, "here", exact=True), []

        def look(batch, losses, check=check, step_faults=step_faults):
            step_faults.append(fault_of(check(batch, losses)))

        for step in range(2):
            data = batch(step, engine.world.data.rank, engine.world.data.size)
            engine.train_step(data, 1.0, before_update=look)
        faults.append(step_faults)
    return faults


def costs(cases, near):
    """For each case, the bytes that autograd keeps after a forward pass on rank 0, and those that a
    rank gives to the exchanges of one step, with their number."""
    return [_costs(build(case, near), "documents" in case) for case in cases]


def _costs(engine, documents):
    data = batch(0, engine.world.data.rank, engine.world.data.size, documents)
    positional, named = data.micro[0].arguments(engine.world.device)
    bytes_kept = kept_bytes(engine.module, lambda: objective(engine.module(*positional, **named)))
    with Sent() as sent:
        engine.train_step(data, 1.0)
    return bytes_kept, sent.bytes, sent.calls


class Sent(TorchDispatchMode):
    """Counts what goes into the collectives inside of a model."""

    bytes = calls = 0
    kinds = ("all_to_all_single", "all_reduce")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        counted = [getattr(torch.ops._c10d_functional, kind).default for kind in self.kinds]
        # The counts of experts are a few integers.
        if func in counted and args[0].is_floating_point():
            self.calls += 1
            self.bytes += args[0].numel() * args[0].element_size()
        return func(*args, **(kwargs or {}))


def compile_blocks(model):
    """Trace each block as one graph, which runs without a compiler of C++."""
    import torch._dynamo.config as dynamo

    dynamo.disable = False
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
