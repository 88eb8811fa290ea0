"""Hybrid sharding: groups of ranks that have a copy of the states each train as all ranks do.

At 8 ranks groups of two that divide states beside groups of two that divide matrices and experts.
"""

import pytest
import torch

from tests.distributed import ranks
from tests.distributed.jobs import SMALL, zero
from tests.distributed.test_sequence import STEPS, plainly

pytestmark = pytest.mark.distributed

GROUPS = "engine.shard_group=2"
KEYS = ["model.num_kv_heads=2", "model.mlp_width=42", "model.vocab_size=72", "optimizer.clip=0.5"]
MATRICES = "engine.tensor_parallel=2"
EXPERTS = ["model.mlp=moe", "model.mlp.shared=1", "engine.expert_parallel=2"]
EXPERTS += ["model.mlp.balance_loss=0", "model.mlp.z_loss=0"]
STAGES = "engine.pipeline_parallel=2"
MUON = "optimizer=muon"
CASES = [
    (4, 1, [[stage, *KEYS, kind] for stage in (1, 2, 3) for kind in ("optimizer=adamw", MUON)]),
    (4, 1, [[stage, *KEYS, MUON, *EXPERTS] for stage in (2, 3)]),
    (4, 2, [[3, *KEYS, MUON]]),  # of four ranks, two divide a window
    (4, 1, [[2, *KEYS, MUON, "engine.context_parallel=2"]]),
    (8, 1, [[1, *KEYS, MUON, MATRICES], [3, *KEYS, MATRICES, *EXPERTS], [1, *KEYS, MUON, STAGES]]),
]


@pytest.mark.parametrize(("size", "near", "cases"), CASES)
def test_groups_with_a_copy_of_the_states_train_as_one_rank(size, near, cases):
    cases = [[*case, GROUPS] for case in cases]
    results = ranks.run("sequence_scenarios:trained", size, cases=cases, near=near, steps=STEPS)
    expected = {}
    for case, (rows, scores) in zip(cases, results, strict=True):
        words = [word for word in case[1:] if not word.startswith("engine.")]
        if str(words) not in expected:
            expected[str(words)] = plainly([0, *words], False)
        plain, held_out = expected[str(words)]
        for row, of_one in zip(rows, plain, strict=True):
            assert row == pytest.approx(of_one, rel=1e-5), case
        torch.testing.assert_close(torch.tensor(scores), torch.tensor(held_out), msg=f"{case}")


def test_with_train_invariant_every_bit_is_that_of_all_ranks_together():
    cases = [
        [stage, optimizer, f"precision={precision}"]
        for stage, precision in ((1, "fp32"), (2, "bf16"), (3, "bf16"))
        for optimizer in ("optimizer=adamw", MUON)
    ]
    grouped = [[*case, GROUPS] for case in cases]
    results = ranks.run("invariant_scenarios:divided", 4, cases=cases + grouped, near=1)
    assert results[: len(cases)] == results[len(cases) :]


def test_the_self_check_compares_the_copies():
    cases = [[stage, *KEYS, MUON, GROUPS] for stage in (1, 3)]
    faults = ranks.run("shard_scenarios:checked", 4, cases=cases)
    # Of two copies that differ, none is known to be right.
    differ = "the weights of ranks 0 on here, 2 on here differ, where all must be equal"
    assert faults == [None, differ] * 2


def test_stage_3_sums_over_the_copies_beside_the_last_backward_pass():
    case = [3, *KEYS, "optimizer=adamw", GROUPS, zero(SMALL), "engine.bucket_bytes=20000"]
    order = ranks.run("shard_scenarios:ordered", 4, case=case)
    first, last = order.index("sum"), len(order) - 1 - order[::-1].index("end")
    assert order.index("end") < first < last  # of two micro-batches
