"""The self-check on real ranks: it changes nothing, finds what is wrong, and names the rank."""

import pytest

from tests.distributed import ranks

pytestmark = pytest.mark.distributed
COMBINATIONS = [
    (0, "muon", "bf16"),
    (1, "adamw", "fp32"),
    (2, "muon", "bf16"),
    (3, "adamw", "bf16"),
]


@pytest.mark.parametrize(("stage", "optimizer", "precision"), COMBINATIONS)
def test_the_self_check_does_not_change_the_training(stage, optimizer, precision):
    how = {"stage": stage, "optimizer": optimizer, "precision": precision}
    checked = ranks.run("selfcheck_scenarios:trained", 2, checks=True, **how)
    assert checked["said"] == [None] * 3
    assert checked["tolerance"] == 0.0
    alone = ranks.run("selfcheck_scenarios:trained", 2, checks=False, **how)
    assert checked["facts"] == alone["facts"]


@pytest.mark.parametrize(
    ("stage", "problem", "says"),
    [
        (1, "weight", "rank 2 on here: its weights differ from the others'"),
        (0, "weight", "rank 2 on here: its weights differ from the others'"),
        (2, "loss", "rank 2 on here: a micro-batch computed again differs"),
        (1, "compute", "rank 2 on here: a micro-batch computed again differs"),
    ],
)
def test_the_rank_that_computes_wrong_is_named(stage, problem, says):
    assert says in ranks.run("selfcheck_scenarios:corrupt", 3, stage=stage, problem=problem)


def test_if_two_ranks_differ_both_are_named():
    faults = ranks.run("selfcheck_scenarios:corrupt", 2, stage=1, problem="weight")
    assert "ranks 0 on here, 1 on here differ" in faults
