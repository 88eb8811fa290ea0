"""Gradients of bf16 weights, added up in fp32, on real ranks of real DeepSpeed."""

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from forescale.checkpoint.reader import Checkpoint
from tests.distributed import ranks, small

pytestmark = pytest.mark.distributed

# Muon's other parameters are AdamW's, and all other optimizers take gradients in the same form.
IN_FP32 = [[stage, "muon", "bf16", False, "fp32"] for stage in range(4)]
IN_FP32 += [[stage, "muon", "bf16", True, "fp32"] for stage in (1, 2, 3)]
IN_BF16 = [[stage, "muon", "bf16", False, None] for stage in range(4)]


def test_the_sum_of_64_micro_batches_is_that_of_plain_pytorch_in_fp32():
    results = ranks.run("test_gradients:errors", 2, cases=IN_FP32 + IN_BF16)
    for case, (error, norm, right) in zip(IN_FP32 + IN_BF16, results, strict=True):
        if case in IN_FP32:
            assert error < 1e-6, case
            assert norm == pytest.approx(right, rel=1e-6), case
        else:
            assert error > 1e-3, case


def test_reducing_beside_the_backward_pass_changes_no_bit():
    kinds = [[stage, gradients] for stage in (1, 2, 3) for gradients in (None, "fp32")]
    cases = [[*kind, beside] for kind in kinds for beside in (False, True)]
    results = ranks.run("test_gradients:losses", 2, cases=cases)
    for kind, apart, beside in zip(kinds, results[::2], results[1::2], strict=True):
        assert beside == apart, kind
    assert results[2] != results[0], "the numbers of fp32 gradients are others"


def test_a_parameter_that_a_step_does_not_use_has_no_gradient():
    cases = [[stage, offload] for stage in range(4) for offload in (False, True)[: 1 + (stage > 0)]]
    plain, *others = ranks.run("test_gradients:unused", 2, cases=cases)
    for case, rows in zip(cases[1:], others, strict=True):
        assert rows == pytest.approx(plain, rel=1e-5), case


def test_a_run_resumes_to_the_bit_and_a_dropped_gradient_leaves_no_trace(tmp_path):
    results = ranks.run("test_gradients:resumed", 2, cases=IN_FP32, folder=str(tmp_path))
    for case, (whole, again) in zip(IN_FP32, results, strict=True):
        assert again == whole, case
        held = Checkpoint(tmp_path / f"{case[0]}-{case[3]}" / "checkpoints/step-00000002")
        momentum = held.tensor("up.weight", "momentum_buffer")
        assert not torch.equal(momentum, momentum.bfloat16().float()), case  # it isn't rounded


# Inside the ranks.


def unused(cases):
    """For each [stage, offload], the norms of steps of which the first alone uses a parameter."""

    class Changing(small.Model):
        def __init__(self):
            super().__init__()
            self.extra, self.calls = nn.Parameter(torch.ones(64, small.WIDTH)), 0

        def forward(self, tokens, targets):
            losses = super().forward(tokens, targets)
            self.calls += 1
            return losses + self.extra.mean() if self.calls <= 2 else losses  # micro-batches

    original, small.Model = small.Model, Changing
    engines = (small.build(stage, "adamw", "fp32", offload=offload) for stage, offload in cases)
    norms = [[norm for _, norm in small.train(engine, range(3))] for engine in engines]
    small.Model = original
    return norms


MICRO_BATCHES = 64  # of each rank


