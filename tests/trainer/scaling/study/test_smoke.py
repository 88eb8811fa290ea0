"""A small study with real training: plan, forecasts, target, score."""

import json

import pytest

from forescale import cli
from forescale.resilience import pool
from forescale.scaling.analysis.forecast import read_forecasts
from forescale.scaling.study import launching
from forescale.scaling.study.directory import Study
from tests.trainer.scaling.fake_training import MostlyFake, kill_launcher_during

PLAN = [
    *(
        "plan.kind=ladder",
        "plan.ladder=[1.5e4,3e4,6e4]",
        "plan.multiples=[0.1,0.2]",
        "plan.cap=4e12",
    ),
    *("plan.seeds=[1,1]", "plan.sequence_length=64", "form=shared-exponent", "bootstraps=100"),
    # Given whole: the law of six runs determines no best N.
    *("target.parameters=6e4", "target.tokens=3e5"),
]
OF_ALL = [
    *("optimizer=adamw", "train.compile=off", "validation.every=100 %", "logging.every=50 steps"),
    "checkpoint.every=5",
]


@pytest.mark.distributed
@pytest.mark.timeout(1800)  # seven trainings, beside other tests
def test_a_study_runs_from_plan_to_score_although_its_launcher_is_killed(
    large_dataset, tmp_path, monkeypatch, fake_training, capsys
):
    """The law's six runs and the target are trained; the other learning rates are fakes."""
    monkeypatch.chdir(tmp_path)
    data = ["data=dataset", f"data.path={large_dataset}"]
    assert cli.main(["study", "plan", *PLAN, "--", *data, *OF_ALL]) == 0
    study = Study(tmp_path / "studies/first")
    launch = ["launch.at_once=2", "launch.target=true"]
    kill_launcher_during("n0-x0.1", study, *launch)
    swept = [c.name for c in study.plan.cells if c.role == "rate"]
    real = (*(c.name for c in study.plan.cells if c.role == "grid"), "target")
    monkeypatch.setattr(MostlyFake, "real", real)
    monkeypatch.setattr(MostlyFake, "losses", dict.fromkeys(swept, 5.5))  # all but guessing
    monkeypatch.setattr(pool.subprocess, "Popen", MostlyFake)
    monkeypatch.setattr(launching, "_POLL", 0.02)
    assert cli.main(["study", "launch", *launch]) == 0
    study = Study(study.folder)
    statuses = [s.status for s in study.states()]
    assert statuses == ["complete"] * 11, "nothing failed, and nothing is left"
    attempts = study.run("n0-x0.1").attempts()
    assert len(attempts) == 2, "it went on where it was killed"
    assert attempts[1].parent.step > 0
    assert study.spent <= study.plan.cap
    log = (study.folder / "logs/n0-x0.1.log").read_text()
    assert "validation loss" in log
    assert "A sample" not in log, "nobody reads it, and it costs as much as a hundred steps"

    forecasts = {c.facts["target"]["run"]: c for c in read_forecasts(study.forecasts)}
    assert set(forecasts) == {"target"}
    assert forecasts["target"].outcome
    assert any(c.trunk for c in study.plan.cells)
    for cell in study.plan.cells:
        # An attempt that was killed while it started has no parent.
        parent = next(a.parent.step for a in study.run(cell.name).attempts() if a.parent)
        assert parent == (cell.trunk_step or 0), "a branch starts where it leaves its trunk"
    (event,) = study.run("target").read_events(kind="forecast_scored")
    assert event["hash"] == forecasts["target"].facts["hash"], (
        "the run compares itself with its forecast"
    )

    capsys.readouterr()
    assert cli.main(["study", "fit", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["runs"] == 6
    assert cli.main(["study", "report"]) == 0
    assert (study.folder / "report.html").stat().st_size > 100_000
    assert cli.main(["study", "score"]) == 0
    assert "skill" in capsys.readouterr().out.lower()
