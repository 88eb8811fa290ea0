"""What is read for the prediction of tasks; and its command."""

import json
import re

import pytest

from forescale.errors import UserError
from forescale.scaling.config import StudyJob
from forescale.scaling.study.tasks import read_tasks
from tests.trainer.scaling.analysis.test_tasks import table


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = table(noise=0.002)
    more = {"acc_arc": rows.accuracy, "err_arc": 1 - rows.accuracy, "bpb": rows.loss / 3,
            "percent": 100 * rows.accuracy, "word": "high", "kind": ["a", "b"] * 8}  # fmt: skip
    rows.drop(columns="accuracy").assign(**more).to_csv("runs.csv", index=False)
    rows.assign(acc_arc=rows.accuracy)[["loss", "acc_arc"]].to_csv("few.csv", index=False)
    return rows


def read(*names, **keys):
    return read_tasks(StudyJob(input=list(names), **keys))


def test_a_task_has_the_tables_loss_or_its_own(folder):
    plain, own = read(
        "runs.csv", tasks={"arc": "acc_arc", "bpb": "acc_arc"}, task_losses={"bpb": "bpb"}
    )
    assert plain.outcomes.loss.tolist() == pytest.approx(folder.loss.tolist())
    assert own.runs.loss.tolist() == pytest.approx((folder.loss / 3).tolist())
    assert own.outcomes.accuracy.tolist() == pytest.approx(folder.accuracy.tolist())


def test_errors_are_read_as_accuracies(folder):
    (found,) = read("runs.csv", tasks={"arc": "err_arc"}, metric="error")
    assert found.outcomes.accuracy.tolist() == pytest.approx(folder.accuracy.tolist())


def test_chosen_rows_keep_their_own_metrics(folder):
    (found,) = read("runs.csv", tasks={"arc": "acc_arc"}, rows={"kind": "b"})
    assert found.outcomes.accuracy.tolist() == pytest.approx(folder.accuracy[1::2].tolist())


def test_a_second_table_has_the_outcomes(folder):
    folder.assign(acc_arc=folder.accuracy).head(7).to_csv("few.csv", index=False)
    (found,) = read("runs.csv", "few.csv", tasks={"arc": "acc_arc"})
    assert (len(found.runs), len(found.outcomes)) == (16, 7)


def test_a_task_loss_stands_in_for_a_missing_loss(folder, tmp_path):
    rows = folder.rename(columns={"loss": "bpb"})
    rows.to_csv("own.csv", index=False)
    (found,) = read("own.csv", tasks={"arc": "accuracy"}, task_losses={"arc": "bpb"})
    assert found.runs.loss.tolist() == pytest.approx(folder.loss.tolist())


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
    own = ("study", "tasks", "runs.csv", "tasks={arc: acc_arc}", "bootstraps=100")
    target = ("target.parameters=4e9", "target.tokens=2e11")
    code, out, _ = forescale(*own, *target)
    assert code == 0
    assert re.search(r"^arc +16 +-0\.\d+ +-0\.\d+ to -0\.\d+ +2\.\d+", out, re.MULTILINE)
    assert re.search(r"^arc +\d\.\d{4} .* \d\d\.\d% +\d\d\.\d% to \d\d\.\d%", out, re.MULTILINE)
    assert "Note: arc: " in out
    code, out, err = forescale(*own, *target, "--json")
    assert (code, err) == (0, "")
    made = json.loads(out)
    assert made["tasks"][0]["prediction"]["interval"][0] < made["tasks"][0]["prediction"]["value"]
