"""Which runs of a budget a law is fitted to."""

import numpy as np

from forescale.scaling.fitting.points import near_best

LOSS = np.array([2.0, 2.05, 2.5, 3.0, 2.2, 2.21, 2.22, 2.9])
BUDGETS = np.array([1e18] * 4 + [1e19] * 4)


def test_runs_far_above_their_budgets_best_are_left_out():
    kept = near_best(LOSS, BUDGETS, 0.04)
    assert kept.tolist() == [True, True, True, False, True, True, True, False]


def test_of_each_budget_three_stay_however_far_apart():
    kept = near_best(np.array([2.0, 2.5, 3.0, 4.0]), np.full(4, 1e18), 0.01)
    assert kept.tolist() == [True, True, True, False]
    assert near_best(LOSS, BUDGETS, None).all()
