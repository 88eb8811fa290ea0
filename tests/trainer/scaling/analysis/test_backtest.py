"""The judge of forecasts: every method at every origin, with nothing known beyond it."""

import json

import numpy as np
import pandas as pd
import pytest
from scipy.special import stdtrit

from forescale.ground.errors import UserError
from forescale.scaling.analysis.backtest import (
    COMBINED,
    EVEN,
    LAST,
    LAW,
    MINIMA,
    NEAR,
    OTHER,
    RIVALS,
    UNEVEN,
    as_dict,
    finished,
    forecasts,
    scores,
)
from forescale.scaling.config import StudyJob
from forescale.scaling.forecasting.predictor import (
    BANDS,
    ERRORS,
    FRONTIER,
    LINE,
    Predicted,
    band_name,
)
from forescale.scaling.records.tables import of_export
from tests.trainer.scaling.iso_flop_runs import iso_flop_table

BUDGETS = np.geomspace(1e18, 1e20, 5)
QUICK = (COMBINED, LINE, LAST)  # the others fit laws


def table(noise=0.003, budgets=BUDGETS):
    return iso_flop_table(budgets, noise=noise)


def judged(rows, methods=QUICK, **keys):
    """The forecasts of a table."""
    job = StudyJob(**keys)
    return forecasts([finished(rows, job, "mine")], job, methods)


def row(error, **keys):
    """The row of a prediction of this error, with half widths of 1 % (50 %) and 2 % (90 %)."""
    scale = 0.02 / stdtrit(4, 0.95)
    predicted = Predicted(np.array([error]), np.array([scale]), 4).against(np.ones(1))
    inside = {"inside_50": float(abs(error) <= 0.01)}
    return {**keys, **{k: v[0] for k, v in predicted.items()}, **inside}


def test_each_method_forecasts_the_later_budgets_of_every_origin():
    rows = judged(table(), (COMBINED, *RIVALS))
    minima = rows[(rows.group == MINIMA) & (rows.method == LINE)]
    pairs = [(3, "2.5 to 5 times"), (3, "5 to 12 times"), (4, "2.5 to 5 times")]
    assert list(zip(minima.origin, minima.band.map(band_name), strict=True)) == pairs
    runs = rows[(rows.method == COMBINED) & (rows.group != MINIMA)]
    assert set(runs.group) == {NEAR, OTHER}
    assert len(runs) == 6 * len(pairs)
    assert not set(rows[rows.group != MINIMA].method) & set(RIVALS)


@pytest.mark.parametrize(
    "methods",
    [(COMBINED, *RIVALS), pytest.param((LAW,), marks=pytest.mark.slow)],  # a law takes a second
)
def test_losses_beyond_an_origin_change_none_of_its_forecasts(methods):
    """The last two budgets have other losses: at origins before them, errors move by just that."""
    late = np.repeat([False, False, False, False, True, True], 6)
    rows = table(budgets=np.geomspace(1e18, 10**20.5, 6))
    other = rows.assign(loss=rows.loss * np.where(late, 1.2, 1))
    scores = [judged(each, methods, near=None) for each in (rows, other)]
    one, two = (f[f.origin <= 4] for f in scores)
    later = 10 ** (18 + one.origin / 2 - 0.5) * one.beyond
    beyond = (later > 1.1 * 10**19.5).to_numpy()
    assert two.error.to_numpy() == pytest.approx(one.error - beyond * np.log(1.2), abs=1e-12)
    np.testing.assert_array_equal(one.width, two.width)
    assert beyond.sum() > 3


@pytest.mark.slow  # a law at each origin
def test_the_law_of_an_exact_surface_forecasts_it_exactly():
    rows = judged(table(noise=0), (LAW,), near=None)
    assert set(rows.origin) == {3, 4}
    assert rows.error.abs().max() < 2e-3  # the lowest run is a little above the optimum
    assert (rows.width > 0).all()


def test_the_scores_of_given_errors():
    """Two minima and four runs, each with half widths of 1 % (50 %) and 2 % (90 %)."""
    keys = {"table": "t", "family": "t", "kind": EVEN, "band": 1, "beyond": 3.0}
    rows = [
        row(e, **keys, method=COMBINED, origin=k, group=group)
        for k, group, e in [
            (3, MINIMA, 0.005), (4, MINIMA, -0.03),
            (3, NEAR, 0.015), (3, NEAR, 0.0), (3, OTHER, 0.05), (3, OTHER, 0.015),
        ]
    ]  # fmt: skip
    none = dict.fromkeys(ERRORS, np.nan)
    rows += [
        {**none, **keys, "method": LINE, "origin": k, "group": MINIMA, "error": e}
        for k, e in ((3, 0.04), (4, 0.03))
    ]
    predictions = {(s.table, s.method): s for s in scores(pd.DataFrame(rows))}
    level, line = predictions[None, COMBINED], predictions[None, LINE]
    assert (level.count, level.median, level.bias) == pytest.approx((2, 0.0175, -0.0125))
    assert level.interval_score == pytest.approx(0.04 + 20 * 0.01 / 2)
    shares = {g: (c.count, c.inner, c.outer) for g, c in level.coverage.items()}
    assert shares == {MINIMA: (2, 0.5, 0.5), NEAR: (2, 0.5, 1), OTHER: (2, 0, 0.5)}
    assert level.skill == {LINE: pytest.approx(0.5)}
    assert level.skill_interval == {}, "one family of tables tells nothing of others"
    assert (line.interval_score, line.coverage, line.skill) == (None, {}, {})
    assert predictions["t", COMBINED].median == level.median


