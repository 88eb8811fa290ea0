"""Mixing laws: planted parameters and best shares are found again, and nothing beyond the runs."""

import numpy as np
import pytest

from forescale.scaling.design.mixtures import mixtures
from forescale.scaling.fitting.mixing import (
    LAWS,
    best_shares,
    drawn_losses,
    laws_for,
    left_out,
    rounded_shares,
)

SHARES = mixtures([0.5, 0.3, 0.2], 16, 0.05, 0)
BY_NAME = {law.name: law for law in LAWS}
FLOOR = np.array([1.5, 1.2, 1.8])
SLOPES = np.array([[-2.5, 0.1, 0.3], [0.2, -2.0, 0.1], [0.4, 0.3, -1.5]])
MEAN = np.full(3, 1 / 3)


def planted(shares):
    """Losses of the exponential law, (n, 3)."""
    return FLOOR + np.exp(shares @ SLOPES.T)


def noisy(shares, noise=0.002, seed=0):
    rng = np.random.default_rng(seed)
    return planted(shares) * np.exp(noise * rng.standard_normal((len(shares), 3)))


def lowest(fit, starts=SHARES):
    return best_shares(lambda shares: fit.losses(shares) @ MEAN, starts, len(fit.slopes))


def test_the_exponential_law_finds_its_parameters_again():
    fit = BY_NAME["exponential"].fit(SHARES, planted(SHARES))
    assert fit.floor[0] == pytest.approx(FLOOR, abs=2e-3)
    assert fit.slopes[0] == pytest.approx(SLOPES, abs=0.02)
    others = np.random.default_rng(1).dirichlet(np.ones(3), 20)
    assert fit.losses(others)[0] == pytest.approx(planted(others), rel=1e-3)


def test_a_law_without_a_floor_finds_its_parameters_again():
    slopes = np.array([[-0.4, -0.05], [-0.02, -0.3]])
    shares = mixtures([0.5, 0.5], 8, 0.05, 0)
    fit = BY_NAME["power"].fit(shares, np.exp(0.7 + np.log(shares) @ slopes.T))
    assert fit.slopes[0] == pytest.approx(np.c_[[0.7, 0.7], slopes], abs=1e-6)


def test_the_best_shares_are_those_of_a_dense_search():
    grid = np.random.default_rng(0).dirichlet(np.ones(3), 100_000)
    inside = ((grid >= SHARES.min(axis=0)) & (grid <= SHARES.max(axis=0))).all(axis=1)
    grid = grid[inside]
    true = grid[(planted(grid) @ MEAN).argmin()]
    (best,) = lowest(BY_NAME["exponential"].fit(SHARES, planted(SHARES)))
    assert best == pytest.approx(true, abs=0.01)
    assert best.sum() == pytest.approx(1)


def test_shares_that_no_run_has_are_not_searched():
    losses = np.exp(SHARES @ np.array([[-1.0, 0.0, 0.5]] * 3).T)  # the first source alone is best
    (best,) = lowest(BY_NAME["linear"].fit(SHARES, losses))
    assert best == pytest.approx([0.9, 0.05, 0.05], abs=2e-3)


def test_a_mixture_is_predicted_from_all_others_and_the_true_law_is_best_at_it():
    losses, law = noisy(SHARES), BY_NAME["exponential"]
    outlier = np.concatenate((1.2 * losses[:1], losses[1:]))
    without = law.fit(SHARES[1:], losses[1:]).losses(SHARES[:1])[0, 0]
    assert left_out(law, SHARES, outlier)[0] == pytest.approx(without, rel=1e-4)
    errors = {
        law.name: np.square(np.log(left_out(law, SHARES, losses) / losses)).mean()
        for law in laws_for(SHARES)
    }
    assert min(errors, key=lambda name: errors[name]) == "exponential"


def test_a_share_of_nothing_has_no_logarithm_and_few_mixtures_no_law_of_many_parameters():
    names = {law.name for law in laws_for(np.concatenate((SHARES, np.eye(3))))}
    assert names == {"linear", "quadratic", "exponential"}
    assert {law.name for law in laws_for(SHARES[:6])} == {"linear", "power", "exponential"}


@pytest.mark.slow  # 40 drawn studies
def test_intervals_of_drawn_studies_hold_the_best_shares():
    law, (true,) = (
        BY_NAME["exponential"],
        lowest(BY_NAME["exponential"].fit(SHARES, planted(SHARES))),
    )
    inside, tails = [], (0.03, 0.97)  # as for Student's t of 12 degrees of freedom, 90 %
    for seed in range(40):
        drawn = drawn_losses(law, SHARES, noisy(SHARES, 0.006, seed), 200, 0)
        low, high = np.quantile(lowest(law.fit(SHARES, drawn)), tails, axis=0)
        inside.append((low - 1e-3 <= true) & (true <= high + 1e-3))
    assert 0.8 < np.mean(inside) <= 1
    assert (high - low).max() < 0.2, "and tell something"


def test_shares_are_rounded_to_four_decimals_that_sum_to_one():
    shares = rounded_shares({"a": 1, "b": 1, "c": 1})
    assert shares == {"a": 0.3334, "b": 0.3333, "c": 0.3333}
