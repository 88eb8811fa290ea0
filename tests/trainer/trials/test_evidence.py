"""Evidence holds its promise at any time, and equals the t statistic's likelihood ratio."""

import math

import numpy as np
import pytest
from scipy.stats import nct
from scipy.stats import t as student

from forescale.trials.evidence import EFFECTS, interval, log_evidence, power


@pytest.mark.parametrize("n", [2, 3, 7, 20])
def test_it_is_the_likelihood_ratio_of_the_t_statistic(n):
    x = np.random.default_rng(n).standard_normal(n) + 0.8
    t = x.mean() / x.std(ddof=1) * math.sqrt(n)
    ratios = [nct.pdf(t, n - 1, d * math.sqrt(n)) / student.pdf(t, n - 1) for d in EFFECTS]
    assert log_evidence(x)[-1] == pytest.approx(math.log(np.mean(ratios)), abs=1e-4)


def test_looking_after_each_pair_calls_at_most_alpha_of_null_changes_better():
    """Also with heavy tails: two runs that differ by their seeds alone have a symmetric gain."""
    rng = np.random.default_rng(0)
    for gains in (rng.standard_normal((800, 30)), rng.standard_t(2, (800, 30))):
        assert (log_evidence(gains) >= math.log(20)).any(axis=1).mean() < 0.05


def test_a_worse_change_is_called_better_less_often_than_a_null_one():
    draws = np.random.default_rng(1).standard_normal((400, 15))
    null, worse = log_evidence(draws), log_evidence(draws - 0.5)
    assert (worse.max(axis=1) <= null.max(axis=1) + 1e-9).mean() > 0.999


def test_units_change_nothing():
    x = np.random.default_rng(2).standard_normal(9) + 0.4
    assert log_evidence(x * 1e-4) == pytest.approx(log_evidence(x))
    assert log_evidence(x * 1e-4, 3e-5) == pytest.approx(log_evidence(x, 0.3))


def test_one_gain_is_no_evidence_and_equal_losses_are_evidence_of_nothing():
    assert log_evidence(np.array([0.3]))[0] == pytest.approx(0, abs=1e-4)
    assert log_evidence(np.zeros(5))[-1] < -1
    assert interval([0.3]) == (-math.inf, math.inf)


def test_the_interval_holds_the_mean_gain_at_every_time_together():
    rng, held = np.random.default_rng(3), 0
    for _ in range(40):
        low, high = interval(rng.standard_normal(10) + 1)
        held += low <= 1 <= high
    assert held >= 32, "nominally 36 or more"


def test_power_says_how_many_pairs_a_gain_takes():
    strong, weak = power(0.02, 0.005, 12, 40), power(0.002, 0.005, 12, 40)
    assert strong.share > 0.99
    assert strong.pairs is not None
    assert strong.pairs <= 5
    assert weak.share < 0.3
    assert weak.pairs is None
