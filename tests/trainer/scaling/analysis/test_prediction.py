"""What predicts the loss of a target, and how sure it is."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from forescale.config.compose import compose
from forescale.ground.errors import UserError
from forescale.scaling.analysis import backtest
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.forecasting.predictor import band_name
from tests.trainer.scaling.analysis.test_forecast import loss_of, study, table


@pytest.fixture(scope="module")
def by_combination() -> StudyFit:
    return study()


@pytest.fixture(scope="module")
def by_law(by_combination) -> StudyFit:
    return study("method=law")


def half(ends) -> float:
    return float(np.diff(np.log(ends))[0]) / 2


def test_a_run_beyond_the_budgets_is_predicted_by_their_combination(by_combination, by_law):
    target = TargetPoint(parameters=5e9, tokens=1e11)
    one, other = by_combination.predict(target), by_law.predict(target)
    f = by_combination.forecaster
    run = {"parameters": np.array([5e9]), "tokens": np.array([1e11])}
    (loss,) = f.of_runs(run, np.array([3e21]), 6 * 5e9 * 1e11).loss
    assert (one.method, other.method) == ("combined", "law")
    assert one.loss == pytest.approx(loss, rel=1e-9)
    assert one.law == other.loss == other.law
    assert by_combination.fit.values == by_law.fit.values, "the law is the same"
    assert one.loss == pytest.approx(loss_of(5e9, 1e11), rel=0.02)
    losses, weights = zip(*one.parts.values(), strict=True)
    assert (list(one.parts), other.parts) == (["level", "straight", "law"], {})
    assert sum(weights) == pytest.approx(1)
    assert np.dot(weights, np.log(losses)) == pytest.approx(np.log(one.loss))


def test_a_run_within_the_budgets_is_predicted_by_the_law(by_combination, by_law):
    target = TargetPoint(parameters=1e9, tokens=5e10)
    assert by_combination.predict(target) == by_law.predict(target)
    assert by_combination.predict(target).method == "law"


def test_runs_that_share_no_budgets_are_predicted_by_the_law():
    rows = table().drop(columns="budget")
    rows["flops"] *= np.geomspace(1, 3, len(rows))
    rows["tokens"] *= np.geomspace(1, 3, len(rows))
    assert study(rows=rows).predict(TargetPoint(flops=3e21)).method == "law"
    with pytest.raises(UserError, match="combined is not possible: the table has no column"):
        study("method=combined", rows=rows).predict(TargetPoint(flops=3e21))
    few = table().groupby("budget").head(2)
    with pytest.raises(UserError, match="fewer than 3 budgets have 3 sizes"):
        study("method=combined", rows=few).predict(TargetPoint(flops=3e21))


def test_a_study_is_judged_by_the_forecasters_that_predict_its_target(by_combination, monkeypatch):
    """They forecast the origins as those that are made anew without the last budget."""
    anew = backtest.earlier(by_combination.table, by_combination.job, "combined")
    monkeypatch.setattr(backtest, "forecasters", None)
    pd.testing.assert_frame_equal(by_combination.earlier, anew)


def test_budgets_that_the_compute_of_the_runs_shows_are_taken(by_combination):
    one = study(rows=table().drop(columns="budget"))
    assert one.predict(TargetPoint(flops=3e21)).method == "combined"
    assert any("falls into 4 groups" in note for note in one.notes)
    assert one.fit.values == pytest.approx(by_combination.fit.values)


@pytest.mark.parametrize("of", ["by_combination", "by_law"])
def test_the_doubt_grows_with_the_distance_in_compute_and_off_the_optimum(of, request):
    """A model of 1e12 parameters on 1e9 tokens isn't known within some percent."""
    fit = request.getfixturevalue(of)
    near, further = (fit.predict(TargetPoint(flops=c)) for c in (2e21, 2e22))
    assert half(near.outer) < 0.7 * half(further.outer)
    best = fit.predict(TargetPoint(flops=6e21))
    odd = fit.predict(TargetPoint(parameters=1e12, tokens=1e9))
    assert half(odd.outer) > 3 * half(best.outer)
    assert half(odd.outer) > 0.05


def test_far_beyond_the_runs_a_prediction_is_made_when_it_is_asked_for(by_combination):
    far = TargetPoint(flops=2.26e23)
    with pytest.raises(UserError, match=r"226 times the compute.*target\.far=true"):
        by_combination.predict(far)
    one = by_combination.predict(replace(far, far=True))
    assert one.extrapolation_factor == pytest.approx(226)
    assert half(one.outer) > 0.04


def test_the_best_sizes_of_a_compute_have_intervals(by_combination):
    one = by_combination.predict(TargetPoint(flops=3e21))
    (low_n, high_n), (low_d, high_d) = one.sizes
    assert low_n < one.parameters < high_n
    assert low_d < one.tokens < high_d
    assert low_n * high_d * 6 == pytest.approx(3e21, rel=0.01)
    assert by_combination.predict(TargetPoint(parameters=1e9, tokens=1e12)).sizes is None


def test_a_fit_knows_how_well_such_predictions_did(by_combination, by_law):
    """At the only origin of four budgets, the first three."""
    for fit, method in ((by_combination, "combined"), (by_law, "law")):
        scores = [one for one in fit.skill if one.method == method and one.table is None]
        assert [(band_name(one.band), one.count) for one in scores] == [("5 to 12 times", 1)]
    rows = table()
    assert study(rows=rows[rows.budget < 5e20]).skill == []
    assert compose(StudyJob, ["input=[x]"]).method == "auto"
