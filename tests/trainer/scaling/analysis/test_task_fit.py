"""Accuracies predicted in two steps: the link, the chained prediction and its interval."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from forescale.ground.errors import UserError
from forescale.scaling.analysis.backtest import Finished, as_dict, finished
from forescale.scaling.analysis.forecast import Forecast, columns_of, score_tasks, task_facts
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.analysis.task_fit import (
    LAST_VALUE,
    LINE,
    TWO_STEPS,
    TaskFit,
    forecasts,
    forecasts_of,
    task_as_dict,
    task_of,
    task_scores,
)
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.fitting.laws import CHINCHILLA
from forescale.scaling.fitting.links import LINKS
from forescale.scaling.fitting.points import spent
from forescale.scaling.report.fit_figures import Figures
from forescale.scaling.report.task_section import forecast_sections, prediction_of, task_section
from tests.matrix import FULL
from tests.trainer.scaling.iso_flop_runs import TRUTH

SIGMOID = {"a": -0.72, "L_0": 2.9, "k": 3.0, "b": 1.0}
TO_ONE = {"c": 0.24, "L_0": 2.5, "k": 3.0}
EXPONENTIAL = {"epsilon": 0.86, "k": 2.2, "gamma": 0.71}
TRUTHS = {"sigmoid-to-1": TO_ONE, "sigmoid": SIGMOID, "exponential": EXPONENTIAL}
NEAR = TargetPoint(parameters=1e9, tokens=5e10)
TARGET = TargetPoint(parameters=4e9, tokens=2e11)


def table(link="sigmoid-to-1", noise=0.0, seed=0) -> pd.DataFrame:
    """A ladder of 16 runs with their loss and accuracy. noise: of log loss and of accuracy."""
    rng = np.random.default_rng(seed)
    n = np.repeat(np.geomspace(1e8, 1e9, 4), 4)
    d = n * np.tile([20.0, 40.0, 100.0, 200.0], 4)
    loss = CHINCHILLA.predict(TRUTH, parameters=n, tokens=d)
    loss *= np.exp(noise * rng.standard_normal(16))
    accuracy = LINKS[link].predict(TRUTHS[link], task_loss=loss) + noise * rng.standard_normal(16)
    return pd.DataFrame({"parameters": n, "tokens": d, "loss": loss, "outcome": accuracy})


def fitted(rows, **keys) -> TaskFit:
    job = StudyJob(input=["none"], **({"bootstraps": 100, "target": TARGET} | keys))
    return TaskFit("arc", StudyFit(rows, job, "mine"), "mine")


def truth(link="sigmoid-to-1") -> tuple[float, float]:
    """The target's loss and accuracy."""
    loss = CHINCHILLA.predict(TRUTH, parameters=TARGET.parameters, tokens=TARGET.tokens)
    return float(loss[0]), float(LINKS[link].predict(TRUTHS[link], task_loss=loss)[0])


@pytest.mark.parametrize("link", TRUTHS)
def test_runs_with_little_noise_give_the_targets_loss_and_accuracy(link):
    task = fitted(table(link, noise=1e-4), link=link)
    assert task.link.values == pytest.approx(TRUTHS[link], rel=0.01)
    loss, accuracy = truth(link)
    assert task.chained.loss.loss == pytest.approx(loss, rel=1e-3)
    assert task.chained.value == pytest.approx(accuracy, rel=1e-3)


def test_a_metric_of_errors_is_one_minus_the_accuracy():
    one, other = (fitted(table(noise=0.003), metric=m) for m in ("accuracy", "error"))
    assert one.chained.value + other.chained.value == pytest.approx(1)
    low, high = one.chained.outer
    assert other.chained.outer == pytest.approx((1 - high, 1 - low))


def test_a_metric_that_is_a_loss_follows_a_power_law_without_an_upper_end():
    rows = table(noise=1e-4)
    task = fitted(rows.assign(outcome=0.6 + 0.3 * rows.loss**1.7), metric="loss")
    assert task.link.values == pytest.approx({"E": 0.6, "K": 0.3, "kappa": 1.7}, rel=1e-3)
    assert task.chained.value == pytest.approx(0.6 + 0.3 * truth()[0] ** 1.7, rel=1e-3)
    low, high = task.chained.outer
    assert 0 < low < task.chained.value < high
    assert not any("gets worse" in doubt for doubt in task.doubts)


def test_an_accuracy_of_0_counts_as_any_other():
    rows = table(noise=1e-4)
    task = fitted(rows.assign(outcome=np.maximum(0.0, rows.outcome - 0.45)))
    assert (task.metric == 0).any()
    assert task.link.certificate.holds
    assert 0 <= task.chained.outer[0] < task.chained.outer[1] <= 1


