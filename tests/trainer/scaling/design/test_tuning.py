"""The best learning rate of a sweep, best rates at an edge, and the rule fitted to many sweeps."""

import numpy as np
import pytest

from forescale.scaling.design.shapes import Rule
from forescale.scaling.design.tuning import (
    best_rates,
    interpolated_rate,
    rate_batch_response,
    tuned,
    updated_rule,
)


def test_a_sweep_finds_the_minimum_of_its_parabola():
    rates = [1e-3, 2e-3, 4e-3]
    losses = np.exp(1 + 0.02 * np.log(np.array(rates) / 2.4e-3) ** 2)
    best = tuned(rates, losses)
    assert best.inside
    assert best.learning_rate == pytest.approx(2.4e-3)
    assert best.gap == pytest.approx(0.02 * np.log(1.2) ** 2)


def test_rates_between_two_sizes_are_interpolated_in_logarithms():
    runs = [(100, r, 3.0 + np.log(r / 1e-2) ** 2) for r in (5e-3, 1e-2, 2e-2)]
    runs += [(10_000, r, 2.0 + np.log(r / 1e-3) ** 2) for r in (5e-4, 1e-3, 2e-3)]
    rates, gap = best_rates(runs)
    assert interpolated_rate(rates, 1000) == pytest.approx(10**-2.5, rel=1e-3)
    assert interpolated_rate(rates, 100) == pytest.approx(1e-2, rel=1e-3)
    assert 0 <= gap < 1e-3


@pytest.mark.parametrize(
    ("losses", "rate", "following"),
    [
        ([3.0, 2.9, 2.8], 4e-3, 8e-3),
        ([2.8, 2.9, 3.0], 1e-3, 5e-4),
        ([2.8, 2.9, np.nan], 1e-3, 5e-4),
        # Seen in a study of recipes: the true optimum was far below the lowest rate, and that of
        # the parabola just inside.
        ([2.5515, 2.5559, 2.5823], 1e-3, 5e-4),
        ([2.9, 2.8, 2.9], 2e-3, None),
        ([2.9, 2.8, np.nan], 2e-3, None),  # no parabola through a diverged run
    ],
)
def test_a_best_rate_at_an_edge_gives_the_rate_to_try_next(losses, rate, following):
    best = tuned([1e-3, 2e-3, 4e-3], losses)
    assert best.learning_rate == pytest.approx(rate)
    assert (best.inside, best.gap) == (following is None, pytest.approx(0, abs=1e-9))
    assert best.next_rate(2.0) == following


def test_the_parabola_uses_only_the_best_rate_and_its_neighbours():
    """Far from the optimum the loss is no parabola."""
    best = tuned([4e-3, 1e-3, 2e-3, 64e-3], [2.8, 2.9, 2.8, 9.0])
    assert best.inside
    assert best.learning_rate == pytest.approx(np.sqrt(2e-3 * 4e-3), rel=0.2)


def test_one_sweep_moves_the_rules_level_and_many_its_exponents():
    rule = Rule()
    once = updated_rule(rule, [(2e4, 1e6, 0.02)])
    assert once.learning_rate(2e4, 1e6) == pytest.approx(0.02)
    assert once.learning_rate(4e4, 1e6) == pytest.approx(0.02), "one sweep gives no exponent"
    sizes = np.geomspace(1e4, 1e6, 12)
    many = updated_rule(rule, [(n, 20 * n, 0.02 * (n / 1e5) ** -0.4) for n in sizes])
    assert many.learning_rate(1e6, 2e7) == pytest.approx(0.02 * 10**-0.4, rel=0.1)
    assert many.learning_rate(1e12, 1) <= 2 * 0.02 * 10**0.4, "never far above the tried rates"
    within = updated_rule(rule, [(1e8, 1e10, 1e-3)])
    assert within.rate[1:] == rule.rate[1:], "the rule keeps its exponents in its own range"
    assert updated_rule(rule, []) is rule


SWEEP = [(rate, batch) for rate in (1e-3, 2e-3, 4e-3) for batch in (8, 16, 32)]
AT = tuple(zip(*SWEEP, strict=True))


def bowl(rate, batch, best=(2.3e-3, 14.0)):
    """A loss whose best learning rate rises with the batch."""
    a, b = np.log(rate / best[0]), np.log(batch / best[1])
    return float(2.5 * np.exp(0.02 * a * a + 0.01 * b * b - 0.01 * a * b))


def test_a_joint_sweep_finds_the_minimum_of_its_surface():
    best = rate_batch_response(*AT, [bowl(*at) for at in SWEEP])
    assert best.inside
    assert (best.learning_rate, best.batch) == (pytest.approx(2.3e-3), pytest.approx(14.0))
    assert best.gap == pytest.approx(np.log(bowl(2e-3, 16) / 2.5), rel=1e-6)


def test_a_best_run_at_the_edge_of_a_joint_sweep_is_no_optimum():
    """At the edge in the batch, or in both."""
    high = rate_batch_response(*AT, [bowl(*at, best=(2e-3, 100.0)) for at in SWEEP])
    assert (high.inside, high.edges, high.batch) == (False, ("batch",), 32)
    both = rate_batch_response(*AT, [bowl(*at, best=(1e-1, 1.0)) for at in SWEEP])
    assert both.edges == ("learning rate", "batch")


def test_batches_at_one_rate_give_a_parabola():
    line = [at for at in SWEEP if at[0] == 2e-3]
    best = rate_batch_response(*zip(*line, strict=True), [bowl(*at) for at in line])
    assert (best.learning_rate, best.inside) == (2e-3, True)
    assert 8 < best.batch < 32
    two = rate_batch_response(*zip(*line[:2], strict=True), [2.0, 2.1])
    assert (two.inside, two.edges) == (False, ("batch",))


def test_a_joint_sweep_may_have_diverged_runs():
    losses = [np.nan if at == (4e-3, 8) else bowl(*at) for at in SWEEP]
    best = rate_batch_response(*AT, losses)
    assert best.learning_rate == pytest.approx(2.3e-3)
