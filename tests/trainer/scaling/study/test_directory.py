"""What goes wrong in a study, its cells pretended: each is told, kept, and not done twice."""

import json

import pytest

from forescale import cli
from forescale.scaling.config import StudyJob
from forescale.scaling.study.directory import Study

LIST = ["plan.kind=list", "plan.runs=[[1e4,1e5],[2e4,1e5],[4e4,1e5]]", "plan.cap=1e13"]


@pytest.fixture
def little(small_data, tmp_path, pretended):
    """A list of three runs and their seeds, planned; and what says a command of it."""
    pretended.codes.clear()
    pretended.losses.clear()
    pretended.begun.clear()
    where = [f"studies={tmp_path}", "study=little"]
    words = ["plan.sequence_length=32", "--", f"data.path={small_data}", "optimizer=adamw"]
    assert cli.main(["study", "plan", *where, *LIST, *words]) == 0
    yield lambda *words: cli.main(["study", *words, *where]), tmp_path / "little"
    pretended.codes.clear()
    pretended.losses.clear()


def word(folder, name):
    return next(s for s in Study(folder).states() if s.cell.name == name)


def test_a_diverged_cell_is_marked_and_not_run_again(little, pretended):
    run, folder = little
    pretended.losses["r1"] = 9.0
    assert run("launch") == 0
    assert word(folder, "r1").word == "diverged"
    assert "guessing" in word(folder, "r1").why
    count = len(pretended.begun)
    assert run("launch") == 0
    assert len(pretended.begun) == count
    assert "r1" not in set(Study(folder).table()["name"])


def test_a_fault_of_the_users_ends_the_launch_with_its_sentence(little, pretended, capsys):
    run, folder = little
    pretended.codes["r0"] = 2
    assert run("launch") == 2
    assert "r0: optimizer: says no; ask again." in capsys.readouterr().err
    assert len(pretended.begun) == 1, "nothing was begun after it"
    assert word(folder, "r0").word == "failed"
    del pretended.codes["r0"]
    assert run("launch") == 0
    assert word(folder, "r0").word == "failed", "and it is not retried by itself"
    assert run("launch", "launch.retry=true") == 0
    assert word(folder, "r0").word == "complete"


def test_planned_again_before_anything_ran_it_begins_anew(little, pretended, small_data, tmp_path):
    """What failed under the first plan left no run, and is no fault of the second's."""
    run, folder = little
    pretended.codes["r0"] = 2
    assert run("launch") == 2
    pretended.codes.clear()
    words = ["plan.sequence_length=32", "--", f"data.path={small_data}", "optimizer=adamw"]
    where = [f"studies={tmp_path}", "study=little"]
    assert cli.main(["study", "plan", *where, *LIST, *words]) == 0
    assert word(folder, "r0").word == "ready"


def test_what_dies_again_and_again_is_given_up(little, pretended):
    run, folder = little
    pretended.codes["r0"] = -9
    assert run("launch") == 0
    begun = [w for words in pretended.begun for w in words if w == "run.name=r0"]
    assert len(begun) == 3
    assert word(folder, "r0").word == "failed"


def test_branches_of_a_trunk_that_came_to_nothing_are_told(small_data, tmp_path, pretended, capsys):
    pretended.codes.clear()
    pretended.losses.clear()
    where = [f"studies={tmp_path}", "study=trunks"]
    runs = "plan.runs=[[1e4,1e5],[1e4,3e5],[2e4,1e5],[4e4,1e5]]"
    plan = ["plan.kind=list", runs, "plan.cap=1e13", "plan.seeds=[1,1]", "plan.sequence_length=32"]
    words = ["--", f"data.path={small_data}", "optimizer=adamw"]
    assert cli.main(["study", "plan", *where, *plan, *words]) == 0
    pretended.codes["r1"] = 76
    assert cli.main(["study", "launch", *where]) == 0
    assert "1 cells can't begin: r1 has saved nothing" in capsys.readouterr().out
    pretended.codes.clear()
    assert cli.main(["study", "launch", *where, "launch.retry=true"]) == 0
    assert word(tmp_path / "trunks", "r1").word == "complete"


def test_an_excluded_cell_is_left_out_with_its_reason(little, capsys):
    run, folder = little
    assert run("launch") == 0
    assert run("exclude", "cells=[r1]", "why=a broken node") == 0
    assert word(folder, "r1").why == "a broken node"
    assert "r1" not in set(Study(folder).table()["name"])
    assert run("exclude", "cells=[r9]", "why=x") == 2
    assert "r9 is no cell" in capsys.readouterr().err
    assert run("exclude", "cells=[r1]") == 2


def test_nothing_begins_that_the_cap_does_not_pay_for(little, pretended, capsys):
    """Such as after runs that cost more than was planned."""
    run, folder = little
    plan = json.loads((folder / "plan.json").read_text())
    plan["cap"] = plan["stages"][0]["cells"][0]["cost"] * 1.5
    (folder / "plan.json").write_text(json.dumps(plan))
    assert run("launch") == 2
    assert "plan.cap: " in capsys.readouterr().err
    assert len(pretended.begun) == 1


def test_two_launchers_of_one_study_are_refused(little, capsys):
    run, folder = little
    with Study(folder).deciding():
        assert run("launch") == 2
    assert "is being launched by another process" in capsys.readouterr().err


def test_status_shows_every_cell(little, capsys):
    run, _ = little
    assert run("launch") == 0
    capsys.readouterr()
    assert run("status") == 0
    out = capsys.readouterr().out
    assert "9 complete" in out
    assert "r2" in out


def test_no_study_has_a_sentence(tmp_path, capsys):
    assert cli.main(["study", "launch", f"studies={tmp_path}", "study=none"]) == 2
    assert "holds no plan" in capsys.readouterr().err
    assert StudyJob().folder.name == "first"
