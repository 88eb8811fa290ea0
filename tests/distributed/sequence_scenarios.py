"""What runs inside the ranks of test_sequence.py: one model over ranks that divide its columns."""

import os

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.jobs import SMALL, TRAIN, batch, build_job, compose_job, zero
from tests.models.checks import kept_bytes, objective

MODEL = ["model.width=32", "model.num_layers=2", "model.num_heads=4", "model.mlp_width=41"]


def job_of(case, world, near):
    """case: [stage, more overrides]; near: the ranks that divide a row."""
    stage, *overrides = case
    words = [*MODEL, *TRAIN, f"engine=zero{stage}", f"engine.sequence_parallel={near}"]
    words += [zero(SMALL), "precision=fp32", "optimizer=adamw"]
    return compose_job([*words, *(word for word in overrides if word != "documents")], world)


def build(case, near):
    return build_job(job_of(case, int(os.environ["WORLD_SIZE"]), near))


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
    from forescale.engine.selfcheck import SelfCheck

    faults = []
    for case in cases:
        engine = build(case, near)
        check, step_faults = SelfCheck(engine, "here", exact=True), []

        def look(batch, losses, check=check, step_faults=step_faults):
            step_faults.append(check(batch, losses))

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
