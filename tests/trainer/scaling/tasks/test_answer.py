"""A metric beside its law: values, words, forecasts and figures of one answer."""

import io
import json

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from forescale.scaling.analysis.forecast import Forecast
from forescale.scaling.analysis.table_fit import StudyFit
from forescale.scaling.config import StudyJob, TargetPoint
from forescale.scaling.report.fit_figures import Figures
from forescale.scaling.report.task_section import task_section
from forescale.scaling.report.task_text import prediction_of, show_task, show_task_forecasts
from forescale.scaling.tasks.answer import answer_as_dict, task_of
from forescale.scaling.tasks.forecast import columns_of, facts_of, score_tasks
from tests.trainer.scaling.analysis.test_task_fit import table

TARGET = TargetPoint(parameters=1e9, tokens=5e10)


def answer(rows: pd.DataFrame, **keys):
    keys = {"task": "acc", "bootstraps": 100, "target": TARGET} | keys
    job = StudyJob(input=["x"], **keys)
    return task_of(StudyFit(rows, job, "mine"), "mine")


@pytest.fixture(scope="module")
def made():
    """The answer of a ladder of four budgets, so that its backtest has one origin."""
    rows = table(noise=0.002)
    return answer(rows[6 * rows.parameters * rows.tokens < 5e19].reset_index(drop=True))


def printed(show, *arguments) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(*arguments, console)
    return console.file.getvalue()


def test_a_job_without_a_task_has_no_answer():
    assert answer(table(), task=None) is None


def test_the_values_are_plain_and_complete(made):
    found = json.loads(json.dumps(answer_as_dict(made)))
    assert (found["task"], found["link"], found["unseen"]) == ("acc", "sigmoid-to-1", None)
    low, high = found["prediction"]["interval"]
    assert low < found["prediction"]["value"] < high
    assert {one["method"] for one in found["skill"]} == {"two steps", "line", "last value"}


def test_the_page_says_value_interval_and_backtest(made):
    said = printed(show_task, made)
    p = made.fit.chained
    assert f"Prediction: accuracy {p.value:.1%} at loss {p.loss.loss:.4f}" in said
    assert "Backtest, one budget ahead, once: off by " in said
    assert "Doubt: The link is extrapolated" in said


def test_a_metric_at_the_level_of_guessing_has_no_prediction(made):
    rng = np.random.default_rng(0)
    rows = made.fit.law.records
    flat = answer(rows.assign(outcome=0.25 + 0.01 * rng.standard_normal(len(rows))))
    assert flat.fit.chained is None
    assert prediction_of(flat.fit).startswith("No prediction. The metric is 0.2")
    assert flat.skill == []
    assert facts_of(flat.fit)["unseen"] == flat.fit.unseen


def test_a_forecast_holds_the_metric_and_is_scored_by_what_came(made, tmp_path):
    facts = {"target": {"run": "big"}, "task": facts_of(made.fit)}
    found = [Forecast(tmp_path / "0001.json", facts),
             Forecast(tmp_path / "0002.json", {"target": {"run": "other"}})]  # fmt: skip
    assert columns_of(found) == ["acc"]
    (waiting,) = score_tasks(found, pd.DataFrame({"name": ["small"], "acc": [0.3]}))
    assert (waiting.observed, waiting.inside) == (None, None)
    value = made.fit.chained.value
    (scored,) = score_tasks(found, pd.DataFrame({"name": ["big"], "acc": [value]}))
    assert scored.inside
    (missed,) = score_tasks(found, pd.DataFrame({"name": ["big"], "acc": [0.0]}))
    assert missed.inside is False
    said = printed(show_task_forecasts, [waiting, scored, missed])
    assert said.count(f"{value:.1%}") >= 4
    assert printed(show_task_forecasts, []) == ""


def test_the_figures_show_the_runs_the_link_and_the_prediction(made):
    figures = Figures(made.fit.law, "as the table counts", "6 N D", "nats")
    section = task_section(made, figures)
    by_loss, by_compute = (picture for _, picture, _ in section.pictures)
    rows = made.fit.law.table
    for picture, x in ((by_loss, rows.loss), (by_compute, 6 * rows.parameters * rows.tokens)):
        dots = next(t for t in picture.traces if t.kind == "dots" and len(t.x) == len(rows))
        assert list(dots.x) == pytest.approx(list(x))
        assert list(dots.y) == pytest.approx(list(rows.outcome))
        star = next(t for t in picture.traces if t.name == "target")
        assert star.y[0] == pytest.approx(made.fit.chained.value)
        assert star.ends == pytest.approx(made.fit.chained.outer)
    predicted = next(t for t in by_compute.traces if t.name == "predicted")
    assert np.all(np.diff(predicted.y) > 0)
    assert task_section("no runs", figures).absent == "The metric can't be fitted: no runs"
