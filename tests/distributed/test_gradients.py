"""Gradients of bf16 weights, added up in fp32, on real ranks of real DeepSpeed."""

import pytest
import torch

from forescale.checkpoint.reader import Checkpoint
from tests.distributed import ranks

pytestmark = pytest.mark.distributed

# Muon's other parameters are AdamW's, and all other optimizers take gradients in the same form.
IN_FP32 = [[stage, "muon", "bf16", False, "fp32"] for stage in range(4)]
IN_FP32 += [[stage, "muon", "bf16", True, "fp32"] for stage in (1, 2, 3)]
IN_BF16 = [[stage, "muon", "bf16", False, None] for stage in range(4)]


def test_the_sum_of_64_micro_batches_is_that_of_plain_pytorch_in_fp32():
    results = ranks.run("gradient_scenarios:errors", 2, cases=IN_FP32 + IN_BF16)
    for case, (error, norm, right) in zip(IN_FP32 + IN_BF16, results, strict=True):
        if case in IN_FP32:
            assert error < 1e-6, case
            assert norm == pytest.approx(right, rel=1e-6), case
        else:
            assert error > 1e-3, case


def test_reducing_beside_the_backward_pass_changes_no_bit():
    kinds = [[stage, gradients] for stage in (1, 2, 3) for gradients in (None, "fp32")]
    cases = [[*kind, beside] for kind in kinds for beside in (False, True)]
    results = ranks.run("gradient_scenarios:losses", 2, cases=cases)
    for kind, apart, beside in zip(kinds, results[::2], results[1::2], strict=True):
        assert beside == apart, kind
    assert results[2] != results[0], "the numbers of fp32 gradients are others"


def test_a_run_resumes_to_the_bit_and_a_dropped_gradient_leaves_no_trace(tmp_path):
    results = ranks.run("gradient_scenarios:resumed", 2, cases=IN_FP32, folder=str(tmp_path))
    for case, (whole, again) in zip(IN_FP32, results, strict=True):
        assert again == whole, case
        held = Checkpoint(tmp_path / f"{case[0]}-{case[3]}" / "checkpoints/step-00000002")
        momentum = held.tensor("up.weight", "momentum_buffer")
        assert not torch.equal(momentum, momentum.bfloat16().float()), case  # it isn't rounded