def test_the_interval_of_a_task_is_wider_than_that_of_its_loss_put_into_the_link():
    """It knows the link's own doubt and the scatter of runs around it."""
    task = fitted(table(noise=0.01), bootstraps=400)
    (low, high), chained = task.chained.loss.outer, task.chained.outer
    through = [float(task.link.predict(task_loss=loss)[0]) for loss in (high, low)]
    assert chained[1] - chained[0] > through[1] - through[0]
    assert chained[0] < task.chained.inner[0] < task.chained.value < chained[1]


def test_checkpoints_are_resampled_with_their_run():
    """Ten equal checkpoints a run know no more than the run itself."""
    rows = table(noise=0.01).assign(name=[f"run-{i}" for i in range(16)])
    many = rows.loc[rows.index.repeat(10)].reset_index(drop=True)
    keys = {"link": "exponential", "bootstraps": 400, "target": TargetPoint()}
    once, often = fitted(rows, **keys), fitted(many, **keys)
    alone = fitted(many.drop(columns="name"), **keys)
    assert often.replicates.errors["gamma"] == pytest.approx(
        once.replicates.errors["gamma"], rel=0.25
    )
    assert alone.replicates.errors["gamma"] < 0.6 * once.replicates.errors["gamma"]


def test_a_link_beyond_the_losses_it_has_seen_is_a_doubt():
    task = fitted(table(noise=0.001))
    assert any("it has seen no loss below" in doubt for doubt in task.doubts)
    within = fitted(table(noise=0.001), target=TargetPoint(parameters=5e8, tokens=2e10))
    assert not any("no loss below" in doubt for doubt in within.doubts)


def test_rows_without_the_metric_count_for_the_loss_alone():
    rows = table(noise=0.001)
    rows.loc[:3, "outcome"] = np.nan
    task = fitted(rows)
    assert (len(task.outcomes), len(task.law.points)) == (12, 16)
    assert "4 rows without a finite loss or without the metric are left out." in task.doubts


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign(outcome=np.nan), "mine: no row has a loss and arc"),
        (lambda t: t.head(2), "2 different runs don't determine the"),
        (lambda t: t.drop(columns="tokens"), "there is no column 'tokens'"),
    ],
)
def test_what_determines_no_task_is_refused_with_a_sentence(change, message):
    with pytest.raises(UserError) as refused:
        fitted(change(table()), link="exponential")
    assert message in str(refused.value)


@pytest.mark.slow  # a ladder a draw
def test_the_interval_of_a_task_covers_new_runs():
    """Nominal 90 %: at four times the compute of the largest run, and within that of the runs. The
    first has the prior for the law's error, which these runs don't have: too wide rather than too
    narrow."""
    n, d, noise, inside = np.array([4e9, 5e8]), np.array([2e11, 2.5e10]), 0.005, []
    link = LINKS["sigmoid-to-1"]
    for seed in range(60 if FULL else 20):
        task = fitted(table(noise=noise, seed=seed), target=TargetPoint())
        low, high = task.curve(task.law.predicted({"parameters": n, "tokens": d}, 6 * n * d)).outer
        off = noise * np.random.default_rng(10_000 + seed).standard_normal((2, 2))
        loss = CHINCHILLA.predict(TRUTH, parameters=n, tokens=d) * np.exp(off[0])
        accuracy = link.predict(TO_ONE, task_loss=loss) + off[1]
        inside.append((low <= accuracy) & (accuracy <= high))
    beyond, within = np.mean(inside, axis=0)
    assert beyond > 0.85
    assert within > (0.8 if FULL else 0.75)


JOB = StudyJob(input=["none"])


def ladder(rows, job=JOB, name="mine") -> Finished:
    """The finished runs of a table with a metric."""
    return finished(rows, job, name, has_metric=True)


@pytest.fixture(scope="module")
def runs():
    """A ladder whose compute spans five budgets of half a decade."""
    return table(noise=0.001)


@pytest.fixture(scope="module")
def rows(runs):
    return forecasts(ladder(runs), JOB)


def test_runs_of_half_a_decade_are_one_budget_if_the_table_names_none(runs):
    task = ladder(runs)
    assert np.abs(np.log10(spent(task.points) / task.budgets)).max() <= 0.25 + 1e-9
    named = ladder(runs.assign(budget=np.repeat([1e18, 2e18, 4e18, 8e18], 4)))
    assert np.unique(named.budgets).tolist() == [1e18, 2e18, 4e18, 8e18]


