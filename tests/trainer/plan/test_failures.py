"""The closed forms of failures, compared with a simulation and with published numbers."""

import random

import pytest

from forescale.config.compose import compose
from forescale.plan.config import PlanConfig, PlanJob
from forescale.plan.failures import estimate_failures, ettr, mtbf


def simulated(interval, stall, restart, mean, work=400_000, seed=1):
    """Return seconds of kept training per second of wall time, with failures drawn one by one."""
    rng, done, wall = random.Random(seed), 0.0, 0.0
    while done < work:
        left = rng.expovariate(1 / mean)
        if left >= interval + stall:
            # the distribution is memoryless: the remaining time is drawn again
            done, wall = done + interval, wall + interval + stall
            continue
        wall += left
        while (again := rng.expovariate(1 / mean)) < restart:
            wall += again
        wall += restart
    return done / wall


@pytest.mark.parametrize(
    ("interval", "stall", "restart", "mean"),
    [(100, 5, 60, 2000), (100, 5, 60, 300), (50, 1, 400, 1000), (300, 20, 30, 500)],
)
def test_ettr_agrees_with_a_simulation(interval, stall, restart, mean):
    ratios = [simulated(interval, stall, restart, mean, seed=s) for s in range(5)]
    assert ettr(interval, stall, restart, mean) == pytest.approx(sum(ratios) / 5, rel=0.03)


def test_the_default_predicts_the_failures_of_llama_3():
    """419 unexpected interruptions in 54 days on 16,384 GPUs, and over 90 % of effective training
    time (arXiv 2407.21783, table 5 and section 3.3.4)."""
    rate = compose(PlanJob, []).plan.failures
    assert rate == PlanConfig().failures
    assert 54 * 86_400 / mtbf(16_384 // 8, rate) == pytest.approx(419, rel=0.01)
    estimate = estimate_failures(2048, rate, stall=1.0, restart=600, interval=600)
    assert 0.9 < estimate.ettr < estimate.best_ettr < 0.96


@pytest.mark.parametrize("nodes", [1, 8, 128, 2048])
def test_the_best_interval_loses_the_least_time(nodes):
    estimate = estimate_failures(nodes, 6.5, stall=5.0, restart=900, interval=1800)
    for factor in (0.5, 0.8, 1.25, 2):
        assert ettr(factor * estimate.best, 5.0, 900, estimate.mtbf) < estimate.best_ettr
    assert estimate.best == pytest.approx(estimate.young, rel=0.05)
    assert estimate.ettr <= estimate.best_ettr


def test_the_shortest_interval_and_a_failure_rate_of_zero():
    assert estimate_failures(2048, 6.5, 1.0, 900, 1800, shortest=500.0).best == 500.0
    assert estimate_failures(8, 0.0, 1.0, 900, 99.0).ettr == pytest.approx(0.99)
    assert ettr(1e7, 1.0, 900, 10.0) == 0.0
