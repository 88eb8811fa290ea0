"""Refits in one batch equal the same fits one by one; intervals cover the truth.

The coverage is measured in test_recovery.py.
"""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from forescale.ground.errors import UserError
from forescale.scaling.fitting import bootstrap
from forescale.scaling.fitting.bootstrap import (
    clusters,
    corrected,
    counts,
    influence,
    leave_one_out,
    pairs,
    replicates,
)
from forescale.scaling.fitting.fit import fit
from forescale.scaling.fitting.laws import CHINCHILLA, compute_optimal
from forescale.scaling.fitting.objective import LEAST_ABSOLUTE, LEAST_SQUARES, Objective
from forescale.scaling.fitting.points import Points
from tests.trainer.scaling.some_laws import BASE, sizes


@pytest.mark.parametrize("goal", [Objective(), LEAST_ABSOLUTE, LEAST_SQUARES], ids=str)
def test_a_replicate_equals_the_fit_of_its_resampled_runs(goal, make):
    points = make(CHINCHILLA, BASE, noise=0.003)
    one = fit(CHINCHILLA, points, goal)
    w = np.random.default_rng(1).multinomial(60, np.full(60, 1 / 60), size=6)
    refits = replicates(one, weights=w)
    assert refits.solved.is_minimum.all()
    for i in range(6):
        alone = fit(CHINCHILLA, points.take(np.repeat(np.arange(60), w[i])), goal)
        assert refits.solved.value[i] <= alone.value * (1 + 1e-9)
        np.testing.assert_allclose(refits.values[i], alone.vector, rtol=1e-6)


def test_draws_have_the_moments_of_the_multinomial_distribution():
    drawn = counts(np.random.default_rng(2), 5, 20_000)
    assert (drawn.sum(1) == 5).all()
    np.testing.assert_allclose(drawn.mean(0), 1, atol=0.03)
    np.testing.assert_allclose(np.cov(drawn.T), np.eye(5) - 1 / 5, atol=0.03)


def test_leave_one_out_and_influence_equal_the_fits_without_a_run(make):
    points = make(CHINCHILLA, BASE, noise=0.003)
    one = fit(CHINCHILLA, points)
    without = fit(CHINCHILLA, points.take(np.arange(60) != 7))
    np.testing.assert_allclose(leave_one_out(one).values[7], without.vector, rtol=1e-7)
    np.testing.assert_allclose(influence(one)[7], one.vector - without.vector, atol=1e-5)
    loss = points.loss.copy()
    loss[11] *= 1.05
    runs = dict(parameters=points.parameters, tokens=points.tokens)
    spoilt = fit(CHINCHILLA, Points(loss, **runs), LEAST_SQUARES)
    assert np.abs(influence(spoilt) / spoilt.vector).max(1).argmax() == 11


# Optima of least absolute deviations jump between runs; a step shows what they do in the mean.
@pytest.mark.parametrize(
    ("goal", "off"), [(Objective(), 0.01), (LEAST_SQUARES, 0.01), (LEAST_ABSOLUTE, 0.3)], ids=str
)
def test_many_runs_are_left_out_by_a_step_that_is_near_their_refit(goal, off, make, monkeypatch):
    one = fit(CHINCHILLA, make(CHINCHILLA, BASE, noise=0.003, **sizes(1500)), goal)
    stepped = influence(one)
    some = np.arange(0, 1500, 100)
    w = np.ones((len(some), 1500))
    w[np.arange(len(some)), some] = 0
    refits = one.vector - replicates(one, weights=w).values
    errors = pairs(one, 40).values.std(0)
    assert np.abs((stepped[some] - refits) / errors).max() < off
    assert np.abs(refits / errors).max() > 0.03


