"""Learning rates by trial: the best of a cross, what is at an edge, what is learnt from many."""

import numpy as np
import pytest

from forescale.scaling.design.shapes import Rule
from forescale.scaling.design.tuning import basin, best_rates, between, learnt, tuned


def test_a_cross_finds_its_parabola():
    rates = [1e-3, 2e-3, 4e-3]
    losses = np.exp(1 + 0.02 * np.log(np.array(rates) / 2.4e-3) ** 2)
    found = tuned(rates, losses)
    assert found.inside
    assert found.learning_rate == pytest.approx(2.4e-3)
    assert found.gap == pytest.approx(0.02 * np.log(1.2) ** 2)
    edge = tuned(rates, [3.0, 2.9, 2.8])
    assert (edge.learning_rate, edge.inside) == (4e-3, False)


def test_rates_between_two_sizes_lie_on_a_line_of_logarithms():
    runs = [(100, r, 3.0 + np.log(r / 1e-2) ** 2) for r in (5e-3, 1e-2, 2e-2)]
    runs += [(10_000, r, 2.0 + np.log(r / 1e-3) ** 2) for r in (5e-4, 1e-3, 2e-3)]
    rates, gap = best_rates(runs)
    assert between(rates, 1000) == pytest.approx(10**-2.5, rel=1e-3)
    assert between(rates, 100) == pytest.approx(1e-2, rel=1e-3)
    assert 0 <= gap < 1e-3


def test_an_edge_names_the_rate_to_try_next():
    high = tuned([1e-3, 2e-3, 4e-3], [3.0, 2.9, 2.8])
    assert (high.inside, high.wider(2.0)) == (False, 8e-3)
    low = tuned([1e-3, 2e-3, 4e-3], [2.8, 2.9, 3.0])
    assert low.wider(2.0) == 5e-4
    assert tuned([1e-3, 2e-3, 4e-3], [2.9, 2.8, 2.9]).wider(2.0) is None


def test_of_more_rates_the_best_and_its_neighbours_count():
    """Far off the loss is no parabola."""
    found = tuned([4e-3, 1e-3, 2e-3, 64e-3], [2.8, 2.9, 2.8, 9.0])
    assert found.inside
    assert found.learning_rate == pytest.approx(np.sqrt(2e-3 * 4e-3), rel=0.2)


def test_a_rate_that_diverged_is_worse_than_all():
    found = tuned([1e-3, 2e-3, 4e-3], [2.9, 2.8, np.nan])
    assert (found.learning_rate, found.inside, found.gap) == (2e-3, True, 0.0)
    assert not tuned([1e-3, 2e-3, 4e-3], [2.8, 2.9, np.nan]).inside


def test_a_rule_learns_its_level_at_once_and_its_exponents_from_many():
    rule = Rule()
    once = learnt(rule, [(2e4, 1e6, 0.02)])
    assert once.learning_rate(2e4, 1e6) == pytest.approx(0.02)
    assert once.learning_rate(4e4, 1e6) == pytest.approx(0.02), "no exponent out of one cross"
    sizes = np.geomspace(1e4, 1e6, 12)
    many = learnt(rule, [(n, 20 * n, 0.02 * (n / 1e5) ** -0.4) for n in sizes])
    assert many.learning_rate(1e6, 2e7) == pytest.approx(0.02 * 10**-0.4, rel=0.1)
    assert many.learning_rate(1e12, 1) <= 2 * 0.02 * 10**0.4, "never far above what was tried"
    within = learnt(rule, [(1e8, 1e10, 1e-3)])
    assert within.rate[1:] == rule.rate[1:], "where the rule covers them its exponents stand"
    assert learnt(rule, []) is rule


CROSS = [(rate, batch) for rate in (1e-3, 2e-3, 4e-3) for batch in (8, 16, 32)]


def bowl(rate, batch, best=(2.3e-3, 14.0)):
    """A larger batch wants a larger rate."""
    a, b = np.log(rate / best[0]), np.log(batch / best[1])
    return float(2.5 * np.exp(0.02 * a * a + 0.01 * b * b - 0.01 * a * b))


def test_a_cross_of_rates_and_batches_finds_its_bowl():
    found = basin(*zip(*CROSS, strict=True), [bowl(*at) for at in CROSS])
    assert found.inside
    assert (found.learning_rate, found.batch) == (pytest.approx(2.3e-3), pytest.approx(14.0))
    assert found.gap == pytest.approx(np.log(bowl(2e-3, 16) / 2.5), rel=1e-6)


def test_an_optimum_at_the_edge_of_a_cross_is_none():
    """In the batch, or in both."""
    high = basin(*zip(*CROSS, strict=True), [bowl(*at, best=(2e-3, 100.0)) for at in CROSS])
    assert (high.inside, high.edges, high.batch) == (False, ("batch",), 32)
    both = basin(*zip(*CROSS, strict=True), [bowl(*at, best=(1e-1, 1.0)) for at in CROSS])
    assert both.edges == ("learning rate", "batch")


def test_batches_at_one_rate_are_a_parabola():
    line = [at for at in CROSS if at[0] == 2e-3]
    found = basin(*zip(*line, strict=True), [bowl(*at) for at in line])
    assert (found.learning_rate, found.inside) == (2e-3, True)
    assert 8 < found.batch < 32
    two = basin(*zip(*line[:2], strict=True), [2.0, 2.1])
    assert (two.inside, two.edges) == (False, ("batch",))


def test_a_cross_may_have_runs_that_diverged():
    losses = [np.nan if at == (4e-3, 8) else bowl(*at) for at in CROSS]
    found = basin(*zip(*CROSS, strict=True), losses)
    assert found.learning_rate == pytest.approx(2.3e-3)
