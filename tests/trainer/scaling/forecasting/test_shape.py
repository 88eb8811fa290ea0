"""What a run loses because it is off the optimum of its budget."""

import numpy as np
import pytest

from forescale.scaling.fitting.laws import CHINCHILLA
from forescale.scaling.fitting.points import Points
from forescale.scaling.forecasting.shape import excess, fit_shape
from tests.trainer.scaling.iso_flop_runs import TRUTH, iso_flop_runs

RUNS, BUDGETS = iso_flop_runs(np.geomspace(1e18, 1e20, 4), sizes=7, width=5)
N, D, LOSS = RUNS.parameters, RUNS.tokens, RUNS.loss


def at_next(shape, units=(1.0, 1.0, 1.0)):
    """The excess of runs of a larger budget."""
    c = 10**20.5
    n = 0.1 * c**0.5 * np.geomspace(0.2, 5, 7)
    n, d, c = n * units[0], c / (6 * n) * units[1], c * units[2]
    return shape.excess(np.log(n), np.log(d), np.log(c))


def test_the_excess_of_a_law_is_found():
    c = 10**20.5
    n = 0.1 * c**0.5 * np.geomspace(0.02, 50, 4001)  # fine enough to hold the optimum
    y = np.log(CHINCHILLA.predict(TRUTH, parameters=n, tokens=c / (6 * n)))
    shape = fit_shape(Points(LOSS, N, D), BUDGETS)
    assert shape.excess(np.log(n), np.log(c / (6 * n)), np.log(c)) == pytest.approx(
        y - y.min(), abs=2e-3, rel=0.02
    )
    assert shape.optimum(np.log(c)) == pytest.approx(np.log(n[y.argmin()]), abs=0.05)


def test_units_change_nothing():
    units = (1e-6, 1e-9, 1e-3)
    scaled = Points(LOSS * 1.4, N * units[0], D * units[1])
    shape = at_next(fit_shape(scaled, BUDGETS * units[2]), units)
    assert shape == pytest.approx(at_next(fit_shape(Points(LOSS, N, D), BUDGETS)), abs=1e-5)


def test_an_error_of_a_budgets_level_does_not_bend_the_shape():
    """5 % more loss at one budget, as if its data were others."""
    moved = Points(LOSS * np.where(np.arange(28) < 21, 1, 1.05), N, D)
    shape = at_next(fit_shape(Points(LOSS, N, D), BUDGETS))
    assert at_next(fit_shape(moved, BUDGETS)) == pytest.approx(shape, abs=2e-3, rel=0.02)


def test_no_excess_is_negative():
    noisy = LOSS * np.exp(0.01 * np.random.default_rng(0).standard_normal(len(LOSS)))
    shape = fit_shape(Points(noisy, N, D), BUDGETS)
    best = shape.optimum(np.log(1e21))
    rest = np.log(1e21 / shape.per) - best
    assert shape.excess(best, rest, np.log(1e21)) == pytest.approx(0)
    assert (at_next(shape) >= 0).all()


def test_the_excess_of_known_runs_is_above_the_lowest_of_their_budget():
    shape = excess(np.array([1.0, 1.2, 0.5, 0.4]), np.array([1, 1, 2, 2]))
    assert shape == pytest.approx([0, 0.2, 0.1, 0])
