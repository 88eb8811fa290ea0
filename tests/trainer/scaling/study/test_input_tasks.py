"""What is read for the prediction of tasks; and its command."""

import re

import pandas as pd
import pytest

from forescale.scaling.config import StudyJob
from forescale.scaling.study import inputs
from forescale.scaling.study.inputs import with_outcome
from tests.trainer.scaling.analysis.test_task_fit import table


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = table(noise=0.002)
    columns = {"acc_arc": rows.outcome, "err_arc": 1 - rows.outcome, "bpb": rows.loss / 3,
            "percent": 100 * rows.outcome, "word": "high", "kind": ["a", "b"] * 8}  # fmt: skip
    rows.drop(columns="outcome").assign(**columns).to_csv("runs.csv", index=False)
    rows.assign(acc_arc=rows.outcome)[["loss", "acc_arc"]].to_csv("few.csv", index=False)
    return rows


def test_a_metric_is_read_beside_the_records_of_a_table(folder):
    job = StudyJob(input=["runs.csv"], task="err_arc", metric="error", rows={"kind": "b"})
    result = with_outcome(inputs.read(job)[0], job, "runs.csv")
    assert result.outcome.tolist() == pytest.approx(folder.outcome.tolist()[1::2])


def test_a_metric_is_a_column_of_records():
    records = pd.DataFrame({"loss": [3.0, 2.0], "ability/copy/4": [0.0, 0.5]})
    result = with_outcome(records, StudyJob(input=["some-run"], task="ability/copy/4"), "2 runs")
    assert result.outcome.tolist() == [0.0, 0.5]


@pytest.mark.slow  # seconds
def test_fit_and_backtest_print_a_metric(folder, forescale):
    """Of a ladder of four budgets, so that its backtest has one origin."""
    few = pd.read_csv("runs.csv")
    few[6 * few.parameters * few.tokens < 5e19].to_csv("few.csv", index=False)
    target = ("target.parameters=1e9", "target.tokens=5e10")
    code, out, _ = forescale("study", "fit", "few.csv", "task=acc_arc", "bootstraps=100", *target)
    assert code == 0
    assert re.search(r"Prediction: accuracy \d\d\.\d% at loss \d\.\d+; 50% interval \d\d\.\d%", out)
    code, out, _ = forescale("study", "backtest", "few.csv", "task=acc_arc")
    assert code == 0
    assert re.search(r"^two steps +1 +\d\.\d\d points", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["task=acc_arc", "link=power"], "power is no link to metric=accuracy; write sigmoid"),
        (["task=acc_arc", "link=sigmoid", "chance=0.2"], "chance: the link sigmoid holds no floor"),
        (["task=acc_ark"], "has no column 'acc_ark'; the nearest are 'acc_arc'"),
        (["task=bpb"], "is not between 0 and 1; give shares, not percentages; of a task's loss"),
        (["task=word", "metric=loss"], "'high' of column 'word' is no number"),
    ],
)
def test_a_task_that_cannot_be_fitted_is_refused(folder, forescale, arguments, message):
    code, out, err = forescale("study", "fit", "runs.csv", "bootstraps=100", *arguments)
    assert (code, out) == (2, "")
    assert message in err
