"""Backtests of a task's metric: what an origin knows, the rivals, and the scores."""

import json

import numpy as np
import pandas as pd
import pytest

from forescale.errors import UserError
from forescale.scaling.config import StudyJob
from forescale.scaling.tasks.judge import (
    LAST,
    LINE,
    TWO_STEPS,
    as_dict,
    forecasts,
    forecasts_of,
    ladder,
    scores,
)
from tests.trainer.scaling.analysis.test_task_fit import table

JOB = StudyJob(input=["none"])


@pytest.fixture(scope="module")
def runs():
    """A ladder whose compute spans five budgets of half a decade."""
    return table(noise=0.001)


@pytest.fixture(scope="module")
def rows(runs):
    return forecasts(ladder(runs, JOB, "mine"), JOB)


def test_runs_of_half_a_decade_are_one_budget_if_the_table_names_none(runs):
    found = ladder(runs, JOB, "mine")
    assert np.abs(np.log10(found.flops / found.budgets)).max() <= 0.25 + 1e-9
    named = ladder(runs.assign(budget=np.repeat([1e18, 2e18, 4e18, 8e18], 4)), JOB, "mine")
    assert np.unique(named.budgets).tolist() == [1e18, 2e18, 4e18, 8e18]


def test_nothing_beyond_an_origin_changes_a_forecast(runs, rows):
    made = ladder(runs, JOB, "mine")
    first = rows["origin"].min()
    beyond = made.budgets > np.unique(made.budgets)[first - 1]
    moved = runs.assign(outcome=np.where(beyond, runs.outcome / 2, runs.outcome))
    again = forecasts(ladder(moved, JOB, "mine"), JOB)
    pair = [found.loc[found["origin"] == first, "predicted"].tolist() for found in (rows, again)]
    assert pair[0] == pair[1]


def test_the_rivals_are_the_line_of_the_last_three_budgets_and_the_last_value(runs, rows):
    made = ladder(runs, JOB, "mine")
    distinct = np.unique(made.budgets)
    k = int(rows["origin"].min())
    best = [runs[made.budgets == c]["loss"].idxmin() for c in distinct]
    x, y = np.log(made.flops[best]), runs["outcome"].to_numpy()[best]
    line = np.polyval(np.polyfit(x[k - 3 : k], y[k - 3 : k], 1), x[k])
    own = rows[(rows["origin"] == k) & (rows["ahead"] == 1) & (rows["group"] == "best")]
    found = own.set_index("method")
    assert found.loc[LINE, "predicted"] == pytest.approx(line)
    assert found.loc[LAST, "predicted"] == pytest.approx(y[k - 1])
    assert found.loc[TWO_STEPS, "observed"] == pytest.approx(y[k])


def test_where_runs_follow_a_law_and_a_link_two_steps_are_nearest(rows):
    found = {(s.method, s.ahead): s for s in scores(rows) if s.table is None}
    two = found[TWO_STEPS, 1]
    assert two.median < 0.01
    assert two.skill[LAST] > 0.5
    assert two.skill[LINE] > 0
    assert found[LINE, 1].coverage == {}
    assert two.coverage["best"].outer >= 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign(budget=1e18), "has 1 budgets with the metric, too few for a backtest"),
        (lambda t: t.assign(outcome=np.nan), "no run has a finite loss and the metric"),
        (lambda t: t.drop(columns="tokens"), "there is no column 'tokens'"),
    ],
)
def test_what_cannot_be_judged_is_refused_with_a_sentence(runs, change, message):
    with pytest.raises(UserError) as refused:
        ladder(change(runs), JOB, "mine")
    assert message in str(refused.value)


def test_a_metric_without_a_tie_to_the_loss_has_no_backtest(runs):
    rng = np.random.default_rng(0)
    noisy = runs.assign(outcome=0.25 + 0.01 * rng.standard_normal(len(runs)))
    with pytest.raises(UserError, match="at no origin do the runs determine a law and a link"):
        forecasts(ladder(noisy, JOB, "mine"), JOB)


def flat(runs):
    """The runs of four budgets, so of one origin, with one metric."""
    budgets = ladder(runs, JOB, "mine").budgets
    return runs[budgets <= np.unique(budgets)[3]].assign(outcome=0.25)


def test_a_table_whose_metric_is_flat_is_named_and_the_others_are_scored(
    runs, rows, tmp_path, monkeypatch, forescale
):
    monkeypatch.chdir(tmp_path)
    runs.to_csv("good.csv", index=False)
    flat(runs).to_csv("flat.csv", index=False)
    own = ("study", "backtest", "flat.csv", "good.csv", "task=outcome")
    code, out, err = forescale(*own, "--json")
    assert code == 0
    assert "Note: flat is left out: at no origin do the runs determine a law and a link" in err
    assert "(the metric is 0.25 in all 6 rows: the data can't tell how it changes " in err
    found = json.loads(out)["scores"]
    assert {one["table"] for one in found} == {None, "good"}
    assert found == as_dict(scores(rows.assign(table="good")))["scores"]


def test_if_no_table_can_be_judged_the_reason_of_the_first_is_said(runs):
    few = ladder(flat(runs), JOB, "few")
    with pytest.raises(UserError, match="input: none of 2 tables can be judged; the first: at no"):
        forecasts_of([few, few], JOB)
    with pytest.raises(UserError, match="few: at no origin"):
        forecasts_of([few], JOB)


@pytest.mark.slow  # a law at each of 25 origins
def test_on_public_tables_the_two_steps_beat_the_line_and_the_last_value(published):
    """The runs of Gadre et al. 2024 on three training sets: the mean error rate of their tasks."""
    rows = pd.read_csv(published / "gadre2024" / "gadre_104_models.csv")
    job = StudyJob(input=["none"], metric="error")
    own = {"parameters": rows["N"], "tokens": rows["D"], "loss": rows["loss_c4_val"]}
    runs = pd.DataFrame({**own, "outcome": 1 - rows["err_avg_subset"]}).astype(float)
    each = [ladder(part, job, name) for name, part in runs.groupby(rows["dataset"])]
    made = pd.concat([forecasts(one, job) for one in each])
    found = {(s.method, s.ahead): s for s in scores(made) if s.table is None}
    for ahead in (1, 2):
        two = found[TWO_STEPS, ahead]
        assert two.median < min(found[LINE, ahead].median, found[LAST, ahead].median)
        assert two.coverage["best"].outer > 0.75
        assert two.coverage["other"].outer > 0.85
