"""Verdicts of whole campaigns: luck is not called better, and what is promised is found."""

import numpy as np
import pytest

from forescale.trials.verdict import spread, threshold, verdict


def campaign(rng, gains, alpha=0.05, pairs=12):
    """The verdicts of changes with these true gains, tried one after the other."""
    words = list[str]()
    for number, gain in enumerate(gains, 1):
        draws = rng.standard_normal(pairs) * 0.004 + gain
        needed = threshold(alpha, number, words.count("better"))
        words.append(verdict(draws, 0.01, needed, alpha).word)
    return words


def test_a_campaign_of_null_changes_calls_one_better_in_less_than_alpha():
    """Each has its own verdict after each of 12 pairs: 2,000 looks in 200 campaigns."""
    rng = np.random.default_rng(0)
    assert sum("better" in campaign(rng, [0.0] * 6) for _ in range(200)) < 0.05 * 200


def test_planted_gains_are_found_and_null_changes_are_ruled_out():
    rng = np.random.default_rng(1)
    words = [campaign(rng, [0.0, 0.03, 0.0, 0.05, 0.1]) for _ in range(30)]
    for place, word in enumerate(("no better", "better", "no better", "better", "better")):
        assert sum(w[place] == word for w in words) >= 28, place


def test_few_false_ones_are_among_the_better_ones():
    rng, false, all_of_them = np.random.default_rng(2), 0, 0
    for _ in range(60):
        words = campaign(rng, [0.012, 0.0] * 4)
        all_of_them += words.count("better")
        false += words[1::2].count("better")
    assert all_of_them > 100
    assert false / all_of_them < 0.05


def test_the_thresholds_of_all_attempts_together_pay_no_more_than_alpha():
    spent = sum(1 / threshold(0.05, number, 0) for number in range(1, 10_000))
    assert spent == pytest.approx(0.05, rel=1e-3)
    later = threshold(0.05, 5, 2)
    assert later == pytest.approx(threshold(0.05, 5, 0) / 3), "a discovery pays for later ones"


def test_the_verdict_is_that_of_the_first_pair_that_showed_one():
    gains = [0.02, 0.021, 0.019, 0.02]
    early = verdict(gains, 0.01, 40, 0.05)
    assert early.word == "better"
    assert verdict([*gains, -0.5, -0.5], 0.01, 40, 0.05) == early, "later pairs change nothing"
    assert verdict([], 0.01, 40, 0.05).word == "not yet known"


def test_the_spread_of_pairs_is_about_the_mean_of_each_trial():
    rng = np.random.default_rng(5)
    draws = rng.standard_normal((50, 4)) * 0.004 + rng.standard_normal((50, 1))
    assert spread([*draws, []]) == pytest.approx(0.004, rel=0.1)
    assert spread([[0.1], [0.2, 0.3]]) is None
