"""A run's name alone submits it again, with the settings that this user gave the last time."""

import pytest

from forescale.config.compose import compose
from forescale.run.command import job_of
from forescale.run.start import start
from forescale.slurm.config import SubmitJob
from forescale.slurm.login import remembered
from forescale.slurm.submit import _jobs, on_nodes
from tests.trainer.small_run import make_job


@pytest.fixture
def named(dataset, tmp_path, monkeypatch):
    """The words that name an existing run."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    start(make_job(dataset, tmp_path / "runs"))
    return ["run.name=small", f"run.root={tmp_path / 'runs'}"]


def test_settings_are_those_of_the_last_submission(named):
    words = [
        "machine=cpu",
        "slurm=lab",
        "train.micro_batch=1",
        "slurm.setup=[source x]",
        "slurm.after=[7]",
    ]
    remembered.remember(on_nodes(job_of(SubmitJob, [*named, *words])))
    (job,) = _jobs([*named, "train.micro_batch=1"], [])
    assert (job.machine.name, job.slurm.nodes.most, job.slurm.setup) == ("CPU", 2, ["source x"])
    assert job.slurm.after == [], "that was for one submission"
    (job,) = _jobs([*named, "slurm.nodes=1", "train.steps=9"], [])
    assert (job.slurm.nodes.most, job.slurm.mem, job.train.steps) == (1, "3G", 9)
    (job,) = _jobs([*named, "machine=cpu", "slurm=plain"], [])
    assert (job.slurm.nodes.most, job.slurm.setup) == (1, [])


def test_they_are_read_from_no_directory_that_another_may_have_written(named, tmp_path):
    remembered.remember(job_of(SubmitJob, [*named, "machine=cpu", "slurm=plain"]))
    assert not [p for p in (tmp_path / "runs").rglob("*") if "submitted" in p.name]
    other = tmp_path / "other/small"
    assert remembered.recall(other) == {}
    assert remembered.recall(tmp_path / "caf\udce9") == {}, "bytes of a name that aren't UTF-8"


def test_a_damaged_file_is_as_none(named, tmp_path):
    remembered.remember(job_of(SubmitJob, [*named, "machine=cpu", "slurm=plain"]))
    (file,) = (tmp_path / "state").rglob("*.json")
    for content in ("{", "[1]", '{"slurm": 3}'):
        file.write_text(content)
        assert remembered.recall(tmp_path / "runs/small") == {}
    assert compose(SubmitJob, ["machine=cpu"]).slurm.nodes.most == 1


@pytest.mark.parametrize(
    ("typed", "ids"),
    [("17", ["17"]), ("[17]", ["17"]), ("[40_2, 17]", ["40_2", "17"]), ("['40_2']", ["40_2"])],
)
def test_ids_of_jobs_are_taken_as_they_are_typed(typed, ids):
    assert compose(SubmitJob, ["machine=cpu", f"slurm.after={typed}"]).slurm.after == ids
