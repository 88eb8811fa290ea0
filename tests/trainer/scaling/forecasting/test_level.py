"""The level of each budget, and its continuation to larger budgets."""

import numpy as np
import pytest

from forescale.scaling.fitting.points import Points
from forescale.scaling.forecasting.level import extrapolate, levels, vertex

BUDGETS = np.geomspace(1e18, 1e20, 5)


def power_law(c, gamma=0.15):
    """log of E + K C^-gamma, with a reducible loss of 0.8 at 1e18 FLOPs."""
    return np.log(1.7 + 0.8 * (c / 1e18) ** -gamma)


@pytest.mark.parametrize("gamma", [0.07, 0.1, 0.15, 0.18])
def test_a_power_law_without_noise_is_continued(gamma):
    """Within 0.5 % at the next budget, for published exponents; a decade on within 1.2 %, and
    mostly nearer than a line."""
    x, y = np.log(BUDGETS), power_law(BUDGETS, gamma=gamma)
    near = extrapolate(x, y, np.log(10**20.5))
    assert near == pytest.approx(power_law(10**20.5, gamma=gamma), abs=0.005)
    far, line = extrapolate(x, y, np.log(1e21)), y[-1] + 2 * (y[-1] - y[-2])
    off = abs(far - power_law(1e21, gamma=gamma))
    assert off < 0.012
    if gamma > 0.07:  # whose curve is nearly a line
        assert off < abs(line - power_law(1e21, gamma=gamma))


def test_two_budgets_are_continued_between_their_line_and_no_gain():
    x, y = np.log([1e18, 1e19]), np.log([3.0, 2.7])
    assert 2 * y[1] - y[0] < extrapolate(x, y, np.log(1e20)) < y[1]


def test_units_of_compute_and_loss_change_nothing():
    x, y = np.log(BUDGETS), power_law(BUDGETS) + 0.004 * np.array([1, -1, 0, 1, -1])
    level = extrapolate(x, y, np.log(1e21))
    moved = extrapolate(x + 7, y + 0.3, np.log(1e21) + 7)
    assert moved - 0.3 == pytest.approx(level, abs=1e-9)


def test_a_cheap_budget_counts_less_than_the_last():
    x, y, far = np.log(BUDGETS), power_law(BUDGETS), np.log(1e21)
    moved = [extrapolate(x, y + 0.01 * (np.arange(5) == i), far) for i in (0, 4)]
    first, last = np.abs(np.array(moved) - extrapolate(x, y, far))
    assert first < last / 3


def test_the_vertex_of_a_parabola_is_between_its_runs():
    x = np.array([-1.0, -0.5, 0.2, 0.9, 1.5])
    assert vertex(x + 20, 0.9 + 0.02 * (x - 0.4) ** 2) == pytest.approx(0.9)


def test_without_a_valid_vertex_the_lowest_run_is_the_level():
    falling = np.array([1.00, 0.99, 0.98, 0.975, 0.972])
    assert vertex(np.arange(5.0), falling) == 0.972
    assert vertex(np.arange(3.0), falling[:3]) == 0.98


def test_a_level_reads_its_own_budget_alone():
    rng = np.random.default_rng(0)
    budgets = np.repeat(BUDGETS, 6)
    n = np.tile(np.geomspace(1e8, 1e10, 6), 5)
    loss = np.exp(rng.normal(1, 0.01, 30))
    level = levels(Points(loss, n), budgets)
    other = levels(Points(loss * np.where(budgets == BUDGETS[3], 2, 1), n), budgets)
    for name in ("lowest", "smooth"):
        change = getattr(other, name) - getattr(level, name)
        assert change[[0, 1, 2, 4]] == pytest.approx(np.zeros(4))
        assert change[3] == pytest.approx(np.log(2))
    assert level.lowest[0] == np.log(loss[:6].min())
