"""What runs inside the ranks of test_experts.py and test_moe.py."""

import os

import torch

from forescale.engine.compilation import compile_parts
from tests.distributed.jobs import SMALL, TRAIN, batch, build_job, compose_job, steps_of, zero
from tests.distributed.step_scenarios import _newton_schulz_in_fp32

# So many experts that some have no token on a rank, and odd sizes, so that borders cut matrices.
MODEL = ["model.width=24", "model.num_layers=2", "model.num_heads=4", "model.mlp=moe"]
MODEL += ["model.mlp.experts=8", "model.mlp.expert_width=14", "model.mlp.shared=1"]
MODEL += ["model.mlp.scores=sigmoid", "model.mlp.bias_speed=0.01", "model.mlp.balance_loss=0.1"]


def job_of(case, world):
    """case: [stage, optimizer, ranks that divide the experts, more overrides]."""
    stage, optimizer, parallel, *overrides = case
    words = [*MODEL, *TRAIN, f"engine=zero{stage}", zero(SMALL), "precision=fp32"]
    words += [f"engine.expert_parallel={parallel}", f"optimizer={optimizer}"]
    if optimizer == "muon":
        # At the default of so narrow a model, rounding moves weights by more than is compared.
        words.append("optimizer.adam_learning_rate=0.004")
    return compose_job([*words, *overrides], world)


def build(case, seed=0):
    return build_job(job_of(case, int(os.environ["WORLD_SIZE"])), seed)


def fed(world, step):
    """What a rank is fed in a step."""
    return batch(step, world.data.rank, world.data.size)


def compiled(cases, backend):
    """For each case: loss and norm of two steps, not compiled and with compiled parts."""
    import torch._dynamo.config as dynamo

    dynamo.disable = False
    results = []
    for case in cases:
        rows = []
        for is_compiled in (False, True):
            engine = build(case)
            if is_compiled:
                assert compile_parts(engine.module, backend)
            for step in range(2):
                data = fed(engine.world, step)
                facts = engine.train_step(data, 1.0)
                losses = engine.world.sum(facts.losses.sum().double()).item()
                rows.append([losses / data.targets, facts.grad_norm])
            rows[-1] += engine.losses(data.micro[0]).tolist()
        results.append(rows)
    return results


def whole(engine):
    """Every parameter's state, put together from the fragments of all ranks, by name and state:
    element by element, so that one that is held twice or not at all shows."""
    from forescale.engine.portable.strips import strip_of
    from forescale.engine.state import owned_fragments

    rows = [[f.row, f.shape, f.data.tolist()] for f in owned_fragments(engine)]
    weights, held = {}, {}
    for (name, state, *place), shape, values in (
        r for part in engine.world.gather(rows) for r in part
    ):
        strip = strip_of(place)
        key, numel = f"{name}|{state}", int(torch.tensor(shape).prod())
        weights.setdefault(key, torch.zeros(numel, dtype=torch.float64))
        held.setdefault(key, torch.zeros(numel, dtype=torch.int64))
        values = torch.tensor(values, dtype=torch.float64)
        for first, at, size in strip.overlaps(0, numel):
            weights[key][first : first + size] = values[at : at + size]
            held[key][first : first + size] += 1
    assert all(bool((times == 1).all()) for times in held.values())
    return {key: values.tolist() for key, values in weights.items()}


def trained(cases, steps):
    """For each case: the state before the first step, after it and at the end; of each step loss,
    norm, metrics and experts' load; held-out losses; the biases of every rank."""
    _newton_schulz_in_fp32()
    return [_trained(case, steps) for case in cases]


def _trained(case, steps):
    engine, rows = build(case), []
    world = engine.world
    states = [whole(engine)]
    for step in range(steps):
        data = fed(world, step)
        if step == 1:  # a dropped step changes nothing
            engine.train_step(data, 1.0, may_apply=lambda loss, norm: False)
        facts = engine.train_step(data, 1.0)
        every = [x for part in world.gather(facts.losses.tolist()) for x in part]
        numbers = {name: float(value) for name, value in facts.extra.items()}
        load = engine.module.tallies.total("experts").tolist()
        rows.append([sum(every) / data.targets, facts.grad_norm, numbers, load])
        if step in (0, steps - 1):
            states.append(whole(engine))
    held_out = [engine.losses(micro).tolist() for micro in fed(world, 99).micro]
    held_out = [x for part in world.data.gather(held_out) for x in part]
    biases = world.gather([block.mlp.bias_steps.tolist() for block in engine.module.blocks])
    return {"states": states, "rows": rows, "held_out": held_out, "biases": biases}


def checked(cases):
    """For each case: what the self-check says in two steps, and after one bit of a weight of the
    last rank's own experts has flipped."""
    from forescale.engine.selfcheck import SelfCheck

    results = []
    for case in cases:
        engine, faults = build(case), []
        check = SelfCheck(engine, "here", exact=True)

        def before_update(data, losses, engine=engine, faults=faults, check=check):
            if data.step == 2 and engine.world.rank == engine.world.size - 1:
                weight = engine.module.blocks[0].mlp.up.weight.detach()
                weight.view(-1).view(torch.int32)[5] ^= 1
            faults.append(check(data, losses))

        for step in range(3):
            data = fed(engine.world, step)
            engine.train_step(data, 1.0, before_update=before_update)
        results.append(faults)
    return results


def saved(cases, folder):
    """Train each case three steps and save; then two steps more. Returns those losses and norms."""
    return [_saved(case, folder) for case in cases]


def _saved(case, folder):
    from pathlib import Path

    from forescale.checkpoint import writer
    from forescale.checkpoint.reader import Position
    from forescale.run.directory import Run

    engine = build(case, seed=1)
    steps_of(engine, range(3))
    run = Run(Path(folder) / f"{case[0]}-{case[1]}-{case[2]}-w{engine.world.size}")
    writer.write(run, 1, writer.Snapshot.of(engine, Position(3, 24, 0), {}), engine.world)
    return steps_of(engine, range(3, 5))


def loaded(cases, folder):
    """For each of the checkpoints, loaded into an engine that has trained on other weights: its
    state, and two steps. cases: [case, the names of the sources]."""
    return [_loaded(case, sources, folder) for case, sources in cases]


def _loaded(case, sources, folder):
    from pathlib import Path

    from forescale.checkpoint import writer
    from forescale.checkpoint.reader import Checkpoint

    engine, losses = build(case, seed=2), []
    for source in sources:
        steps_of(engine, range(10, 12))
        writer.load(Checkpoint(Path(folder) / source / "checkpoints/step-00000003"), engine)
        losses.append([whole(engine), steps_of(engine, range(3, 5))])
    return losses
