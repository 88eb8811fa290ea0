"""What is read for the prediction of tasks; and its command."""

import json
import re

import pandas as pd
import pytest

from forescale.ground.errors import UserError
from forescale.scaling.config import StudyJob
from forescale.scaling.study import inputs
from forescale.scaling.study.inputs import read_tasks, with_outcome
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


def read(*names, **keys):
    return read_tasks(StudyJob(input=list(names), **keys))


def test_a_task_has_the_tables_loss_or_its_own(folder):
    plain, words = read(
        "runs.csv", tasks={"arc": "acc_arc", "bpb": "acc_arc"}, task_losses={"bpb": "bpb"}
    )
    assert plain.outcomes.loss.tolist() == pytest.approx(folder.loss.tolist())
    assert words.runs.loss.tolist() == pytest.approx((folder.loss / 3).tolist())
    assert words.outcomes.outcome.tolist() == pytest.approx(folder.outcome.tolist())


def test_errors_are_read_as_accuracies(folder):
    (result,) = read("runs.csv", tasks={"arc": "err_arc"}, metric="error")
    assert result.outcomes.outcome.tolist() == pytest.approx(folder.outcome.tolist())


def test_chosen_rows_keep_their_own_metrics(folder):
    (result,) = read("runs.csv", tasks={"arc": "acc_arc"}, rows={"kind": "b"})
    assert result.outcomes.outcome.tolist() == pytest.approx(folder.outcome[1::2].tolist())


def test_a_second_table_has_the_outcomes(folder):
    folder.assign(acc_arc=folder.outcome).head(7).to_csv("few.csv", index=False)
    (result,) = read("runs.csv", "few.csv", tasks={"arc": "acc_arc"})
    assert (len(result.runs), len(result.outcomes)) == (16, 7)


def test_a_task_loss_stands_in_for_a_missing_loss(folder, tmp_path):
    rows = folder.rename(columns={"loss": "bpb"})
    rows.to_csv("own.csv", index=False)
    (result,) = read("own.csv", tasks={"arc": "outcome"}, task_losses={"arc": "bpb"})
    assert result.runs.loss.tolist() == pytest.approx(folder.loss.tolist())


@pytest.mark.parametrize(
    ("names", "keys", "message"),
    [
        (["runs.csv"], {}, "tasks: are not given; name their columns"),
        (["runs.csv"], {"tasks": {"arc": "acc_ark"}}, "has no column 'acc_ark'; the nearest are"),
        (["runs.csv"], {"tasks": {"arc": "percent"}}, "is not between 0 and 1; give shares"),
        (["runs.csv"], {"tasks": {"arc": "word"}}, "'high' of column 'word' is no number"),
        (
            ["runs.csv"],
            {"tasks": {"arc": "acc_arc"}, "task_losses": {"ark": "bpb"}},
            "task_losses.ark: is no task; name some of arc",
        ),
        (["some-run"], {"tasks": {"arc": "acc_arc"}}, "study tasks: reads tables alone"),
    ],
)
def test_what_cannot_be_read_is_refused_with_a_sentence(folder, names, keys, message):
    with pytest.raises(UserError) as refused:
        read(*names, **keys)
    assert message in str(refused.value)


def test_the_command_prints_the_link_and_the_prediction(folder, forescale):
    words = ("study", "tasks", "runs.csv", "tasks={arc: acc_arc}", "bootstraps=100")
    target = ("target.parameters=4e9", "target.tokens=2e11")
    code, out, _ = forescale(*words, *target)
    assert code == 0
    assert re.search(r"^arc +16 +0\.2\d+ +0\.2\d+ to 0\.2\d+ +2\.\d+", out, re.MULTILINE)
    assert re.search(r"^arc +\d\.\d{4} .* \d\d\.\d% +\d\d\.\d% to \d\d\.\d%", out, re.MULTILINE)
    assert "\narc: The link is extrapolated: it has seen no loss below " in out
    code, out, err = forescale(*words, *target, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(out)
    assert facts["tasks"][0]["prediction"]["interval"][0] < facts["tasks"][0]["prediction"]["value"]


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
