"""`forescale train`: how many ranks it starts, and the job of a rank, which is the one in its run's
directory."""

import json
import os
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest

from forescale.config import hardware
from forescale.config.frozen import freeze, thaw
from forescale.config.job import overrides_of
from forescale.config.train import TrainJob
from forescale.ground.document import for_programs
from forescale.ground.errors import UserError
from forescale.plan import oom
from forescale.run.command import job_of
from forescale.run.directory import Parent
from forescale.verbs.train import _frozen, _rows_for_programs, local_ranks, local_sizes
from tests.trainer.small_run import train_row


def test_a_frozen_job_is_read_from_the_runs_directory(own_run, tmp_path):
    """Also after the directory was moved."""
    moved = tmp_path / "elsewhere" / "other"
    moved.parent.mkdir()
    own_run.path.rename(moved)
    job = _frozen([str(moved), "--frozen"])
    assert (job.run.name, job.run.root) == ("other", str(moved.parent))
    stored = thaw(TrainJob, moved / "config.yaml")
    assert replace(job, run=stored.run) == stored


def test_programs_get_each_row_of_a_new_attempt_once(own_run, capsys):
    with for_programs(True), _rows_for_programs(own_run):
        attempt = own_run.new_attempt()
        attempt.start_from(Parent(4), own_run)
        attempt.metrics.add(train_row(attempt, 5))
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["kind"], row["step"], row["attempt"]) for row in rows] == [("train", 5, 2)]


def test_a_directory_that_is_where_it_was_changes_nothing(own_run, monkeypatch):
    """So that ranks find no difference to the frozen config, and don't write it anew."""
    where = own_run.path.absolute()
    job = _frozen([str(where), "--frozen"])
    own_run.config.write_text(freeze(job))
    assert _frozen([str(where), "--frozen"]) == job
    monkeypatch.chdir(where.parents[1])
    own_run.config.write_text(freeze(replace(job, run=replace(job.run, root="runs"))))
    assert _frozen([str(where), "--frozen"]).run.root == "runs"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("runs/small", "train.steps=9", "--frozen"), "is not one run"),
        (("--frozen",), "is not one run"),
        (("nowhere", "--frozen"), "no run has this name or path"),
    ],
)
def test_frozen_takes_one_run_and_nothing_else(own_run, forescale, words, message):
    assert message in forescale.refuses("train", *words)


def test_a_frozen_class_of_the_user_needs_trust(own_run, forescale):
    config = freeze(thaw(TrainJob, own_run.config))
    head, _, rest = config.partition("model:\n")
    rest = rest[rest.index("\ndata:") :]
    own_run.config.write_text(f"{head}model:\n  _target_: somewhere.Net{rest}")
    err = forescale.refuses("train", "runs/small", "--frozen")
    assert "add trust=true if you trust this file" in err


@pytest.mark.parametrize(
    ("gpu", "words", "says"),
    [
        (None, [], "this machine has no NVIDIA GPU; leave it out."),
        ((8, 0), [], "this machine has a GPU of 8.0; leave it out."),
        ((9, 0), ["model.mlp_width=40"], "multiples of 16; change model.mlp_width, or leave"),
    ],
)
def test_fp8_is_refused_before_a_file_is_written(
    gpu, words, says, forescale, small_data, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hardware, "capability", lambda: gpu)
    monkeypatch.setattr(hardware, "find_spec", lambda name: name)
    job = ["data=dataset", f"data.path={small_data}", "train.steps=2", "precision=bf16"]
    err = forescale.refuses("train", *job, "precision.fp8=tensorwise", *words)
    assert err.startswith("forescale: precision.fp8=tensorwise: ")
    assert says in err
    assert err.count("\n") == 1
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("words", "gib", "ranks"),
    [
        ((), 16, 2),
        (("train.micro_batch=8",), 16, 1),
        (("train.micro_batch=1",), 16, 4),
        (
            ("train.micro_batch=1", "precision=bf16"),
            4.5,
            2,
        ),  # the largest that divides the batch and fits
        (("launch.processes=1",), 16, 1),
        (("launch.processes=1-9", "train.micro_batch=1"), 16, 4),  # of 8, 4, 2 or 1 on five cores
        (("launch.processes=1-9", "train.micro_batch=1", "precision=bf16"), 4.5, 2),
        (("engine.sequence_parallel=2", "train.micro_batch=8"), 16, 2),
    ],
)
def test_cores_are_ranks_as_far_as_batch_and_memory_go(words, gib, ranks, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(5)))
    memory = SimpleNamespace(available=gib * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    assert local_ranks(job_of(TrainJob, overrides_of(TrainJob, [*words]))) == ranks


def test_a_range_names_what_does_not_fit_in_memory(monkeypatch):
    job, lines = job_of(TrainJob, ["launch.processes=1-2"]), []
    monkeypatch.setattr(oom, "fits_here", lambda job, ranks: ranks == 2)
    assert local_sizes(job, lines.append).sizes == [2]
    assert lines == ["Note: launch.processes=1-2: what fits in memory is 2."]
    monkeypatch.setattr(oom, "fits_here", lambda job, ranks: False)
    with pytest.raises(UserError, match="no number of ranks of it fits"):
        local_sizes(job, lines.append)
    monkeypatch.setattr(oom, "fits_here", lambda job, ranks: None)  # a class of the user's own
    assert local_sizes(job, lines.append).sizes == [2, 1]
