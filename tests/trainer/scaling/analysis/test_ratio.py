"""Ratios of two independent estimates."""

import numpy as np
import pytest

from forescale.scaling.analysis.ratio import Ratio, inverse, ratios


def column(value, low, high) -> np.ndarray:
    """A log with its ends, (3, 1)."""
    return np.array([[value], [low], [high]], dtype=float)


def test_symmetric_ends_add_as_standard_deviations_do():
    (ratio,) = ratios(column(2.0, 1.7, 2.3), column(0.5, 0.1, 0.9))
    logs = np.log([ratio.value, ratio.low, ratio.high])
    assert logs == pytest.approx([1.5, 1.0, 2.0])


def test_each_end_is_that_of_the_sides_that_move_it_there():
    (ratio,) = ratios(column(0.0, -0.3, 0.0), column(0.0, 0.0, 0.4))
    assert np.log([ratio.low, ratio.high]) == pytest.approx([-0.5, 0.0])


def test_as_plain_values_what_is_0_or_unbounded_is_none():
    ratio = Ratio(1.2, 0.0, np.inf).as_dict()
    assert ratio == {"value": 1.2, "low": None, "high": None, "includes_one": True}


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ((np.inf, np.inf, np.inf), (0.0, 0.0, 0.0)),
        ((np.inf, 1.0, np.inf), (0.0, 0.0, np.exp(0.2))),
        ((2.0, 1.0, np.inf), (np.exp(-1), 0.0, np.exp(-1 + np.hypot(1, 0.2)))),
    ],
)
def test_a_loss_that_is_never_reached_has_no_end(other, expected):
    (ratio,) = ratios(column(1.0, 0.8, 1.2),
                      column(*other))  # fmt: skip
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx(expected)


def test_the_inverse_of_an_interval_from_zero_has_no_upper_end():
    assert inverse(Ratio(2.0, 0.0, 4.0)) == Ratio(0.5, 0.25, np.inf)


@pytest.mark.parametrize(("ends", "expected"), [((0.9, 1.2), True), ((1.01, 1.2), False)])
def test_an_interval_says_whether_it_includes_one(ends, expected):
    assert Ratio(1.1, *ends).includes_one is expected
