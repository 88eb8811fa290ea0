"""Forecasts of larger budgets by level and shape apart."""

import numpy as np
import pytest

from forescale.scaling.fitting.laws import CHINCHILLA
from forescale.scaling.fitting.points import Points
from forescale.scaling.forecasting.forecaster import forecasters
from tests.trainer.scaling.iso_flop_runs import TRUTH, iso_flop_runs

DISTINCT = np.geomspace(1e18, 1e20, 5)
RUNS, BUDGETS = iso_flop_runs(DISTINCT)
N, D, LOSS = RUNS.parameters, RUNS.tokens, RUNS.loss
IS_LATE = np.repeat([False, False, False, True, True], 6)  # the fourth budget and the fifth


def noisy(scale=0.003, seed=0):
    """Losses with noise of log loss."""
    return LOSS * np.exp(scale * np.random.default_rng(seed).standard_normal(len(LOSS)))


def forecaster(points, budgets):
    """That of all runs."""
    return list(forecasters(points, budgets))[-1]


def of_runs(one, n, d, budget):
    """The forecast of runs by N and D."""
    return one.of_runs({"parameters": n, "tokens": d}, 6 * n * d, budget)


def forecasts_of(one, units=(1.0, 1.0, 1.0)):
    """All that a forecaster says of a budget beyond all runs."""
    c = 1e21
    n = 0.1 * c**0.5 * np.geomspace(0.3, 3, 6)
    d = c / (6 * n)
    lowest = one.minimum(c * units[2])
    each = of_runs(one, n * units[0], d * units[1], c * units[2])
    return np.r_[lowest.log_loss, lowest.deviation, each.log_loss, each.deviation]


def test_runs_of_a_law_without_noise_are_continued():
    """Within 1 % at the next budget: the level's curve is not exact (test_level.py)."""
    one, c = forecaster(Points(LOSS, N, D), BUDGETS), 10**20.5
    n = 0.1 * c**0.5 * np.geomspace(0.3, 3, 6)
    observed = np.log(CHINCHILLA.predict(TRUTH, parameters=n, tokens=c / (6 * n)))
    assert of_runs(one, n, c / (6 * n), c).log_loss == pytest.approx(observed, abs=0.01)
    assert one.minimum(c).log_loss == pytest.approx(observed.min(), abs=0.01)


def test_losses_beyond_the_known_budgets_change_nothing():
    other = noisy() * np.where(IS_LATE, 1.3, 1)
    for one, two in zip(
        list(forecasters(Points(noisy(), N, D), BUDGETS))[:2],
        list(forecasters(Points(other, N, D), BUDGETS))[:2],
        strict=True,
    ):
        assert (forecasts_of(one) == forecasts_of(two)).all()


def test_there_is_one_for_each_prefix_of_budgets():
    each = list(forecasters(Points(noisy(), N, D), BUDGETS))
    assert [len(one.levels.smooth) for one in each] == [2, 3, 4, 5]
    assert each[0].scales == (1, 1), "nothing is known of its errors"
    assert all(one.scales != (1, 1) for one in each[1:])


def test_units_change_nothing():
    units = (1e-6, 1e-9, 1e-3)
    scaled = Points(noisy(), N * units[0], D * units[1])
    forecast = forecasts_of(forecaster(scaled, BUDGETS * units[2]), units)
    assert forecast == pytest.approx(
        forecasts_of(forecaster(Points(noisy(), N, D), BUDGETS)), abs=1e-5
    )


def test_intervals_widen_with_distance_excess_and_level():
    one = forecaster(Points(noisy(), N, D), BUDGETS)
    widths = [one.minimum(c).half(0.9) for c in (1e20, 10**20.5, 1e21, 1e23)]
    assert (np.diff(widths) > 0).all()
    assert one.minimum(1e21).half(0.5) < one.minimum(1e21).half(0.9)
    n = 0.1 * 1e21**0.5 * np.array([1, 4, 16.0])
    assert (np.diff(of_runs(one, n, 1e21 / (6 * n), 1e21).deviation) > 0).all()


def test_a_study_that_broke_its_own_forecasts_has_wider_intervals():
    """A level that jumps at the fourth budget: the forecast of the fifth has more doubt."""
    smooth = forecaster(Points(noisy(), N, D), BUDGETS)
    broken = forecaster(Points(noisy() * np.where(IS_LATE, 0.95, 1), N, D), BUDGETS)
    assert broken.scales[0] > 2 * smooth.scales[0]