class Model(small.Model):
    """No weight is used twice, so that a backward pass adds up nothing itself; one isn't used."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(small.WIDTH, small.VOCABULARY, bias=False)
        self.unused = nn.Parameter(torch.ones(5))


def errors(cases):
    """For each [stage, optimizer, precision, offload, gradients]: how far the gradient of a step is
    from a sum in fp32; and its norm, by `measure` and by that sum."""
    from deepspeed.runtime.zero.muon import original_muon

    from forescale.engine import stages

    with pytest.MonkeyPatch.context() as patched:
        # Muon's gradients as they came.
        patched.setattr(original_muon, "muon_update", lambda grad, *args, **kwargs: grad)
        patched.setattr(stages, "update_parts", lambda *args: None)  # at stage 3
        patched.setattr(small, "Model", Model)
        return [_error(*case) for case in cases]


def _error(stage, optimizer, precision, offload, gradients):
    engine = small.build(stage, optimizer, precision, offload=offload, gradients=gradients)
    world = engine.world
    batch = small.batch(0, world.rank, world.size, MICRO_BATCHES * world.size)
    expected = _summed(batch, world)
    engine.backward(batch)
    _, norm = engine.measure(torch.zeros(1), 1)
    wrong = right = 0.0
    for name, start, values in _of_update(engine):
        values_expected = expected[name][start : start + values.numel()]
        wrong += (values - values_expected).square().sum().item()
        right += values_expected.square().sum().item()
    times = world.size if engine.layout.replicated else 1
    wrong, right = (world.sum(torch.tensor([wrong, right]).double()) / times).tolist()
    return [math.sqrt(wrong / right), norm, math.sqrt(right)]


def _summed(batch, world):
    """The gradients of single micro-batches in bf16, added up in fp32 by plain PyTorch, by name."""
    torch.manual_seed(0)
    model = Model().to(torch.bfloat16)
    sums = {n: torch.zeros(p.numel()) for n, p in model.named_parameters()}
    for micro in batch.micro:
        model.zero_grad()
        (model(micro.tokens, micro.targets).sum() * (world.size / batch.targets)).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                sums[name] += p.grad.flatten().float()
    every = world.sum(torch.cat([*sums.values()]).double()) / world.size
    parts = every.float().split([t.numel() for t in sums.values()])
    return dict(zip(sums, parts, strict=True))


def _of_update(engine):
    """(parameter, start, values) of each piece of the gradient that this rank's optimizer takes."""
    base, gradients = engine.layout.base, []

    def noted(*args, **kwargs):
        mine = {id(p) for group in base.param_groups for p in group["params"]}
        for unit in engine.layout.units():
            if id(unit.master) in mine:
                flat = unit.master.grad.flatten().clone()
                gradients.extend(
                    (engine.names[p.param], p.start, flat[p.at : p.at + p.size])
                    for p in unit.pieces
                )

    base.step = noted
    engine.apply(0.0)
    return gradients


def losses(cases):
    """For each [stage, gradients, beside]: the losses and norms of four steps with Muon, with a
    dropped gradient in between; beside: reduced during the backward pass."""
    results = []
    for stage, gradients, beside in cases:
        engine = small.build(stage, "muon", "bf16", gradients=gradients, overlap_comm=beside)
        rows = small.train(engine, range(2))
        engine.backward(small.batch(20, engine.world.rank, engine.world.size))
        engine.drop()
        results.append(rows + small.train(engine, range(2, 4)))
    return results


def resumed(cases, folder):
    """For each case, the losses of two steps of a run; and of one that has trained on other
    weights, loads that run's checkpoint, and drops a gradient before each step."""
    from forescale.checkpoint import writer
    from forescale.checkpoint.reader import Checkpoint, Position
    from forescale.run.directory import Run

    results = []
    for stage, optimizer, precision, offload, gradients in cases:
        keys = {"offload": offload, "gradients": gradients}
        engine = small.build(stage, optimizer, precision, seed=1, **keys)
        small.train(engine, range(2))
        directory = Path(folder) / f"{stage}-{offload}"
        run = Run(directory)
        writer.write(run, 1, writer.Snapshot.of(engine, Position(2, 16, 0), {}), engine.world)
        whole = small.train(engine, range(2, 4))
        engine = small.build(stage, optimizer, precision, seed=2, **keys)
        small.train(engine, range(10, 11))
        writer.load(Checkpoint(directory / "checkpoints/step-00000002"), engine)
        again = []
        for step in (2, 3):
            engine.backward(small.batch(20, engine.world.rank, engine.world.size))
            engine.drop()
            again += small.train(engine, range(step, step + 1))
        results.append([whole, again])
    return results
