"""Failures in a study, with a fake training: each is reported, stored, and not repeated."""

import json
import os
import signal

import pytest

from forescale import cli
from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.ground.storage import write_checked_json
from forescale.resilience.outcome import LAUNCH
from forescale.run.directory import Run
from forescale.scaling.config import PlanKeys, StudyJob
from forescale.scaling.design.plan import StudyPlan, StudyStage
from forescale.scaling.design.recipe_grid import RecipeGrid
from forescale.scaling.design.recipes import BASE, recipes_of
from forescale.scaling.design.shapes import Common
from forescale.scaling.study import launching
from forescale.scaling.study.directory import Study

LIST = ["plan.kind=list", "plan.runs=[[1e4,1e5],[2e4,1e5],[4e4,1e5]]", "plan.cap=1e13"]
GRID = RecipeGrid((1e12,), 20.0, (2, 2), 0)


@pytest.fixture
def study(small_data, tmp_path, fake_training):
    """A function that runs a command of a study; `plan` plans it, of the words after it."""
    for facts in ("codes", "losses", "started", "devices"):
        getattr(fake_training, facts).clear()

    def run(action, *words, name="little"):
        shared = ["--", f"data.path={small_data}", "optimizer=adamw"] * (action == "plan")
        keys = ["plan.sequence_length=32"] * (action == "plan")
        words = [action, f"studies={tmp_path}", f"study={name}", *words, *keys, *shared]
        return cli.main(["study", *words])

    return run


@pytest.fixture
def little(study, tmp_path):
    """A planned list of three runs and their repeats: a function that runs a command, its
    folder."""
    assert study("plan", *LIST) == 0
    return study, tmp_path / "little"


def state(folder, name):
    return next(s for s in Study(folder).states() if s.cell.name == name)


def test_a_study_of_an_earlier_version_goes_on(little, capsys):
    """Keys of fits that left are read over, and named where they said something."""
    run, folder = little
    settings = folder / "study.yaml"
    settings.write_text(f"{settings.read_text()}weights: none\ntasks: {{}}\ntask_losses: {{}}\n")
    assert Study(folder).job.study == "little"
    assert run("sync") == 0
    assert "no longer" not in capsys.readouterr().err
    text = settings.read_text().replace("weights: none", "weights: both")
    settings.write_text(text.replace("tasks: {}", "tasks:\n  arc: acc"))
    assert run("sync") == 0
    err = capsys.readouterr().err
    assert "'weights: both', which fits no longer read" in err
    assert "arc: acc" in err


@pytest.mark.slow  # launches
def test_cells_of_several_ranks_have_gpus_of_their_own(study, fake_training, monkeypatch, capsys):
    assert study("plan", *LIST, "plan.ranks=2") == 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5,7,8,9")
    assert study("launch", "launch.at_once=3") == 2
    assert "3 at once, 2 ranks each, need 6 GPUs; here are 5" in capsys.readouterr().err
    assert study("launch", "launch.at_once=2") == 0
    assert set(fake_training.devices) == {"3,5", "7,8"}
    for words in fake_training.started:
        assert "launch.processes=2" in words
        job = compose(TrainJob, [word for word in words if "=" in word])
        assert not [key for key, _, _ in job.problems(world_size=2) if key.startswith("train.")]


@pytest.mark.slow  # launches
def test_a_diverged_cell_is_not_run_again(little, fake_training):
    run, folder = little
    fake_training.losses["r1"] = 9.0
    assert run("launch") == 0
    assert state(folder, "r1").status == "diverged"
    assert "guessing" in state(folder, "r1").why
    count = len(fake_training.started)
    assert run("launch") == 0
    assert len(fake_training.started) == count
    assert "r1" not in set(Study(folder).table()["name"])


def test_a_stop_while_a_stage_is_decided_starts_nothing(little, fake_training, monkeypatch, capsys):
    run, _ = little
    stop = lambda *_: os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    monkeypatch.setattr(launching, "advance", stop)
    assert run("launch") == 75
    out = capsys.readouterr().out
    assert "Stopping: no cell runs, and none starts." in out
    assert "cells are left: run the same command again." in out
    assert not fake_training.started


@pytest.mark.slow  # launches
def test_an_error_of_the_users_ends_the_launch_with_its_message(little, fake_training, capsys):
    run, folder = little
    fake_training.codes["r0"] = 2
    assert run("launch") == 2
    assert "r0: optimizer: is refused; choose another; see " in capsys.readouterr().err
    assert len(fake_training.started) == 1, "nothing was started after it"
    assert state(folder, "r0").status == "failed"
    del fake_training.codes["r0"]
    assert run("launch") == 0
    assert state(folder, "r0").status == "failed", "it is not retried by itself"
    assert run("launch", "launch.retry=true") == 0
    assert state(folder, "r0").status == "complete"


def test_a_study_planned_again_before_any_run_starts_afresh(little, fake_training):
    """A failure under the first plan left no run and does not count for the second plan."""
    run, folder = little
    fake_training.codes["r0"] = 2
    assert run("launch") == 2
    fake_training.codes.clear()
    assert run("plan", *LIST) == 0
    assert state(folder, "r0").status == "ready"


def test_a_cell_whose_last_row_comes_while_it_is_looked_at_is_complete(little, monkeypatch):
    run, folder = little
    assert run("launch") == 0
    cell = Study(folder).plan.cells[0].name
    path = Study(folder).run(cell).metrics
    whole = path.read_text()
    path.write_text(whole[: whole.rindex("\n", 0, -1) + 1])  # without the score of its last step
    is_evaluated = Run.is_evaluated

    def after_the_row(run: Run, step: int) -> bool:
        path.write_text(whole)
        return is_evaluated(run, step)

    monkeypatch.setattr(Run, "is_evaluated", after_the_row)
    assert state(folder, cell).status == "complete"


