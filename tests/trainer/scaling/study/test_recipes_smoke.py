"""A study of recipes with real training where it matters: a killed cell, and one of each recipe."""

import pytest

from forescale import cli
from forescale.scaling.analysis.multipliers import Multipliers
from forescale.scaling.study import local
from forescale.scaling.study.directory import Study
from tests.trainer.scaling.fake_training import MostlyFake, kill_launcher_during

PLAN = [
    *("plan.kind=recipes", "plan.budgets=3", "plan.step=2", "plan.cap=1.5e12", "plan.seeds=[2,2]"),
    *("plan.sequence_length=64", "plan.fresh=2", "plan.candidates=[swiglu,muon]"),
]
OF_ALL = ["optimizer=adamw", "train.compile=off", "validation.every=100 %"]


@pytest.mark.distributed
@pytest.mark.timeout(1800)
def test_a_study_of_recipes_resumes_a_killed_cell_and_trains_each_recipe(
    large_dataset, tmp_path, monkeypatch, fake_training
):
    """Three trainings are real, one of them killed with its launcher; the others are fakes."""
    monkeypatch.chdir(tmp_path)
    data = ["data=dataset", f"data.path={large_dataset}", "model.mlp=gelu", "checkpoint.every=5"]
    assert cli.main(["study", "plan", *PLAN, "--", *data, *OF_ALL]) == 0
    study = Study(tmp_path / "studies/first")
    kill_launcher_during("b1-base", study)
    monkeypatch.setattr(MostlyFake, "real", ("b1-base", "b2-swiglu", "b2-muon"))
    monkeypatch.setattr(local.subprocess, "Popen", MostlyFake)
    monkeypatch.setattr(local, "_POLL", 0.02)
    assert cli.main(["study", "launch"]) == 0
    study = Study(study.folder)
    assert {s.status for s in study.states()} == {"complete"}
    assert len(study.run("b1-base").attempts()) == 2, "it went on where it was killed"
    assert study.run("b1-base").attempts()[1].parent.step > 0
    # A fake says otherwise on how many windows its loss is measured.
    recipes = Multipliers(study.table().drop(columns="loss_definition"), study.job, "here")
    assert {c.name for c in recipes.candidates} == {"swiglu", "muon"}
    kinds = study.table().set_index("name")["optimizer"]
    assert (kinds["b2-muon"], kinds["b2-swiglu"]) == ("muon", "adamw")
