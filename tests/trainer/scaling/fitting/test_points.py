"""The columns of a fit, and the runs near the optimum of their budget."""

import numpy as np
import pytest

from forescale.ground.errors import UserError
from forescale.scaling.fitting.points import Points, near_best

LOSS = np.array([2.0, 2.05, 2.5, 3.0, 2.2, 2.21, 2.22, 2.9])
BUDGETS = np.array([1e18] * 4 + [1e19] * 4)


def test_runs_far_above_the_least_loss_are_left_out_but_the_best_three_of_each_budget():
    mask = near_best(LOSS, BUDGETS, 0.04)
    assert mask.tolist() == [True, True, True, False, True, True, True, False]
    mask = near_best(np.array([2.0, 2.5, 3.0, 4.0]), np.full(4, 1e18), 0.01)
    assert mask.tolist() == [True, True, True, False]
    assert near_best(LOSS, BUDGETS, None).all()


@pytest.mark.parametrize("bad", [np.nan, 0.0, -2.0, np.inf])
def test_a_loss_without_a_logarithm_is_refused(bad):
    with pytest.raises(
        UserError, match=r"study: loss: .* of run 1 is not a finite positive number"
    ):
        Points([2.0, bad, 3.0], parameters=[1, 2, 3], where="study")


def test_points_share_one_length_and_one_convention():
    with pytest.raises(UserError, match="give one number per run"):
        Points([2.0, 3.0], parameters=[1e9])
    with pytest.raises(UserError, match="1 by 'blocks', 2 by 'total'"):
        Points([2.0, 3.0, 4.0], convention=["total", "blocks", "total"])
    one = Points([2.0, 3.0], parameters=[1e9, 2e9], convention=["total", "total"])
    assert one.convention == "total"
    assert one.take([1]).parameters == [2e9]
    with pytest.raises(UserError, match="no column 'tokens'"):
        one.log("tokens")