def test_a_cell_takes_no_time_while_its_study_is_stopped(little):
    run, folder = little
    assert run("launch") == 0
    cell_run = Study(folder).run("r0")
    first, second = cell_run.attempts()[0], cell_run.new_attempt()
    write_checked_json(first.path / LAUNCH, {"begun": 1e9, "ended": 1e9 + 10, "code": 75})
    write_checked_json(second.path / LAUNCH, {"begun": 1e9 + 5000, "ended": 1e9 + 5020, "code": 0})
    assert state(folder, "r0").seconds == pytest.approx(30)


def test_a_cell_that_crashes_three_times_has_failed(little, fake_training):
    run, folder = little
    fake_training.codes["r0"] = -9
    assert run("launch") == 0
    starts = [a for words in fake_training.started for a in words if a == "run.name=r0"]
    assert len(starts) == 3
    assert state(folder, "r0").status == "failed"


def test_branches_of_a_failed_trunk_are_reported(study, tmp_path, fake_training, capsys):
    runs = "plan.runs=[[1e4,1e5],[1e4,3e5],[2e4,1e5],[4e4,1e5]]"
    assert study("plan", "plan.kind=list", runs, "plan.cap=1e13", "plan.seeds=[1,1]") == 0
    fake_training.codes["r1"] = 76
    assert study("launch") == 0
    assert "1 cells can't start: r1 saved no checkpoint" in capsys.readouterr().out
    fake_training.codes.clear()
    assert study("launch", "launch.retry=true") == 0
    assert state(tmp_path / "little", "r1").status == "complete"


def test_status_shows_every_cell_and_an_excluded_one_is_left_out_with_its_reason(little, capsys):
    run, folder = little
    assert run("launch") == 0
    capsys.readouterr()
    assert run("status") == 0
    out = capsys.readouterr().out
    assert "9 complete" in out
    assert "r2" in out
    assert run("exclude", "cells=[r1]", "why=a broken node") == 0
    assert state(folder, "r1").why == "a broken node"
    assert "r1" not in set(Study(folder).table()["name"])
    assert run("exclude", "cells=[r9]", "why=x") == 2
    assert "r9 is no cell" in capsys.readouterr().err
    assert run("exclude", "cells=[r1]") == 2


def test_no_cell_starts_beyond_the_cap(little, fake_training, capsys):
    """As after runs that cost more than planned."""
    run, folder = little
    plan = json.loads((folder / "plan.json").read_text())
    plan["cap"] = plan["stages"][0]["cells"][0]["cost"] * 1.5
    (folder / "plan.json").write_text(json.dumps(plan))
    assert run("launch") == 2
    assert "plan.cap: " in capsys.readouterr().err
    assert len(fake_training.started) == 1


def test_a_second_launcher_of_a_study_is_refused(little, capsys):
    run, folder = little
    with Study(folder).deciding():
        assert run("launch") == 2
    assert "is being launched by another process" in capsys.readouterr().err


def test_a_missing_study_is_refused_with_a_sentence(study, capsys):
    assert study("launch") == 2
    assert "holds no plan" in capsys.readouterr().err


def test_a_cell_is_a_command_that_train_takes(small_data, tmp_path, fake_training):
    """`train` refuses keys that have no effect: a dial beside sizes, heads of what has none."""
    where = [f"studies={tmp_path}", "study=dial", "plan.model=depth", "plan.sequence_length=32"]
    shared = ["model.depth=2", "model.mixer=mingru", f"data.path={small_data}", "optimizer=adamw"]
    assert cli.main(["study", "plan", *where, *LIST, "--", *shared]) == 0
    study = Study(tmp_path / "dial")
    for cell in study.plan.stages[0].cells:
        job = compose(TrainJob, study.arguments(cell))
        assert (job.model.mixer.kind, job.model.width) == ("mingru", cell.keys["model.width"])
        assert job.total_steps * job.tokens_per_step == cell.tokens
        assert job.run.directory == study.run(cell.name).path


SIZES = {"model.num_kv_heads", "model.num_heads", "model.width", "model.num_layers"}


@pytest.mark.parametrize(
    ("schedule", "arguments", "kind"),
    [
        ("wsd", ["model.num_kv_heads=1"], "wsd"),
        ("wsd", ["schedule=cosine"], "cosine"),
        ("constant", ["schedule.kind=cosine"], "cosine"),
        ("wsd", ["schedule.kind=wsd"], "wsd"),
    ],
)
def test_a_recipe_changes_the_schedule_of_its_cells_and_never_their_sizes(
    tmp_path, schedule, arguments, kind
):
    shared = ["data=bytes", "optimizer=adamw", f"schedule={schedule}"]
    job = StudyJob(studies=str(tmp_path), study="own", plan=PlanKeys(arguments=shared))
    common = Common(compose(TrainJob, job.plan.shared).model, 257, 64)
    recipes = recipes_of(job.plan.shared, {BASE: [], "new": arguments}, frozenset())
    stage = StudyStage(1, 1e12, tuple(GRID.cells(common, recipes[1], 1)), 0.0, 0.0, True)
    study = Study.make(
        job.folder, job, StudyPlan("recipes", common, (stage,), 8e12, recipes=recipes), {}
    )
    cell = study.plan.cells[0]
    run = compose(TrainJob, study.arguments(cell))
    planned = {name: cell.keys[name] for name in SIZES}
    assert {name: getattr(run.model, name.partition(".")[2]) for name in SIZES} == planned
    assert run.schedule.kind == kind
    decay = f"{cell.decay_steps} steps" if kind == "wsd" else "None"
    assert str(getattr(run.schedule, "decay", None)) == decay
