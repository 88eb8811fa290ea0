"""`forescale status` and `logs` of a dataset that is being built."""

import errno
import json
import os
import time

import pytest

from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.prepare.pool import Task
from forescale.data.prepare.share import Crew
from forescale.data.text.files import Files
from forescale.ground.console import silent
from forescale.ground.errors import UserError
from forescale.run.directory import Run
from forescale.slurm import queue
from forescale.slurm.config import SlurmConfig
from forescale.slurm.submission import Submission, facts_of


class Stopped(Exception):
    """The end of a phase in its middle."""


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (path := tmp_path / ".web.building").mkdir()
    return path


@pytest.fixture
def crew(work):
    """A process that has read 3 of 8 MB of a build, in one of two units."""
    crew = Crew(work, silent)

    def stop(tick):
        raise Stopped

    def do(tasks, tick, done):
        for task in tasks:
            task.job(tick)
            done(task)

    jobs = (lambda tick: tick(3_000_000, 0), stop)
    tasks = [Task("", job, (), 1, work / str(i)) for i, job in enumerate(jobs)]
    with pytest.raises(Stopped):
        crew.run("read and hash", "bytes", 8_000_000, tasks, do)
    crew._sign()
    return crew


@pytest.fixture
def submission(tmp_path, monkeypatch):
    """That of job 40, an array of two tasks."""
    monkeypatch.setattr("sys.argv", ["forescale", "submit", "shards", "a.txt", "output=web"])
    jobs = Run(tmp_path / ".web.jobs")
    submission = Submission(jobs.new_job())
    submission.write(**facts_of(SlurmConfig(), [], []), steps=[None, None])
    logs = [submission.path / f"shards-{i}.log" for i in range(2)]
    for i, log in enumerate(logs):
        log.write_text(f"the log of task {i}\n")
    submission.link_logs(logs)
    submission.script.write_text("")
    submission.submitted("40", submission.script, None, 0.0)
    return submission


def test_status_of_a_build_shows_its_phase_and_who_builds(crew, forescale):
    out = forescale.prints("status", "web")
    lines = out.splitlines()
    assert lines[0].endswith("/web: building")
    assert lines[1].startswith("  read and hash: 3.0 of 8.0 MB (38%), 1 of 2 tasks")
    assert f"(process {os.getpid()})  works" in lines[3]
    assert lines[-1] == "Next: wait for its end"
    facts = json.loads(forescale.prints("status", "web", "--json"))
    assert facts["progress"]["tasks"] == [1, 2]
    assert [p["pid"] for p in facts["processes"]] == [os.getpid()]
    crew.leave("")


def test_status_says_how_a_build_ended_and_what_to_type(crew, submission, forescale, monkeypatch):
    monkeypatch.setattr(queue, "is_here", lambda: False)
    crew.leave("/data/x: the disk is full")
    out = forescale.prints("status", "web")
    assert "/web: interrupted" in out
    assert "ago: /data/x: the disk is full\n" in out
    assert "was at read and hash: 3.0 of 8.0 MB (38%), 1 of 2 tasks\n" in out
    again = "forescale submit shards a.txt output=web"
    assert out.splitlines()[-1] == f"Next: {again}; it continues with what is finished"


def test_a_full_disk_is_said_in_words(work, tmp_path, monkeypatch, forescale):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("forescale.data.prepare.work.publish", full)
    (tmp_path / "a.txt").write_text("A text of some words.\n" * 40)
    config = BuildConfig(tokenizer="bytes", validation=0.0)
    with pytest.raises(OSError, match="No space left"):
        build_dataset(Files([tmp_path / "a.txt"]), tmp_path / "web", config)
    assert "ago: storage: the disk is full; free some space" in forescale.prints("status", "web")


def test_a_process_that_was_killed_elsewhere_is_lost(work, forescale):
    (work / "builders").mkdir()
    record = work / "builders" / "n9-7-abcd"
    record.write_text(json.dumps({"host": "n9", "pid": 7, "place": "another"}))
    os.utime(record, (then := time.time() - 600, then))
    out = forescale.prints("status", "web")
    assert "ended: n9 (process 7), 10 min ago: killed, or its machine was lost\n" in out


def test_status_has_what_steps_dropped_so_far_and_the_queues_reason(
    work, submission, forescale, monkeypatch
):
    from forescale.data.prepare.columns import UnitWriter

    step = {"read": [4, 400], "changed": [0, 0], "dropped": {"short": [1, 100]}}
    (work / "curated").mkdir()
    for i in range(3):
        with UnitWriter(work / "curated" / f"{i:06d}") as out:
            out.finish({"tally": {"lengths": [[0, 4], [0, 3]], "steps": {"length": step}}})
    rows = [f"40_{i}|PENDING|QOSMaxJobs|0:00|1:00||N/A|9|{submission.script}" for i in range(2)]
    monkeypatch.setattr(queue, "is_here", lambda: True)
    monkeypatch.setattr(queue, "jobs", lambda ids: [queue.Job.of(row) for row in rows])
    out = forescale.prints("status", "web")
    assert "dropped by steps: 3 of 12 documents (25%), 25% of the bytes (of 3 of 3 " in out
    assert "2 tasks of job 40: pending, SLURM's reason: QOSMaxJobs, it starts when" in out
    assert out.splitlines()[-1].startswith("Next: forescale logs ")


def test_logs_of_a_build_are_those_of_its_newest_job(submission, forescale, monkeypatch):
    monkeypatch.chdir(submission.path.parents[2])
    monkeypatch.setattr(queue, "is_here", lambda: False)
    assert "the log of task 0\n" in forescale.prints("logs", "web")
    assert "the log of task 1\n" in forescale.prints("logs", "web", "rank=1")


def test_of_several_nodes_one_can_be_chosen(submission, forescale, monkeypatch):
    monkeypatch.chdir(submission.path.parents[2])
    monkeypatch.setattr(queue, "is_here", lambda: False)
    (submission.links / "1").unlink()
    submission.links.joinpath("0").write_text("0: curate\n1: tokenise\nsrun: a node is lost\n")
    every = forescale.prints("logs", "web").splitlines()
    assert every[1:-1] == ["0: curate", "1: tokenise", "srun: a node is lost"]
    assert forescale.prints("logs", "web", "rank=1").splitlines()[1:-1] == ["tokenise"]


def test_a_finished_dataset_and_one_that_nobody_knows(tmp_path, monkeypatch, forescale):
    monkeypatch.chdir(tmp_path)
    (text := tmp_path / "a.txt").write_text("a text of some words\n" * 99)
    build_dataset(Files([text]), tmp_path / "web", BuildConfig(tokenizer="bytes"))
    out = forescale.prints("status", "web")
    assert out.startswith(f"Dataset {tmp_path / 'web'}: complete\nNext: forescale train ")
    assert "no job was submitted for it" in forescale.prints("logs", "web")
    with pytest.raises(UserError, match="no run has this name"):
        Run.existing("other")


def test_the_table_of_runs_names_builds_beside_them(crew, forescale):
    assert "Dataset web: building; read and hash: 3.0 of" in forescale.prints(
        "status", "run.root=."
    )
    crew.leave("")
