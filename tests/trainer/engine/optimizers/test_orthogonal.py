"""Muon's updates against DeepSpeed's own, one by one; and what we know about DeepSpeed."""

from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from forescale.engine.optimizers import orthogonal
from forescale.engine.optimizers.muon import import_muon, together

pytestmark = pytest.mark.slow  # imports DeepSpeed

# Wide and tall ones, of experts, larger than a stack may be; equal ones are not all neighbours.
SHAPES = [(8, 8), (8, 8), (24, 8), (24, 8), (8, 24), (8, 8), (3, 8, 12), (3, 8, 12), (3, 12, 8)]
SHAPES += [(130, 150), (130, 150), *[(64, 64)] * 5]
MOST = 3 * 64 * 64 * 2  # bytes: three of them in 16 bits


@pytest.fixture
def update():
    import_muon()
    from deepspeed.runtime.zero.muon import original_muon

    return original_muon.muon_update


def drawn(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", ["standard", "gram"])
def test_updates_are_the_same_to_the_bit_in_any_stack(monkeypatch, update, method, dtype):
    """Momenta, and the updates of gram, are DeepSpeed's own."""
    monkeypatch.setattr(orthogonal, "_MOST", MOST)
    original, several, alone = ([torch.zeros_like(x) for x in drawn(dtype)] for _ in range(3))
    for step in range(2):
        deepspeeds = [
            update.original(x, m, 0.9, ns_method=method, is_expert_group=x.ndim == 3)
            for x, m in zip(drawn(dtype, step), original, strict=True)
        ]
        one_by_one = [
            update(x, m, 0.9, ns_method=method)
            for x, m in zip(drawn(dtype, step), alone, strict=True)
        ]
        with together():
            at_once = [
                update(x, m, 0.9, ns_method=method)
                for x, m in zip(drawn(dtype, step), several, strict=True)
            ]
        for i, shape in enumerate(SHAPES):
            assert torch.equal(at_once[i], one_by_one[i]), shape
            assert torch.equal(at_once[i], deepspeeds[i]) or method == "standard", shape
            assert torch.equal(several[i], original[i]), shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_standard_iterations_are_deepspeeds_but_for_less_rounding(monkeypatch, update, dtype):
    from deepspeed.runtime.zero.muon import original_muon

    def iterated(function, kind, matrices):
        monkeypatch.setattr(original_muon, "ns_compute_dtype", lambda method: kind)
        return function(matrices, steps=5).double()

    deepspeeds = original_muon.zeropower_via_newtonschulz5
    exact = [iterated(deepspeeds, torch.float64, x) for x in drawn(dtype)]
    off = [
        sum(
            (iterated(function, dtype, x) - true).square().sum().item()
            for x, true in zip(drawn(dtype), exact, strict=True)
        )
        for function in (orthogonal._standard, deepspeeds)
    ]
    assert off[0] < (1e-8 if dtype is torch.float32 else 0.5 * off[1]), off


def test_an_update_outside_and_what_we_leave_to_deepspeed(update):
    for options in ({}, {"num_heads": 3}):
        gradient = torch.randn(24, 8)
        expected = update.original(
            gradient.clone(), torch.zeros(24, 8), **options
        )  # of method gram
        assert torch.equal(update(gradient.clone(), torch.zeros(24, 8), **options), expected)


def test_a_gradient_in_another_order_of_memory(update):
    gradient = torch.randn(8, 24).mT
    expected = update.original(gradient.contiguous(), torch.zeros(24, 8))
    with together():
        updates = update(gradient, torch.zeros(24, 8))
        view = updates.view(-1)  # as DeepSpeed takes it
    assert torch.equal(view.view(24, 8), expected)


@pytest.mark.parametrize("shape", [(64, 16), (16, 64), (4, 16, 64)])
def test_an_update_is_nearly_orthogonal(update, shape):
    torch.manual_seed(0)
    with together():
        updates = [update(torch.randn(shape), torch.zeros(shape)) for _ in range(3)]
    size = 2.0 if shape == (64, 16) else 1.0  # sqrt(rows / columns), if there are more rows
    for x in updates:
        values = torch.linalg.svdvals(x / size)
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_a_failure_inside_leaves_nothing_to_be_computed(update):
    with pytest.raises(TypeError, match="ns_steps"), together():
        update(torch.ones(4, 4), update(torch.ones(4, 4), torch.zeros(4, 4)), ns_steps=3)
    assert update(torch.eye(4), torch.zeros(4, 4))[0, 0] > 0.6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["standard", "gram"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_the_update_of_a_gradient_that_is_not_finite_is_not_finite(update, value, method, dtype):
    for shape in [(8, 24), (8, 8)]:
        gradient = torch.ones(shape, dtype=dtype)
        gradient[3, 2] = value
        updates = update(gradient, torch.zeros_like(gradient), ns_method=method)
        assert not updates.isfinite().all()


def test_deepspeed_keeps_overflows_out_of_the_momentum_itself():
    import_muon()
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    momentum = torch.ones(4)
    state = {"weights": {"momentum_buffer": momentum}}
    zero = SimpleNamespace(optimizer=SimpleNamespace(state=state), _muon_pending_momentum={})
    DeepSpeedZeroOptimizer._muon_staging_momentum(zero, "weights", 0).fill_(float("nan"))
    assert torch.equal(momentum, torch.ones(4))  # Muon follows a copy
    copied = DeepSpeedZeroOptimizer._muon_staging_momentum(zero, "weights", 0)
    assert torch.equal(copied, torch.ones(4))  # and begins anew after an overflow
    copied.fill_(2)
    DeepSpeedZeroOptimizer._commit_muon_momentum(zero)
    assert torch.equal(momentum, torch.full((4,), 2.0))

    # The other stages don't update what has overflowed.
    three = MagicMock(overflow=True)
    DeepSpeedZeroOptimizer_Stage3.step(three)
    three._overflow_check_and_loss_scale_update.assert_called()
    three._apply_muon_to_accumulated_grads.assert_not_called()
    none = MagicMock(fp16_groups=[], fused_lamb_legacy=False)
    none.overflow_checker.check.return_value = True
    FP16_UnfusedOptimizer.step(none)
    none.overflow_checker.check.assert_called()
    none.optimizer.step.assert_not_called()
