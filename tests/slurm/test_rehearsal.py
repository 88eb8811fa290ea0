"""What `forescale submit` says of a job's rehearsal, and makes of one for a job that is dear."""

import shlex
from dataclasses import replace

import pytest

from forescale.cli import main
from forescale.config.job import overrides_of
from forescale.config.schema import ConfigError, Problem
from forescale.ground.errors import UserError
from forescale.plan.plan import Plan
from forescale.rehearsal.config import RehearseJob
from forescale.run.command import job_of
from forescale.slurm import queue
from forescale.slurm.config import SubmitJob
from forescale.slurm.rehearsal import rehearsal_of
from forescale.slurm.submit import submit as submit_run
from tests.trainer.small_run import certify


def test_it_says_what_the_last_rehearsal_showed(tmp_path, monkeypatch, capsys, dataset):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    monkeypatch.setenv("FORESCALE_CACHE", str(tmp_path / "cache"))
    gpus = ("slurm.gpus_per_node=4", "slurm.nodes=2", "train.global_batch=64", "train.steps=200")

    def output(*words):
        data = ("data=dataset", f"data.path={dataset}")
        main(["submit", "train", "x", *gpus, *data, *words])
        return capsys.readouterr().out

    out = output()
    command = shlex.split(out.partition("Not rehearsed: ")[2].splitlines()[0])
    assert command[:2] == ["forescale", "rehearse"]
    job = job_of(RehearseJob, overrides_of(RehearseJob, command[2:]))  # the command rehearses it
    plan = Plan(job)
    certify(plan.job, job.gpus)
    out = output()
    assert "Rehearsed at 1970-01-01 00:00 UTC on 8 H100 SXM 80 GB: peak 3.0 GiB, 1 wait" in out
    assert "Not rehearsed" not in out
    out = output("engine=zero3")
    assert "is stale: engine.stage 1 -> 3." in out
    assert "Rehearse it: forescale rehearse " in out
    (tmp_path / "sweep.txt").write_text("train.seed=3")
    assert "forescale rehearse" not in output("slurm.runs=sweep.txt"), "it would be another job's"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["machine=a100-80g"], "machine=a100-80g"),
        (["machine=h200", "machine.link_efficiency=0.5"], "machine.link_efficiency=0.5"),
    ],
)
def test_the_command_that_rehearses_names_a_recalled_machine(keys, expected):
    gpus = ["slurm.gpus_per_node=4", "slurm.nodes=2", "train.global_batch=64"]
    plan = Plan(job_of(SubmitJob, [*gpus, *keys]))
    _, command = rehearsal_of(plan, gpus)  # the machine is not in the words of the command
    assert expected in command
    job = job_of(RehearseJob, overrides_of(RehearseJob, command))
    assert job.machine == replace(plan.machine, gpus_per_node=4)


def test_a_dear_job_is_rehearsed_before_it_is_queued(tmp_path, monkeypatch, capsys, dataset):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FORESCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(queue, "must_be_here", lambda: None)
    monkeypatch.setattr(queue, "largest_array", lambda: None)
    monkeypatch.setattr(queue, "expect_accepted", lambda script: None)
    calls, crash = list[list[str]](), Problem("rank 0", "in forward, at model.py:3: crashes", "")
    results = [([crash], ""), ([], "Rehearsed: peak 3 GiB."), UserError("rehearse", "no g++", "?")]

    def rehearse(words):
        calls.append(words)
        if isinstance(result := results[len(calls) - 1], UserError):
            raise result
        return result

    def output(name, *words):
        words = (f"run.name={name}", "slurm.gpus_per_node=8", "slurm.nodes=2", *words)
        words += (f"data.path={dataset}", "data=dataset", "train.global_batch=64")
        with pytest.raises(UserError) as error:
            submit_run(words, rehearse=rehearse)
        return capsys.readouterr().out, error.value

    monkeypatch.setattr(Plan, "gpu_hours", 500.0)
    _, error = output("dear")
    assert isinstance(error, ConfigError)  # its exit code is 2
    (problem,) = error.problems
    assert "model.py:3" in problem.problem
    assert "submit.rehearse=off" in problem.todo
    assert calls[0][0] == "dear"
    assert not (tmp_path / "runs" / "dear").exists()

    def full(script):
        raise UserError("sbatch", "takes no job now", "wait")

    monkeypatch.setattr(queue, "submit", full)
    assert "peak 3 GiB" in output("dear")[0]
    assert "no g++" in output("dear")[0]  # a machine that can't is no reason to refuse it
    for words in (["submit.rehearse=off"], ["slurm.time=2h"]):
        assert "Not rehearsed: forescale rehearse dear " in output("dear", *words)[0]
    assert len(calls) == 3
