"""The runs near the optimum of their budget."""

import numpy as np

from forescale.scaling.fitting.points import near_best

LOSS = np.array([2.0, 2.05, 2.5, 3.0, 2.2, 2.21, 2.22, 2.9])
BUDGETS = np.array([1e18] * 4 + [1e19] * 4)


def test_runs_far_above_the_least_loss_of_their_budget_are_left_out():
    mask = near_best(LOSS, BUDGETS, 0.04)
    assert mask.tolist() == [True, True, True, False, True, True, True, False]


def test_the_best_three_of_each_budget_are_kept():
    mask = near_best(np.array([2.0, 2.5, 3.0, 4.0]), np.full(4, 1e18), 0.01)
    assert mask.tolist() == [True, True, True, False]
    assert near_best(LOSS, BUDGETS, None).all()
