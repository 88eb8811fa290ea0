"""A study from Python: the same numbers as on the command line."""

import json

import pytest

import forescale as door
from forescale.ground.errors import UserError

TABLE = "runs.csv"


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Runs whose losses follow a law exactly, with names of others for N and D."""
    monkeypatch.chdir(tmp_path)
    lines = ["Model Size,D,loss"]
    for n in (1e6, 3e6, 1e7, 3e7):
        for d in (1e8, 3e8, 1e9):
            lines.append(f"{n},{d},{1.7 + 400 / n**0.34 + 410 / d**0.28}")
    (tmp_path / TABLE).write_text("\n".join(lines))
    columns = {"parameters": "Model Size", "tokens": "D"}
    return door.open_study(TABLE, columns=columns, bootstraps=100)


def test_the_records_are_a_frame(table):
    assert list(table.records["parameters"][:2]) == [1e6, 1e6]
    assert repr(table) == f"StudyView('{TABLE}')"


def test_the_fit_is_that_of_the_command(table, forescale):
    words = ("columns={parameters: Model Size, tokens: D}", "bootstraps=100", "--json")
    code, out, _ = forescale("study", "fit", TABLE, *words, "form=shared-exponent")
    assert code == 0
    assert table.fit(form="shared-exponent").fit.values == json.loads(out)["values"]


def test_a_run_is_predicted(table):
    prediction = table.predict(parameters=1e8, tokens=1e9)
    assert prediction.loss == pytest.approx(1.7 + 400 / 1e8**0.34 + 410 / 1e9**0.28, rel=1e-3)
    assert prediction.outer[0] <= prediction.loss <= prediction.outer[1]
    with pytest.raises(UserError, match="target: is not given; write predict"):
        table.predict()


def test_what_is_no_study_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nope: names no run"):
        door.open_study("nope")
