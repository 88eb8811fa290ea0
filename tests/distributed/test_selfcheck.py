"""The self-check on real ranks: it disturbs nothing, finds what is wrong, and says where."""

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
def test_training_goes_on_as_if_nobody_had_looked(stage, optimizer, precision):
    how = {"stage": stage, "optimizer": optimizer, "precision": precision}
    looked = ranks.run("selfcheck_scenarios:trained", 2, checks=True, **how)
    assert looked["said"] == [None] * 3
    assert looked["tolerance"] == 0.0
    alone = ranks.run("selfcheck_scenarios:trained", 2, checks=False, **how)
    assert looked["facts"] == alone["facts"]


@pytest.mark.parametrize(
    ("stage", "what", "says"),
    [
        (1, "weight", "rank 2 on here: its weights differ from the others'"),
        (0, "weight", "rank 2 on here: its weights differ from the others'"),
        (2, "loss", "rank 2 on here: a micro-batch computed again differs"),
        (1, "compute", "rank 2 on here: a micro-batch computed again differs"),
    ],
)
def test_who_computes_wrong_is_named(stage, what, says):
    assert says in ranks.run("selfcheck_scenarios:corrupt", 3, stage=stage, what=what)


def test_of_two_that_differ_both_are_named():
    said = ranks.run("selfcheck_scenarios:corrupt", 2, stage=1, what="weight")
    assert "ranks 0 on here, 1 on here differ" in said
