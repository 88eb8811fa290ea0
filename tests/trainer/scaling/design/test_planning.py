"""`study plan`: its output, its files, and that its cells are runs."""

import json

import pytest
import yaml

from forescale.cli import main
from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.errors import UserError
from forescale.scaling.design import planning
from forescale.scaling.study.directory import Study


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        data = ["plan.vocab_size=257", "plan.unique=4e7"]
        code = main(["study", "plan", "study=mine", *data, *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


def test_a_plan_stays_within_its_cap_and_shows_its_precision(plan, tmp_path):
    code, out, _ = plan("plan.cap=1e15", "target.flops=1e15", "plan.rate=2e10")
    assert code == 0
    facts = json.loads((tmp_path / "studies/mine/plan.json").read_text())
    assert sum(stage["high"] for stage in facts["stages"]) <= facts["cap"] == 1e15
    cells = [cell for stage in facts["stages"] for cell in stage["cells"]]
    assert len({cell["name"] for cell in cells}) == len(cells) > 40
    assert {cell["stage"] for cell in cells} == {1, 2, 3, 4, 5}
    half = facts["expected"]["half"]
    assert f"± {half['0.9']:.1%} (90%)" in out
    assert "Note: " in out


def test_the_simulation_uses_the_same_near_as_the_fit(plan, monkeypatch):
    given = []

    def fake_expected(*_, near, **__):
        given.append(near)
        raise UserError("design", "is enough", "stop")

    monkeypatch.setattr(planning, "expected", fake_expected)
    plan("plan.cap=1e15", "target.flops=1e15", "near=0.2")
    assert given == [0.2]


def test_cells_are_runs(plan, tmp_path):
    """Their arguments compose to the planned length."""
    plan("plan.cap=1e15")
    study = Study(tmp_path / "studies/mine")
    for cell in study.plan.stages[0].cells:
        job = compose(TrainJob, study.arguments(cell))
        assert job.total_steps * job.tokens_per_step == cell.tokens
        assert job.run.directory == study.run(cell.name).path
        assert job.data.embedded == "bytes"


def test_arguments_after_two_dashes_are_shared_by_all_runs(plan, tmp_path):
    assert plan("plan.cap=1e15", "--", "optimizer=muon", "model.mlp=gelu")[0] == 0
    study = Study(tmp_path / "studies/mine")
    job = compose(TrainJob, study.arguments(study.plan.cells[0]))
    assert (job.optimizer.kind, job.model.mlp) == ("muon", "gelu")
    share = job.optimizer.adam_learning_rate / job.optimizer.learning_rate
    assert share == pytest.approx(0.004 / 0.02), "both rates keep their ratio"
    code, _, err = plan("plan.cap=1e15", "--", "train.steps=5")
    assert (code, "is set by the study itself" in err) == (2, True)
    code, _, err = plan("plan.cap=1e15", "--", "modl=tiny")
    assert (code, "modl" in err) == (2, True)


def test_a_ladder(plan, tmp_path):
    code, out, _ = plan("plan.cap=1e16", "plan.kind=ladder", "plan.ladder=[1e5,2e5,4e5]")
    assert code == 0
    assert out.startswith("ladder: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "plan.cap: is not given"),
        (("plan.cap=1e9",), "no grid can start"),
        (("plan.cap=1e15", "plan.model=custom"), "model._target_: is required"),
        (("plan.cap=1e15", "plan.kind=ladder", "plan.ladder=[1e5]"), "determine no law"),
        (("plan.cap=1e12", "plan.kind=ladder"), "more than the cap"),
        (("plan.cap=1e15", "target.parameters=1e6"), "target: names no run"),
    ],
)
def test_an_impossible_plan_is_refused_with_a_sentence(plan, tmp_path, arguments, message):
    code, out, err = plan(*arguments)
    assert code == 2
    assert message in out + err
    assert "Traceback" not in err
    assert not (tmp_path / "studies").exists()


def test_stored_arguments_that_name_code_need_trust(plan, tmp_path, capsys):
    """study.yaml may come from anybody: launching it must not import what it names."""
    assert plan("plan.cap=1e15")[0] == 0
    path = tmp_path / "studies/mine/study.yaml"
    tree = yaml.safe_load(path.read_text())
    tree["plan"]["arguments"] = ["data=bytes", "optimizer=own", "optimizer._target_=os.system"]
    tree["launch"]["trust"] = True  # a stored word for itself counts for nothing
    path.write_text(yaml.safe_dump(tree))
    assert main(["study", "launch", "study=mine"]) == 2
    said = capsys.readouterr().err
    assert "optimizer._target_=os.system; give launch.trust=true" in said
    assert not list(tmp_path.glob("studies/mine/cells/*"))