def test_nothing_beyond_an_origin_changes_a_forecast(runs, rows):
    task = ladder(runs)
    first = rows["origin"].min()
    beyond = task.budgets > np.unique(task.budgets)[first - 1]
    moved = runs.assign(outcome=np.where(beyond, runs.outcome / 2, runs.outcome))
    again = forecasts(ladder(moved), JOB)
    pair = [
        predicted.loc[predicted["origin"] == first, "predicted"].tolist()
        for predicted in (rows, again)
    ]
    assert pair[0] == pair[1]


def test_the_rivals_are_the_line_of_the_last_three_budgets_and_the_last_value(runs, rows):
    task = ladder(runs)
    distinct = np.unique(task.budgets)
    k = int(rows["origin"].min())
    best = [runs[task.budgets == c]["loss"].idxmin() for c in distinct]
    x, y = np.log(spent(task.points)[best]), runs["outcome"].to_numpy()[best]
    line = np.polyval(np.polyfit(x[k - 3 : k], y[k - 3 : k], 1), x[k])
    words = rows[(rows["origin"] == k) & (rows["group"] == "best")]
    words = words[words["beyond"] == words["beyond"].min()]
    predicted = words.set_index("method")
    assert predicted.loc[LINE, "predicted"] == pytest.approx(line)
    assert predicted.loc[LAST_VALUE, "predicted"] == pytest.approx(y[k - 1])
    assert predicted.loc[TWO_STEPS, "observed"] == pytest.approx(y[k])


def test_where_runs_follow_a_law_and_a_link_two_steps_are_nearest(rows):
    task = {(s.method, s.band): s for s in task_scores(rows) if s.table is None}
    band = min(band for _, band in task)
    two = task[TWO_STEPS, band]
    assert two.median < 0.01
    assert two.skill[LAST_VALUE] > 0.5
    assert two.skill[LINE] > 0
    assert task[LINE, band].coverage == {}
    assert two.coverage["best"].outer >= 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign(budget=1e18), "has 1 budgets with the metric, too few for a backtest"),
        (lambda t: t.assign(outcome=np.nan), "no run has a finite loss and the metric"),
    ],
)
def test_what_cannot_be_judged_is_refused_with_a_sentence(runs, change, message):
    with pytest.raises(UserError) as refused:
        ladder(change(runs))
    assert message in str(refused.value)


def test_a_metric_without_a_tie_to_the_loss_has_no_backtest(runs):
    rng = np.random.default_rng(0)
    noisy = runs.assign(outcome=0.25 + 0.01 * rng.standard_normal(len(runs)))
    with pytest.raises(UserError, match="at no origin do the runs determine a law and a link"):
        forecasts(ladder(noisy), JOB)


def flat(runs):
    """The runs of four budgets, so of one origin, with one metric."""
    budgets = ladder(runs).budgets
    return runs[budgets <= np.unique(budgets)[3]].assign(outcome=0.25)


def test_a_table_whose_metric_is_flat_is_named_and_the_others_are_scored(
    runs, rows, tmp_path, monkeypatch, forescale
):
    monkeypatch.chdir(tmp_path)
    runs.to_csv("good.csv", index=False)
    flat(runs).to_csv("flat.csv", index=False)
    words = ("study", "backtest", "flat.csv", "good.csv", "task=outcome")
    code, out, err = forescale(*words, "--json")
    assert code == 0
    assert "Note: flat is left out: at no origin do the runs determine a law and a link" in err
    assert "(the metric is 0.25 in all 6 rows: the data can't tell how it changes " in err
    task = json.loads(out)["scores"]
    assert {one["table"] for one in task} == {None, "good"}
    assert task == as_dict(task_scores(rows.assign(table="good")))["scores"]


def test_if_no_table_can_be_judged_the_reason_of_the_first_is_said(runs):
    few = ladder(flat(runs), name="few")
    with pytest.raises(UserError, match="input: none of 2 tables can be judged; the first: at no"):
        forecasts_of([few, few], JOB)
    with pytest.raises(UserError, match="few: at no origin"):
        forecasts_of([few], JOB)


@pytest.mark.slow  # a law at each of 25 origins
def test_on_public_tables_the_two_steps_beat_the_line_and_the_last_value(published):
    """The runs of Gadre et al. 2024 on three training sets: the mean error rate of their tasks."""
    rows = pd.read_csv(published / "gadre2024" / "gadre_104_models.csv")
    job = StudyJob(input=["none"], metric="error")
    words = {"parameters": rows["N"], "tokens": rows["D"], "loss": rows["loss_c4_val"]}
    runs = pd.DataFrame({**words, "outcome": 1 - rows["err_avg_subset"]}).astype(float)
    each = [ladder(part, job, name) for name, part in runs.groupby(rows["dataset"])]
    task = pd.concat([forecasts(one, job) for one in each])
    predicted = {(s.method, s.band): s for s in task_scores(task) if s.table is None}
    for band in (1, 2):
        two = predicted[TWO_STEPS, band]
        assert two.median < min(predicted[LINE, band].median, predicted[LAST_VALUE, band].median)
        assert two.coverage["best"].outer > 0.75
        assert two.coverage["other"].outer > 0.85


