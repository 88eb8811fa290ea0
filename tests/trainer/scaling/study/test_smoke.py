"""The whole path, for real and small: from the plan over forecasts and the target to the score."""

import json
import subprocess
import sys

import pytest

from forescale import cli
from forescale.run.directory import read_rows
from forescale.scaling.analysis.forecast import cards
from forescale.scaling.study.directory import Study

PLAN = [
    *("plan.kind=ladder", "plan.ladder=[1.5e4,3e4,6e4]", "plan.multiples=[0.5,1]", "plan.cap=4e12"),
    *("plan.seeds=[1,1]", "plan.sequence_length=64", "form=shared-exponent", "bootstraps=100"),
    "target.flops=6e11",
]
OF_ALL = [
    "optimizer=adamw",
    "train.compile=off",
    "validation.every=100 %",
    "logging.every=50 steps",
]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_from_the_plan_to_the_score(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert (
        cli.main(["study", "plan", *PLAN, "--", "data=dataset", f"data.path={dataset}", *OF_ALL])
        == 0
    )
    launch = ["study", "launch", "launch.at_once=2", "launch.target=true"]
    command = [sys.executable, "-P", "-m", "forescale", *launch]
    subprocess.run(["timeout", "-s", "KILL", "40", *command], check=False)  # a launcher that dies
    study = Study(tmp_path / "studies/first")
    begun = [e["cell"] for e in study.events if e["kind"] == "begun"]
    assert begun
    assert cli.main(launch) == 0
    study = Study(study.folder)
    words = [s.word for s in study.states()]
    assert words.count("complete") == len(words) >= 11, "nothing failed, and nothing is left"
    assert study.spent <= study.plan.cap

    found = {c.facts["target"]["run"]: c for c in cards(study.forecasts)}
    assert set(found) == {"target"}
    assert found["target"].outcome
    for cell in study.plan.cells:
        (parent,) = {a.parent.step for a in study.run(cell.name).attempts()[:1]}
        assert parent == (cell.trunk_step or 0), "a branch went on where it leaves its trunk"
    (event,) = (
        row
        for attempt in study.run("target").attempts()
        for row in read_rows(attempt.events.path)
        if row["kind"] == "forecast"
    )
    assert event["hash"] == found["target"].facts["hash"], "the run itself was measured by its card"

    capsys.readouterr()
    assert cli.main(["study", "fit", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["runs"] == 6
    assert cli.main(["study", "report"]) == 0
    assert (study.folder / "report.html").stat().st_size > 1_000_000
    assert cli.main(["study", "score"]) == 0
    assert "skill" in capsys.readouterr().out.lower()
