"""Profile intervals: their ends by the statistic, open ends, and coverage."""

import numpy as np
import pytest
from scipy import stats

from forescale.ground.errors import UserError
from forescale.scaling.fitting.bootstrap import pairs
from forescale.scaling.fitting.fit import fit
from forescale.scaling.fitting.laws import CHINCHILLA, FRONTIER, KAPLAN
from forescale.scaling.fitting.objective import LEAST_ABSOLUTE, LEAST_SQUARES, Objective
from forescale.scaling.fitting.points import Points
from forescale.scaling.fitting.profile import profiles
from tests.matrix import FULL
from tests.trainer.scaling.iso_flop_runs import iso_flop_runs

FRONTIER_TRUTH = {"K": 1000.0, "E": 1.7, "gamma": 0.15}


def frontier(noise=0.002, decades=4.0, count=12, seed=0) -> Points:
    """Compute-optimal runs over some decades of C. noise: of log loss."""
    c = np.geomspace(1e18, 1e18 * 10**decades, count)
    loss = FRONTIER.predict(FRONTIER_TRUTH, flops=c)
    return Points(
        loss * np.exp(noise * np.random.default_rng(seed).standard_normal(count)), flops=c
    )


def by_symbol(law, level=0.9):
    return {one.symbol: one for one in profiles(law, level)}


def test_at_the_ends_the_sum_of_squares_has_risen_to_the_quantile_of_f():
    points = frontier()
    law = fit(FRONTIER, points, LEAST_SQUARES)
    limit = stats.f.ppf(0.9, 1, 12 - 3)
    for symbol, one in by_symbol(law).items():
        for end in (one.low, one.high):
            held = fit(FRONTIER, points, LEAST_SQUARES, fixed={symbol: end})
            statistic = (held.value - law.value) / (law.value / (12 - 3))
            assert statistic == pytest.approx(limit, rel=0.02)


def test_intervals_are_near_those_of_resampled_fits_where_runs_determine_the_law():
    points, _ = iso_flop_runs(np.geomspace(1e18, 1e21, 4), noise=0.003, seed=1)
    law = fit(CHINCHILLA, points)
    low, high = pairs(law, 200).interval(0.9)
    intervals = by_symbol(law)
    assert set(intervals) == {"E", "alpha", "beta"}
    for symbol, one in intervals.items():
        i = CHINCHILLA.symbols.index(symbol)
        assert 0.5 < (one.high - one.low) / (high[i] - low[i]) < 2


def test_an_irreducible_loss_that_runs_do_not_determine_is_open_below():
    law = fit(FRONTIER, frontier(noise=0.01, decades=1.0, seed=1), LEAST_SQUARES)
    intervals = by_symbol(law)["E"]
    assert intervals.low is None
    assert FRONTIER_TRUTH["E"] < intervals.high < frontier().loss.max()


def test_weights_that_are_all_doubled_change_nothing():
    points = frontier()
    one, other = (fit(FRONTIER, points, Objective(3e-3), np.full(12, w)) for w in (1.0, 2.0))
    assert by_symbol(one)["E"].low == pytest.approx(by_symbol(other)["E"].low, rel=1e-6)


@pytest.mark.parametrize(
    ("form", "points", "objective", "message"),
    [
        (FRONTIER, frontier(), LEAST_ABSOLUTE, "delta=0: least absolute deviations have no prof"),
        (FRONTIER, frontier(count=3), LEAST_SQUARES, "3 runs leave none to tell the scatter of 3"),
        (KAPLAN, iso_flop_runs((1e18, 1e19, 1e20), noise=0.003)[0], None, "kaplan: is no sum"),
    ],
)
def test_what_has_no_profile_is_refused_with_a_sentence(form, points, objective, message):
    with pytest.raises(UserError) as refused:
        profiles(fit(form, points, objective), 0.9)
    assert message in str(refused.value)


@pytest.mark.slow  # a profile a draw
@pytest.mark.parametrize("delta", [np.inf, 1e-3])
def test_nominal_intervals_cover_the_truth(delta):
    draws = 100 if FULL else 25
    inside = np.zeros(2)
    for seed in range(draws):
        intervals = by_symbol(fit(FRONTIER, frontier(count=16, seed=seed), Objective(delta)))
        for i, (symbol, one) in enumerate(intervals.items()):
            inside[i] += (one.low or 0) <= FRONTIER_TRUTH[symbol] <= (one.high or np.inf)
    assert (inside >= 0.8 * draws).all(), inside


def test_the_command_prints_open_ends(tmp_path, monkeypatch, forescale):
    monkeypatch.chdir(tmp_path)
    points = frontier(noise=0.01, decades=1.0, seed=1)
    lines = [f"{c},{loss}" for c, loss in zip(points.flops, points.loss, strict=True)]
    (tmp_path / "points.csv").write_text("\n".join(["flops,loss", *lines]))
    interval = ("study", "profile", "points.csv", "form=frontier", "delta=null", "bootstraps=100")
    code, out, _ = forescale(*interval)
    assert code == 0
    assert "E is open below: to the end of its range the fit is not clearly worse" in out
