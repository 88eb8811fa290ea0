"""The self-check on real ranks: it changes nothing, finds what is wrong, and names the rank."""

import pytest

from tests.distributed import ranks

pytestmark = pytest.mark.distributed
CASES = [
    [0, "muon", "bf16"],
    [1, "adamw", "fp32"],
    [2, "muon", "bf16"],
    [3, "adamw", "bf16"],
]


def test_the_self_check_does_not_change_the_training():
    results = ranks.run("selfcheck_scenarios:trained", 2, cases=CASES)
    for case, (checked, alone, faults, tolerance) in zip(CASES, results, strict=True):
        assert faults == [None] * 3, case
        assert tolerance == 0.0, case
        assert checked == alone, case


def test_the_rank_that_computes_wrong_is_named():
    weights = "rank 2 on here: its weights differ from the others'"
    replay = "rank 2 on here: a micro-batch computed again differs"
    cases = {(1, "weight"): weights, (0, "weight"): weights, (2, "loss"): replay,
             (1, "compute"): replay}  # fmt: skip
    faults = ranks.run("selfcheck_scenarios:corrupt", 3, cases=[*cases])
    for (case, sentence), fault in zip(cases.items(), faults, strict=True):
        assert sentence in fault, case


def test_if_two_ranks_differ_both_are_named():
    (fault,) = ranks.run("selfcheck_scenarios:corrupt", 2, cases=[[1, "weight"]])
    assert "ranks 0 on here, 1 on here differ" in fault
