"""What runs inside the ranks of test_step.py."""

from tests.distributed import small


def losses(cases, steps):
    """For each [stage, optimizer, precision, clip, offload]: [loss, norm] of every step, while
    weight decay falls to 0 and the batch grows; and the gradient norm of each layer at the first
    step."""
    _newton_schulz_in_fp32()
    results = []
    for case in cases:
        engine, norms = small.build(*case), {}
        engine.norms_at = lambda step: step == 1
        engine.train_step = _recorded(engine.train_step, norms)
        over = {"micro_batches": small.grown, "decay": lambda step: 1 - step / steps}
        results.append([small.train(engine, range(steps), **over), norms])
    return results


def _recorded(train_step, norms):
    def recorded(*arguments, **named):
        facts = train_step(*arguments, **named)
        norms.update(facts.layer_norms)
        return facts

    return recorded


def dropped(cases):
    """For each case, the losses of six steps: plain, and with backwards that are dropped."""
    results = []
    for stage, optimizer, precision, clip, offload in cases:
        plain = small.train(small.build(stage, optimizer, precision, clip, offload), range(6))
        engine = small.build(stage, optimizer, precision, clip, offload)
        rows = []
        for step in range(6):
            for broken in (100, 101):
                losses = engine.backward(
                    small.batch(broken + step, engine.world.rank, engine.world.size)
                )
                engine.measure(losses, 1)
                engine.drop()
            rows += small.train(engine, range(step, step + 1))
        results.append([plain, rows])
    return results


def not_finite(cases):
    """For each case, [losses before, facts of a broken step, losses after] and the same without."""
    results = []
    for stage, optimizer, precision in cases:
        engine = small.build(stage, optimizer, precision)
        before = small.train(engine, range(2))
        broken = small.batch(50, engine.world.rank, engine.world.size)
        handle = engine.module.norm.register_forward_hook(lambda *a: a[2] * float("nan"))
        facts = engine.train_step(broken, 1.0)
        handle.remove()
        after = small.train(engine, range(2, 4))
        plain = small.train(small.build(stage, optimizer, precision), range(4))
        results.append([before + after, plain, facts.applied])
    return results


def extra():
    """What a model's own numbers become on every rank, and the error if their names differ."""
    import torch

    from forescale.ground.errors import UserError

    class Model(small.Model):
        def forward(self, tokens, targets):
            losses = super().forward(tokens, targets)
            self.largest = losses.max()
            return losses

        def metrics(self):
            return {"rank": engine.world.rank, "largest": self.largest}

    plain, small.Model = small.Model, Model
    engine = small.build(1, "adamw", "fp32")
    small.Model, world = plain, engine.world
    facts = engine.train_step(small.batch(0, world.rank, world.size), 1.0)
    world.share(1, facts.losses, 2 * world.rank, 4, 7, False, extra=facts.extra)
    (summary,) = world.summaries(0)
    largest = world.gather(float(facts.extra["largest"]))
    world._extra = None
    mine = {f"of rank {world.rank}": torch.tensor(1.0)}
    world.share(2, facts.losses, 2 * world.rank, 4, 7, False, extra=mine)
    try:
        list(world.summaries(0))
    except UserError as e:
        return [summary.extra, largest, str(e)]


def waves(wholes):
    """Three steps of Muon at stage 3, with so many bytes of whole matrices at once."""
    from forescale.engine import optim

    results = []
    for optim.WHOLE in wholes:
        results.append(small.train(small.build(3, "muon", "bf16", 1.0), range(3)))
    return results


def _newton_schulz_in_fp32():
    """DeepSpeed iterates in fp16 or bf16, which turns the last bits of a gradient into 1e-4 of a
    loss; in fp32 what remains is the algorithm, which must agree."""
    import torch
    from deepspeed.runtime.zero.muon import original_muon

    original_muon.ns_compute_dtype = lambda method="gram": torch.float32