def answer(rows: pd.DataFrame, **keys):
    keys = {"task": "acc", "bootstraps": 100, "target": NEAR} | keys
    job = StudyJob(input=["x"], **keys)
    return task_of(StudyFit(rows, job, "mine"), "mine")


@pytest.fixture(scope="module")
def ladder_fit():
    """The answer of a ladder of four budgets, so that its backtest has one origin."""
    rows = table(noise=0.002)
    return answer(rows[6 * rows.parameters * rows.tokens < 5e19].reset_index(drop=True))


def test_a_job_without_a_task_has_no_answer():
    assert answer(table(), task=None) is None


def test_the_values_are_plain_and_complete(ladder_fit):
    task = json.loads(json.dumps(task_as_dict(ladder_fit)))
    assert (task["task"], task["link"], task["unseen"]) == ("acc", "sigmoid-to-1", None)
    low, high = task["prediction"]["interval"]
    assert low < task["prediction"]["value"] < high
    assert {one["method"] for one in task["skill"]} == {"two steps", "line", "last value"}


def test_the_page_says_value_interval_and_backtest(ladder_fit):
    section, p = task_section(ladder_fit), ladder_fit.chained
    assert f"accuracy {p.value:.1%} at loss {p.loss.loss:.4f}" in section.rows[0][1]
    assert any(
        re.match("Backtest, .* times the compute, once: off by ", line) for line in section.after
    )
    assert any("The link is extrapolated" in line for line in section.after)


def test_a_metric_at_the_level_of_guessing_has_no_prediction(ladder_fit):
    rng = np.random.default_rng(0)
    rows = ladder_fit.law.records
    flat = answer(rows.assign(outcome=0.25 + 0.01 * rng.standard_normal(len(rows))))
    assert flat.chained is None
    assert prediction_of(flat).startswith("No prediction. The metric is 0.2")
    assert flat.skill == []
    assert task_facts(flat)["unseen"] == flat.unseen


def test_a_forecast_holds_the_metric_and_is_scored_by_what_came(ladder_fit, tmp_path):
    facts = {"target": {"run": "big"}, "task": task_facts(ladder_fit)}
    task = [Forecast(tmp_path / "0001.json", facts),
             Forecast(tmp_path / "0002.json", {"target": {"run": "other"}})]  # fmt: skip
    assert columns_of(task) == ["acc"]
    (waiting,) = score_tasks(task, pd.DataFrame({"name": ["small"], "acc": [0.3]}))
    assert (waiting.observed, waiting.inside) == (None, None)
    value = ladder_fit.chained.value
    (scored,) = score_tasks(task, pd.DataFrame({"name": ["big"], "acc": [value]}))
    assert scored.inside
    (missed,) = score_tasks(task, pd.DataFrame({"name": ["big"], "acc": [0.0]}))
    assert missed.inside is False
    (section,) = forecast_sections([waiting, scored, missed])
    assert [row[-1] for row in section.rows] == ["inside", "-", "yes", "no"]
    assert {row[3] for row in section.rows[1:]} == {f"{value:.1%}"}
    assert forecast_sections([]) == []


def test_the_figures_show_the_runs_the_link_and_the_prediction(ladder_fit):
    figures = Figures(ladder_fit.law, "as the table counts", "6 N D", "nats")
    section = task_section(ladder_fit, figures)
    by_loss, by_compute = (picture for _, picture, _ in section.pictures)
    rows = ladder_fit.law.table
    for picture, x in ((by_loss, rows.loss), (by_compute, 6 * rows.parameters * rows.tokens)):
        dots = next(t for t in picture.traces if t.kind == "dots" and len(t.x) == len(rows))
        assert list(dots.x) == pytest.approx(list(x))
        assert list(dots.y) == pytest.approx(list(rows.outcome))
        star = next(t for t in picture.traces if t.name == "target")
        assert star.y[0] == pytest.approx(ladder_fit.chained.value)
        assert star.ends == pytest.approx(ladder_fit.chained.outer)
    predicted = next(t for t in by_compute.traces if t.name == "predicted")
    assert np.all(np.diff(predicted.y) > 0)
    assert task_section("no runs", figures).absent == "The metric can't be fitted: no runs"
