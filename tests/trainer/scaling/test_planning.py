"""`study plan`: the page, the files, and that its lines are runs."""

import json
import shlex

import pytest

from trainer.cli import main
from trainer.compose import compose


@pytest.fixture
def plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*words):
        code = main(["study", "plan", "study=mine", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def test_a_plan_stays_within_its_cap_and_says_what_it_is_worth(plan, tmp_path):
    code, out, _ = plan("plan.cap=1e15", "target.flops=1e15", "plan.rate=2e10")
    assert code == 0
    facts = json.loads((tmp_path / "studies/mine/plan.json").read_text())
    assert facts["low"] <= facts["high"] <= facts["cap"] == 1e15
    assert len({cell["name"] for cell in facts["cells"]}) == len(facts["cells"]) > 40
    assert {cell["stage"] for cell in facts["cells"]} == {1, 2, 3, 4, 5}
    half = facts["expected"]["half"]
    assert f"± {half['0.9']:.1%} (90%)" in out
    assert "Note: " in out


def test_the_lines_of_the_first_stage_are_runs(plan, tmp_path):
    """They compose, to the length that was planned; those that await others are not among them."""
    plan("plan.cap=1e15")
    facts = json.loads((tmp_path / "studies/mine/plan.json").read_text())
    cells = {cell["name"]: cell for cell in facts["cells"]}
    lines = (tmp_path / "studies/mine/stage-1.txt").read_text().splitlines()
    assert len(lines) == 6, "two sizes, at three learning rates each"
    for line in lines:
        job = compose("train", shlex.split(line))
        cell = cells[job.run.name]
        assert job.total_steps * job.tokens_per_step == cell["tokens"]
        assert not cell["awaits"]


def test_a_ladder(plan, tmp_path):
    code, out, _ = plan("plan.cap=1e16", "plan.kind=ladder", "plan.ladder=[1e5,2e5,4e5]")
    assert code == 0
    assert out.startswith("ladder: ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "plan.cap: is not given"),
        (("plan.cap=1e9",), "can't be had"),
        (("plan.cap=1e15", "plan.model=custom"), "model._target_: needs a value"),
        (("plan.cap=1e15", "plan.kind=ladder", "plan.ladder=[1e5]"), "tell no law"),
        (("plan.cap=1e12", "plan.kind=ladder"), "more than the cap"),
        (("plan.cap=1e15", "target.parameters=1e6"), "target: names no run"),
    ],
)
def test_what_cannot_be_planned_is_a_sentence(plan, tmp_path, words, said):
    code, out, err = plan(*words)
    assert code == 2
    assert said in out + err
    assert "Traceback" not in err
    assert not (tmp_path / "studies").exists()
