"""`study plan`: its output, its files, and that its cells are runs."""

import json

import pytest
import yaml

from forescale.cli import main
from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.scaling.config import StudyJob
from forescale.scaling.design import planning
from forescale.scaling.study.directory import Study
from forescale.slurm.submit import submit


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        data = ["plan.vocab_size=257", "plan.unique=4e7"]
        code = main(["study", "plan", "study=mine", *data, *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.mark.slow  # a plan of a whole study
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
    words = []

    def fake_expected(*_, near, **__):
        words.append(near)
        raise UserError("design", "is enough", "stop")

    monkeypatch.setattr(planning, "expected", fake_expected)
    plan("plan.cap=1e15", "target.flops=1e15", "near=0.2")
    assert words == [0.2]


def test_arguments_after_two_dashes_are_shared_by_all_runs(plan, tmp_path):
    assert plan("plan.cap=1e15", "--", "optimizer=muon", "model.mlp=gelu")[0] == 0
    study = Study(tmp_path / "studies/mine")
    job = compose(TrainJob, study.arguments(study.plan.cells[0]))
    assert (job.optimizer.kind, job.model.mlp.kind) == ("muon", "gelu")
    share = job.optimizer.adam_learning_rate / job.optimizer.learning_rate
    assert share == pytest.approx(0.04 / 0.02), "both rates keep their ratio"
    code, _, err = plan("plan.cap=1e15", "--", "train.steps=5")
    assert (code, "is set by the study itself" in err) == (2, True)
    ramp = ("train.first_batch=4", "train.batch_ramp='9 steps'")
    code, _, err = plan("plan.cap=1e15", "--", *ramp)
    assert (code, "would make runs shorter than their cells" in err) == (2, True)
    code, _, err = plan("plan.cap=1e15", "--", "modl=tiny")
    assert (code, "modl" in err) == (2, True)


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
    output = capsys.readouterr().err
    assert "optimizer._target_=os.system; give launch.trust=true" in output
    assert not list(tmp_path.glob("studies/mine/cells/*"))


NO_ARGUMENT, READS = "is no argument KEY=VALUE", "reads more than the study's own files"
STORED = {
    "a\nb": NO_ARGUMENT,
    "train.seed=1\noptimizer._target_=os.system": NO_ARGUMENT,
    "--frozen": NO_ARGUMENT,
    "run.name=${oc.env:HOME}": READS,
    "data.path='https://x/${oc.${a}:HOME}'": READS,
    "data.path=https://x/?$FORESCALE_SECRET_SAS": READS,
    "callbacks=[{_target_: os.system}]": "names code to run",
}


def test_what_a_stored_study_may_not_say(plan, tmp_path, capsys):
    """Neither an argument that runs code or reads the environment, nor a cell somewhere else."""
    assert plan("plan.cap=1e15")[0] == 0
    study = tmp_path / "studies/mine"
    good = yaml.safe_load((study / "study.yaml").read_text())
    for text, message in STORED.items():
        arguments = {**good["plan"], "arguments": ["data=bytes", text]}
        (study / "study.yaml").write_text(yaml.safe_dump({**good, "plan": arguments}))
        assert main(["study", "launch", "study=mine"]) == 2
        assert message in capsys.readouterr().err
    (study / "study.yaml").write_text(yaml.safe_dump(good))
    tree = json.loads((study / "plan.json").read_text())
    for name in ("../../out", "a/b", "a\nb", ".hidden", "", "-x"):
        tree["stages"][0]["cells"][0]["name"] = name
        (study / "plan.json").write_text(json.dumps(tree))
        assert main(["study", "launch", "study=mine"]) == 2
        assert "is no name of a cell" in capsys.readouterr().err
    assert not list(study.glob("cells/*"))


def test_stored_arguments_run_no_class_wherever_they_are_composed(tmp_path, monkeypatch, capsys):
    """`train` and `submit` judge the job itself, whichever file its arguments came from."""
    monkeypatch.chdir(tmp_path)
    named = ["run.name=a", "model._target_=os.system", "train.steps=99"]
    assert main(["train", *named, "--stored"]) == 2
    assert "model._target_: would run the class os.system" in capsys.readouterr().err
    (tmp_path / "runs.txt").write_text(" ".join(named) + "\n")
    with pytest.raises(UserError, match="would run the class"):
        submit(["slurm.runs=runs.txt", "submit.dry_run=true", "machine=cpu"], trust=False)
    for word in ("+slurm.setup=[x]", "++submit.dry_run=false"):
        (tmp_path / "runs.txt").write_text(f"run.name=a {word}\n")
        with pytest.raises(UserError, match="which all runs of an array share"):
            submit(["slurm.runs=runs.txt", "submit.dry_run=true", "machine=cpu"])


def test_what_follows_a_table_opens_no_corpus_that_is_not_named(monkeypatch):
    """The table's runs were trained on other data, of which the number of tokens isn't known."""

    def refuse(_data):
        raise AssertionError("a corpus is opened")

    monkeypatch.setattr(planning, "open_sources", refuse)
    common = planning.common_of(compose(StudyJob, ["input=[points.csv]"]))
    assert (common.vocab_size, common.unique) == (257, None)
    words = ["input=[points.csv]", "plan.vocab_size=512", "plan.unique=1e9"]
    common = planning.common_of(compose(StudyJob, words))
    assert (common.vocab_size, common.unique) == (512, 1e9)
    job = compose(StudyJob, ["input=[points.csv]", "plan.arguments=['data.path=/none']"])
    with pytest.raises(AssertionError, match="a corpus is opened"):
        planning.common_of(job)
