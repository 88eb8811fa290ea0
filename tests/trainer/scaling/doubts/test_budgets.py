"""Budgets that C shows, and budgets that are named otherwise."""

import numpy as np
import pandas as pd
import pytest

from forescale.scaling.doubts.budgets import grouped, mismatch

DISTINCT = np.geomspace(1e18, 1e20, 5)
BUDGETS = np.repeat(DISTINCT, 6)
N = 0.1 * BUDGETS**0.5 * np.tile(np.geomspace(1 / 3, 3, 6), 5)
RNG = np.random.default_rng(0)


def test_compute_that_falls_into_groups_shows_its_budgets():
    order = RNG.permutation(len(N))
    flops = (BUDGETS * RNG.uniform(0.985, 1.015, len(N)))[order]
    budgets, note = grouped(flops, N[order])
    assert budgets == pytest.approx(BUDGETS[order], rel=0.02)
    assert len(np.unique(budgets)) == 5
    assert note == (
        "The table names no budgets: C of the runs falls into 5 groups, which are taken as budgets."
    )


def test_a_run_between_the_groups_has_its_own_compute_as_its_budget():
    budgets, note = grouped(np.append(BUDGETS, 5e20), np.append(N, 1e9))
    assert budgets[-1] == 5e20
    assert "1 of 31 runs are in none" in note


@pytest.mark.parametrize("runs", [9, 20, 60, 300])
def test_runs_of_any_compute_have_no_budgets(runs):
    for _ in range(100):
        c = np.exp(RNG.uniform(0, 6, runs))
        assert grouped(c, RNG.uniform(size=runs)) is None


def test_groups_that_nearly_touch_are_no_budgets():
    c = np.repeat(1e18 * 1.1 ** np.arange(6), 5)
    n = np.tile(np.arange(1.0, 6.0), 6)
    assert grouped(c, n) is None
    assert grouped(c**3 / 1e36, n) is not None


def test_two_groups_or_groups_of_one_size_are_no_budgets():
    assert grouped(BUDGETS[:12], N[:12]) is None
    assert grouped(BUDGETS, np.repeat(DISTINCT, 6)) is None  # seeds of one cell


def test_budgets_of_public_studies_are_found_again_and_none_are_made_up(published):
    for path in sorted((published / "backtest").glob("*.csv")):
        t = pd.read_csv(path)
        c, n = t["flops"].to_numpy(), t["parameters"].to_numpy()
        assert grouped(c, n)[0] == pytest.approx(t["budget"].to_numpy(), rel=0.005)
        assert mismatch(t["budget"].to_numpy(), c, n) is None
    t = pd.read_csv(published / "epoch_chinchilla" / "svg_extracted_data.csv")
    assert grouped(t["Training FLOP"].to_numpy(), t["Model Size"].to_numpy()) is None


def test_rounded_names_of_equal_compute_are_no_mismatch():
    assert mismatch(np.repeat([1e18, 3e18, 1e19, 3e19, 1e20], 6), BUDGETS, N) is None


def test_budgets_of_another_convention_are_named_with_the_cure():
    causal = BUDGETS * (1 + 0.5 * (N / N.min()) ** -0.3)
    budgets = mismatch(BUDGETS, causal, N, {"cost=full": 1.4 * causal, "6 N D": 2 * BUDGETS})
    assert budgets.startswith("In 5 of 5 budgets C differs by more than 5%")
    assert "The budgets are those of 6 N D, and C is counted otherwise" in budgets
    assert "columns='{flops: budget}'" in budgets


def test_budgets_that_are_a_constant_times_compute_are_named():
    assert mismatch(BUDGETS / 3, BUDGETS, N).startswith("C of the runs is 3 times the budget")


def test_two_groups_of_compute_with_one_name_are_told_apart():
    budgets = mismatch(np.repeat([1e18, 1e18, 1e19, 3e19, 1e20], 6), BUDGETS, N)
    assert "In 1 of 4 budgets" in budgets
    assert "C itself falls into 5 groups" in budgets


def test_budgets_that_differ_by_a_little_are_named():
    budgets = mismatch(BUDGETS * RNG.uniform(0.99, 1.01, len(N)), BUDGETS, N)
    assert "30 runs have 30 different budgets" in budgets


def test_budgets_that_hold_for_no_way_to_count_compute_are_to_be_corrected():
    c = BUDGETS * np.exp(RNG.uniform(-1, 1, len(N)))
    assert "Correct C or the budgets of these runs" in mismatch(BUDGETS, c, N, {"6 N D": c})