def test_the_error_of_the_bias_is_that_of_resampled_tables():
    keys = {"method": COMBINED, "kind": EVEN, "band": 1, "beyond": 3.0, "group": MINIMA}
    rng = np.random.default_rng(5)
    each = [rng.normal(0, 0.02) + rng.normal(0, 0.005, n) for n in rng.integers(3, 8, 40)]
    rows = [
        row(e, **keys, table=str(t), family=str(t), origin=k)
        for t, errors in enumerate(each)
        for k, e in enumerate(errors)
    ]
    predictions = {s.table: s for s in scores(pd.DataFrame(rows))}
    drawn = [np.concatenate([each[t] for t in rng.integers(40, size=40)]) for _ in range(2000)]
    resampled = np.std([errors.mean() for errors in drawn])
    assert predictions[None].bias_error == pytest.approx(resampled, rel=0.08)
    assert predictions["0"].bias_error is None


def test_skill_compares_the_origins_that_both_methods_forecast():
    rows = judged(table(), (COMBINED, FRONTIER))
    missing = (rows.method == FRONTIER) & (rows.origin == 3)
    both = rows[(rows.origin == 4) & (rows.group == MINIMA)].set_index("method").error.abs()
    both = both[rows[(rows.origin == 4)].groupby("method").beyond.min().index]
    one = next(s for s in scores(rows[~missing]) if s.method == COMBINED and s.band == 1)
    assert one.skill[FRONTIER] == pytest.approx(1 - both[COMBINED] / both[FRONTIER])


def test_a_rival_is_as_sure_as_its_own_earlier_errors_allow():
    """A line is exact on one half of a table and bends on the other, so that its interval grows."""
    x = np.log10(np.geomspace(1e18, 1e21, 7) / 1e18)
    bends = np.maximum(0, x - 1.5) ** 2
    rows = table(noise=0, budgets=np.geomspace(1e18, 1e21, 7))
    lowest = rows.groupby("budget").loss.transform("min")
    level = np.exp(-0.1 * x + 0.2 * bends)[rows.budget.rank(method="dense").astype(int) - 1]
    scores = judged(rows.assign(loss=rows.loss / lowest * level), (LINE,))
    ahead_rows = scores[scores.band == 1].set_index("origin")
    assert ahead_rows.error[3] == pytest.approx(0, abs=1e-9)
    assert ahead_rows.width[4] < ahead_rows.width[3] < ahead_rows.width[6]


def test_tables_are_scored_together_and_apart():
    job = StudyJob()
    studies = [finished(table(n), job, name) for n, name in ((0.003, "a"), (0.01, "b"))]
    rows = scores(forecasts(studies, job, QUICK))
    counts = [
        (s.table, band_name(s.band), s.count) for s in rows if (s.kind, s.method) == (None, LAST)
    ]
    near, far = "2.5 to 5 times", "5 to 12 times"
    assert counts[:2] == [(None, near, 4), (None, far, 2)]
    assert counts[2:] == [("a", near, 2), ("a", far, 1), ("b", near, 2), ("b", far, 1)]
    assert [s.method for s in rows[:3]] == [COMBINED, LINE, LAST]


def test_a_table_is_even_if_its_lowest_losses_are_near_a_parabola():
    kinds = [finished(table(noise), StudyJob(), "mine").kind for noise in (0.001, 0.02)]
    assert kinds == [EVEN, UNEVEN]
    few = table(0.02, budgets=BUDGETS[:4])
    assert finished(few, StudyJob(), "mine").kind == EVEN, "four budgets tell nothing"


def test_the_scores_for_programs_have_no_nan():
    one = scores(judged(table()))
    assert "NaN" not in json.dumps(as_dict(one))
    assert as_dict(one)["scores"][0]["coverage"][MINIMA]["count"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="budget"), "mine: has no column 'budget'; name the column"),
        (lambda t: t[t.budget < 3e19], "mine: has 3 budgets with a finite loss, too few"),
        (lambda t: t.assign(loss=t.loss.where(t.budget < 3e19)), "has 3 budgets with a finite"),
        (lambda t: t.drop(columns=["tokens", "flops"]), "there is no column 'tokens'"),
    ],
)
def test_a_table_that_cannot_be_judged_is_refused_with_a_sentence(change, message):
    with pytest.raises(UserError) as refused:
        finished(change(table()), StudyJob(), "mine")
    assert message in str(refused.value)


def test_runs_that_diverged_or_that_a_study_does_not_fit_are_left_out():
    rows = table().assign(fitted=np.arange(30) != 7)
    rows.loc[2, "loss"] = np.nan
    usable = finished(rows, StudyJob(), "mine")
    assert usable.points.loss.tolist() == rows.loss.drop([2, 7]).tolist()
    assert usable.budgets.tolist() == rows.budget.drop([2, 7]).tolist()


@pytest.mark.slow  # 311 forecasts of nine tables
def test_combined_forecasts_beat_the_line_at_each_distance_on_public_tables(published):
    paths = sorted((published / "backtest").glob("*.csv"))
    if not paths:
        pytest.skip(f"the tables for backtests are not at {published / 'backtest'}")
    job = StudyJob()
    studies = [finished(of_export(path, {})[0], job, path.stem) for path in paths]
    rows = [s for s in scores(forecasts(studies, job, (COMBINED, LINE))) if s.method == COMBINED]
    pooled = [one for one in rows if one.table is None and BANDS[one.band] < 150]
    assert [one.kind for one in pooled] == [None] * 5 + [EVEN] * 5 + [UNEVEN] * 5
    for one in pooled:
        assert one.skill[LINE] > (0.1 if one.kind == UNEVEN else 0.25)
        assert 0.80 < one.coverage[MINIMA].outer < 0.98
    for one in pooled[5:10]:
        assert one.skill_interval[LINE][0] > 0.15
        assert abs(one.bias) < 0.01
