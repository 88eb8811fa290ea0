"""Backtests: the error of a law beyond its runs, and intervals that are calibrated with it."""

import numpy as np
import pytest

from forescale.ground.errors import UserError
from forescale.scaling.fitting.laws import CHINCHILLA
from forescale.scaling.fitting.objective import Objective
from forescale.scaling.fitting.points import Points
from forescale.scaling.forecasting.calibrated import backtests, fit_calibrated, laws_of_origins
from forescale.scaling.forecasting.predictor import BELIEF, PRIOR, Discrepancy
from forescale.scaling.records.records import points
from forescale.scaling.records.tables import of_export
from tests.trainer.scaling.iso_flop_runs import iso_flop_runs

BUDGETS = np.geomspace(1e18, 1e21, 7)


def surface(noise=0.0, bend=0.0, seed=0):
    """IsoFLOP runs of a law; bend: deviation of log loss from the law, per decade from 1e19 on."""
    runs, c = iso_flop_runs(BUDGETS, noise=noise, seed=seed)
    off = np.exp(bend * np.maximum(0, np.log10(c / 1e18) - 1))
    return Points(runs.loss * off, runs.parameters, runs.tokens, runs.flops), c


def test_a_law_without_noise_is_predicted_almost_exactly():
    for origin in backtests(CHINCHILLA, *surface(), Objective(1e-3), 0.9):
        assert np.abs(origin.errors).max() < 1e-6
        assert origin.inside_calibrated.all()


def test_origins_are_the_budgets_whose_runs_determine_the_law():
    origins = backtests(CHINCHILLA, *surface(0.003), Objective(1e-3), 0.9)
    assert [r.budgets for r in origins] == [3, 4, 5, 6]
    assert [r.runs for r in origins] == [18, 24, 30, 36]
    first = origins[0].factors
    assert first.min() == pytest.approx(10**0.5)
    assert first.max() == pytest.approx(100)


def test_the_prior_counts_as_three_origins():
    assert Discrepancy().after([]).per_decade == PRIOR
    assert Discrepancy().after([]).is_prior
    assert Discrepancy().after([PRIOR] * 5).per_decade == pytest.approx(PRIOR)
    none = Discrepancy().after([0.0] * BELIEF)
    assert none.per_decade == pytest.approx(PRIOR / 2**0.5)
    assert not none.is_prior


def test_calibrated_intervals_cover_a_deviation_from_the_law():
    """4 % per decade that the law doesn't have: intervals of resampling alone miss it."""
    origins = backtests(CHINCHILLA, *surface(0.003, bend=0.04), Objective(1e-3), 0.9)
    bare = np.concatenate([r.inside_resampled for r in origins]).mean()
    calibrated = np.concatenate([r.inside_calibrated for r in origins]).mean()
    assert bare <= 0.5 < 0.85 < calibrated


def test_an_origin_is_calibrated_by_nothing_beyond_it():
    """Its discrepancy is the same, whatever losses the later budgets have."""
    runs, budgets = surface(0.003, bend=0.05)
    other = Points(runs.loss * np.where(budgets > BUDGETS[4] * 1.01, 2, 1), runs.parameters,
                   runs.tokens, runs.flops)  # fmt: skip
    origins = [
        {k: law.discrepancy for k, law in laws_of_origins(CHINCHILLA, p, budgets, Objective(), 10)}
        for p in (runs, other)
    ]
    assert [origins[0][k] for k in (3, 4, 5)] == [origins[1][k] for k in (3, 4, 5)]
    assert origins[0][6] != origins[1][6]


def test_intervals_widen_with_the_extrapolation_factor_and_the_level():
    runs, _ = surface(0.003)
    law = fit_calibrated(CHINCHILLA, runs, Objective(1e-3), 200, 0, Discrepancy())
    flops = np.array([1e21, 1e22, 1e23])
    n = 0.1 * flops**0.5
    columns = {"parameters": n, "tokens": flops / 6 / n}
    widths = {}
    for level in (0.5, 0.9):
        low, high = law.predicted(columns, flops).interval(level)
        assert (low < law.fit.predict(**columns)).all()
        widths[level] = np.log(high / low)
        assert (np.diff(widths[level]) > 0).all()
    assert (widths[0.5] < widths[0.9]).all()


def test_the_noise_of_a_run_is_estimated_from_the_residuals():
    runs, _ = surface(0.01, seed=3)
    law = fit_calibrated(CHINCHILLA, runs, Objective(1e-3), 100, 0, Discrepancy())
    assert law.noise == pytest.approx(0.01, rel=0.4)


def test_too_few_runs_are_no_origin():
    runs, budgets = surface(0.003)
    few = np.isin(np.arange(len(budgets)) % 6, [2])  # one per budget
    origins = backtests(CHINCHILLA, runs.take(few), budgets[few], Objective(), 0.9, count=20)
    assert [r.budgets for r in origins] == [5, 6]
    three = runs.take(few).take([0, 1, 2])
    with pytest.raises(UserError, match="don't determine"):
        fit_calibrated(CHINCHILLA, three, Objective(), 100, 0, Discrepancy())


def test_backtests_of_public_runs(published):
    """Llama 3's isoFLOP points, digitised. The law predicts too high a loss at larger factors, and
    resampling alone doesn't cover it."""
    names = {"parameters": "params"}
    rows = {"experiment": "llama_3__raw_loss"}
    table, _ = of_export(published / "llama3_isoflops" / "llama_3.csv", names, rows)
    runs = points(table, "total", "causal", "llama 3")
    origins = backtests(CHINCHILLA, runs, table["budget"].to_numpy(), Objective(1e-3), 0.9)
    assert len(origins) >= 5
    bare = np.concatenate([r.inside_resampled for r in origins]).mean()
    calibrated = np.concatenate([r.inside_calibrated for r in origins]).mean()
    assert bare < 0.4
    assert calibrated > 0.85
    assert max(np.abs(r.errors[r.factors < 5]).max() for r in origins) < 0.05
