"""The base's curve, read backwards."""

import numpy as np
import pytest

from forescale.scaling.analysis.recipes.curve import BaseCurve, floor_of
from tests.trainer.scaling.simulated_recipes import E, law

C = np.array([4e10, 1e11, 3.16e11, 1e12, 2.5e12])


def test_a_power_law_with_a_floor_is_inverted_between_its_budgets():
    wanted = np.array([6e10, 2e11, 7e11, 2e12])
    curve = BaseCurve(np.log(C), np.log(law(C)))
    assert floor_of(np.log(C), np.log(law(C))) == pytest.approx(E, rel=0.03)
    assert np.exp(curve.log_compute(np.log(law(wanted)))) == pytest.approx(wanted, rel=2e-3)


def test_a_law_without_a_floor_is_inverted_too():
    losses = 2.2 * (C / 1e11) ** -0.07
    curve = BaseCurve(np.log(C), np.log(losses))
    assert np.exp(curve.log_compute(np.log([2.2 * 5**-0.07]))) == pytest.approx(5e11, rel=1e-6)


def test_nothing_is_extrapolated():
    curve = BaseCurve(np.log(C), np.log(law(C)))
    above, at_first, at_last, below = curve.log_compute(
        np.log([law(3.9e10), law(C[0]), law(C[-1]), law(2.6e12)])
    )
    assert (above, below) == (-np.inf, np.inf)
    assert [at_first, at_last] == pytest.approx([np.log(C[0]), np.log(C[-1])])


def test_budgets_out_of_order_give_one_compute_for_a_loss_all_the_same():
    losses = np.array([2.4, 2.2, 2.22, 2.0, 1.9])
    curve = BaseCurve(np.log(C), np.log(losses))
    assert not curve.is_falling
    found = curve.log_compute(np.log(np.linspace(2.39, 1.91, 50)))
    assert np.isfinite(found).all()
    assert (np.diff(found) >= 0).all()


def test_drawn_curves_are_read_row_by_row():
    curve = BaseCurve(np.log(C), np.log(law(C)))
    nodes = np.log(law(C)) + np.array([[0.0], [0.01], [-0.01]])
    wanted = np.log(law(np.array([2e11, 7e11]))) + np.zeros((3, 1))
    found = curve.log_compute(wanted, nodes)
    assert found.shape == (3, 2)
    for row, own in zip(found, nodes, strict=True):
        alone = BaseCurve(np.log(C), own)
        alone.floor = curve.floor
        assert row == pytest.approx(alone.log_compute(wanted[0]))