def test_many_groups_are_left_out_by_a_step(make, monkeypatch):
    one = fit(CHINCHILLA, make(CHINCHILLA, BASE, noise=0.003, **sizes(400)))
    replicates = clusters(one, np.arange(400) // 2, 100)
    monkeypatch.setattr(bootstrap, "_REFITS", 100)
    stepped = replace(replicates).without
    off = np.abs(stepped - replicates.fit.vector).max(0)
    monkeypatch.undo()
    assert (np.abs(stepped - replicates.without).max(0) < 0.1 * off).all()


def test_replicates_made_in_parts_are_the_same(make, monkeypatch):
    one = fit(CHINCHILLA, make(CHINCHILLA, BASE, noise=0.003))
    whole = pairs(one, 50), leave_one_out(one)
    monkeypatch.setattr(bootstrap, "_WEIGHTS", 60 * 7)
    for before, after in zip(whole, (pairs(one, 50), leave_one_out(one)), strict=True):
        np.testing.assert_allclose(after.values, before.values, rtol=1e-9)


def test_a_tenth_of_a_million_runs_need_little_memory(make):
    """Their leave-one-out weights alone would be 80 GB."""
    one = fit(CHINCHILLA, make(CHINCHILLA, BASE, noise=0.003, **sizes(100_000)), LEAST_SQUARES)
    tracemalloc.start()
    replicates = pairs(one, 3)
    assert influence(one).shape == replicates.without.shape == (100_000, 5)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 500e6


@pytest.mark.parametrize("seed", range(3))
def test_few_noisy_runs_leave_no_replicate_without_a_minimum(seed, make):
    """Their terms fade, or become logarithms: long valleys of the objective."""
    one = fit(CHINCHILLA, make(CHINCHILLA, BASE, noise=0.02, seed=seed, **sizes(16, seed)))
    assert one.certificate.failed_starts == 0
    assert pairs(one, 100).uncertified == 0


def test_branches_of_a_trunk_are_drawn_together(make):
    """Four branches with the same error give the standard error of one."""
    points = make(CHINCHILLA, BASE, noise=0.003)
    many = points.take(np.repeat(np.arange(60), 4))
    trunk = np.repeat([f"trunk {i}" for i in range(60)], 4)
    one = fit(CHINCHILLA, many)
    narrow, wide = pairs(one, 300), clusters(one, trunk, 300)
    truth = pairs(fit(CHINCHILLA, points), 300)
    assert wide.errors["alpha"] == pytest.approx(truth.errors["alpha"], rel=0.25)
    assert narrow.errors["alpha"] < 0.65 * wide.errors["alpha"]


def test_intervals_of_parameters_and_of_functions_of_them(make):
    replicates = pairs(fit(CHINCHILLA, make(CHINCHILLA, BASE, noise=0.003)), 400)
    assert replicates.uncertified == 0
    low, high = replicates.interval()
    assert (low < replicates.fit.vector).all()
    assert (replicates.fit.vector < high).all()
    narrow = replicates.interval(0.5)
    assert (narrow[0] > low).all()
    sizes = replicates.interval(of=lambda v: compute_optimal(CHINCHILLA, v, [1e22, 1e24])[0])
    best = compute_optimal(CHINCHILLA, replicates.fit.values, [1e22, 1e24])[0]
    assert ((sizes[0] < best) & (best < sizes[1])).all()
    again = pairs(replicates.fit, 400)
    assert (again.values == replicates.values).all()


def test_bias_and_skewness_are_corrected_as_in_scipy():
    """For the mean and the variance of skewed numbers, from the same draws."""
    x = np.random.default_rng(3).exponential(size=25)
    for statistic in (np.mean, np.var):
        expected = stats.bootstrap((x,), statistic, confidence_level=0.9, method="BCa", rng=4)
        draws = expected.bootstrap_distribution[:, None]
        without = np.array([[statistic(np.delete(x, i))] for i in range(25)])
        ends = corrected(draws, np.array([[statistic(x)]]), without, np.array([0.05, 0.95]))
        np.testing.assert_allclose(ends[:, 0], expected.confidence_interval)


def test_few_groups_widen_an_interval(make):
    """Student's t of five groups against that of sixty runs, with the same draws."""
    replicates = pairs(fit(CHINCHILLA, make(CHINCHILLA, BASE, noise=0.003)), 1000)
    few = replace(replicates, groups=np.arange(60) % 5)
    widths = [np.diff(each.interval(0.9), axis=0) for each in (few, replicates)]
    assert (widths[0] > 1.2 * widths[1]).all()
    assert few.without.shape == (0, 5)  # four groups don't determine five parameters
    low, high = few.interval(0.9, lambda v: CHINCHILLA.predict(v, parameters=1e9, tokens=2e10))
    assert low < high


def test_draws_at_an_end_of_the_range_do_not_count_as_bias(make):
    """E is absent from the fit and most draws: low is still at most high."""
    runs = make(CHINCHILLA, BASE)
    loss = CHINCHILLA.predict(BASE | {"E": 1e-9}, parameters=runs.parameters, tokens=runs.tokens)
    off = np.exp(0.003 * np.random.default_rng(7).standard_normal(60))
    replicates = pairs(fit(CHINCHILLA, Points(loss * off, runs.parameters, runs.tokens)), 200)
    low, high = replicates.interval(0.9)
    assert np.isfinite([low, high]).all()
    assert (low <= high).all()


def test_invalid_draws_are_refused_and_failed_replicates_are_counted(make):
    one = fit(CHINCHILLA, make(CHINCHILLA, BASE, noise=0.003))
    with pytest.raises(UserError, match="60 runs in 1 groups"):
        clusters(one, ["trunk"] * 60)
    with pytest.raises(UserError, match="give \\(replicates, 60\\)"):
        replicates(one, weights=np.ones(60))
    with pytest.raises(UserError, match="between 0 and 1"):
        pairs(one, 4).interval(95)
    few = np.zeros((2, 60))
    few[0] = 1
    few[1, :3] = 1  # three runs don't determine five parameters
    assert replicates(one, weights=few).solved.is_minimum.tolist() == [True, False]
