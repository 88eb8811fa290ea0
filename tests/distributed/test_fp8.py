"""Models that multiply in fp8 on real ranks: stages, divided models, checkpoints."""

import pytest
import torch

from forescale.checkpoint.reader import Checkpoint
from tests.distributed import ranks
from tests.distributed.mesh_scenarios import STATE

pytestmark = pytest.mark.distributed

MODEL = ["model.mlp_width=64", "model.vocab_size=72", "precision.kind=bf16"]
FP8 = "precision.fp8=rowwise"
TENSOR = "engine.tensor_parallel=2"
EXPERTS = ["model.mlp=moe", "model.mlp.expert_width=32", "model.mlp.experts=4"]


def trained(*cases, near=1):
    results = ranks.run(
        "sequence_scenarios:trained",
        2,
        580,
        cases=[[*c, *MODEL] for c in cases],
        near=near,
        steps=4,
    )
    return [torch.tensor([row for row, _ in case[0]]) for case in results]


def test_every_stage_and_every_axis_trains():
    stages = [[stage, FP8] for stage in range(4)]
    others = [[1, FP8, TENSOR], [3, FP8, TENSOR], [3, FP8, "model.activation_checkpointing=full"]]
    plain, *results = trained([1], *stages, *others)
    assert plain[-1] < plain[0]
    for losses in (*results, *trained([2, FP8], near=2)):
        assert not torch.equal(losses, plain)
        torch.testing.assert_close(losses, plain, rtol=0.01, atol=0)
    for losses in results[:4]:
        torch.testing.assert_close(losses, results[0], rtol=2e-3, atol=0)
    assert torch.equal(results[3], results[-1])


def test_experts_and_their_axis_train():
    alone, divided = trained([1, FP8, *EXPERTS], [1, FP8, *EXPERTS, "engine.expert_parallel=2"])
    assert alone[-1] < alone[0]
    torch.testing.assert_close(alone, divided, rtol=0.01, atol=0)


def test_a_checkpoint_does_not_say_that_its_run_multiplied_in_fp8(tmp_path):
    cases = [["fp8", 1, 1, FP8, *MODEL], ["plain", 1, 3, *MODEL]]
    results = ranks.run("mesh_scenarios:carry", 2, cases=cases, folder=str(tmp_path), known={})
    assert results["fp8<fp8"] == results["fp8"]  # to the bit
    fp8, plain = (Checkpoint(tmp_path / "first" / name / STATE) for name in ("fp8", "plain"))
    assert fp8.shapes == plain.shapes
    again = Checkpoint(tmp_path / "again" / "plain<fp8" / STATE)
    for name in fp8.shapes:
        assert fp8.reader.states(name) == plain.reader.states(name)
        for state in fp8.reader.states(name):
            stored = fp8.tensor(name, state)
            assert stored.dtype == plain.tensor(name, state).dtype
            assert torch.equal(again.tensor(name, state), stored)
    for row, expected in zip(results["plain<fp8"], results["fp8"], strict=True):
        assert row[0] == pytest.approx(expected[0], rel=0.01)
