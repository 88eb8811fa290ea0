"""The combination of the ways to continue the lowest losses of the budgets."""

import numpy as np
import pytest

from forescale.scaling.forecasting.combination import PRIOR, parts_of, weights
from forescale.scaling.forecasting.level import levels
from tests.trainer.scaling.iso_flop_runs import iso_flop_runs

DISTINCT = np.geomspace(1e18, 1e20, 5)
FAR = 1e21
DECADES = np.array([0.5, 1.0, 0.5])


def parts(noise=0.0):
    points, budgets = iso_flop_runs(DISTINCT, noise=noise)
    return parts_of(points, budgets, levels(points, budgets), per=6.0)


def test_each_part_continues_the_levels_in_its_way():
    level, straight, law = parts().at(FAR)
    observed, _ = iso_flop_runs(np.array([FAR]), sizes=31)
    assert law == pytest.approx(np.log(observed.loss.min()), abs=1e-4), "runs without noise"
    assert straight < level < law, "losses that flatten, and the drift of the level"


def test_the_law_has_most_of_the_prior_only_where_runs_follow_it_exactly():
    assert parts().prior[2] > 0.99
    assert 0.3 < parts(noise=0.002).prior[2] < 0.9
    assert parts(noise=0.02).prior == pytest.approx(PRIOR, abs=0.01)


def test_without_errors_the_weights_are_the_prior():
    assert weights(PRIOR, np.empty((0, 3)), np.empty(0)) == pytest.approx(PRIOR)


def test_errors_of_opposite_signs_are_balanced():
    """The level is 1 % a decade too high, the straight line 3 % too low, and the law far off."""
    errors = np.array([0.01, -0.03, 0.2])
    each = DECADES[:, None] * errors
    few, many = (weights(PRIOR, np.tile(each, (k, 1)), np.tile(DECADES, k)) for k in (1, 40))
    assert abs(many @ errors) < 5e-4
    assert abs(few @ errors) < abs(PRIOR @ errors) / 10
    assert max(many[2], few[2]) < PRIOR[2]


def test_a_part_that_is_absent_has_no_weight():
    errors = np.array([[0.01, -0.03, np.nan], [0.01, -0.03, np.nan]])
    result = weights(np.array([0.5, 0.5, 0.0]), errors, np.ones(2))
    assert result[2] == 0
    assert result.sum() == pytest.approx(1)


def test_errors_far_away_count_by_the_decade():
    near, other = np.array([0.01, -0.03, 0.02]), np.array([0.03, -0.01, 0.02])
    alike = weights(PRIOR, np.array([near, other]), np.ones(2))
    apart = weights(PRIOR, np.array([near, 4 * other]), np.array([1.0, 4.0]))
    assert apart == pytest.approx(alike, abs=1e-6)
