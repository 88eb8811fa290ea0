"""SLURM is asked seldom, and what it said is kept safe. Its commands are scripts that note each
call and say what a test puts into their files."""

import json
import os
import stat
import time

import pytest

from forescale.ground.errors import UserError
from forescale.resilience import outcome
from forescale.run.directory import Run
from forescale.slurm import queue, queue_cache
from forescale.slurm.submission import Submission

QUEUED = "{}|RUNNING|None|1:00|2:00|n1|N/A|1767225600|{}\n"


class Clock:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now = time.time()

    def time(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds


class Slurm:
    def __init__(self, folder):
        self.folder = folder
        for name in ("sbatch", "squeue", "scontrol"):
            path = folder / name
            path.write_text(f'#!/bin/sh\necho "$@" >> {path}.calls\ncat {path}.says || exit 1\n')
            path.chmod(0o755)
            self.says(name, "")

    def says(self, name, text):
        (self.folder / f"{name}.says").write_text(text)

    def calls(self, name):
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(queue_cache, "time", clock)
    return clock


@pytest.fixture
def slurm(tmp_path, monkeypatch, clock):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("FORESCALE_CACHE", str(tmp_path / "cache"))
    stub = Slurm(tmp_path / "bin")
    stub.says("squeue", QUEUED.format(12, "s") + QUEUED.format("40_1", "s"))
    return stub


def stored(tmp_path):
    (path,) = (tmp_path / "cache").glob("queue-*.json")
    return path


def ids(*numbers):
    return [job.id for job in queue_cache.jobs(numbers)]


def test_the_queue_is_asked_once_in_ten_seconds(slurm, clock):
    assert [ids("12", "40"), ids("12"), ids("40")] == [["12", "40_1"], ["12"], ["40_1"]]
    clock.sleep(9.0)
    assert ids("12") == ["12"]
    assert len(slurm.calls("squeue")) == 1
    slurm.says("squeue", "")
    clock.sleep(1.1)
    assert ids("12") == []
    assert [call.split("--jobs=")[1] for call in slurm.calls("squeue")] == ["12,40"] * 2


def test_a_new_question_waits_for_its_turn(slurm, clock):
    began = clock.now
    ids("12")
    assert ids("40") == ["40_1"]
    assert clock.now - began >= queue_cache.EVERY
    assert len(slurm.calls("squeue")) == 2
    clock.sleep(300)
    ids("12")
    assert slurm.calls("squeue")[2].endswith("--jobs=12"), "nobody looks at the other any more"


def test_a_queue_that_does_not_answer_is_left_alone_too(slurm, clock):
    os.remove(slurm.folder / "squeue.says")
    for _ in range(3):
        with pytest.raises(UserError, match="squeue: SLURM says"):
            queue_cache.jobs(["12"])
    assert len(slurm.calls("squeue")) == 1
    slurm.says("squeue", QUEUED.format(12, "s"))
    clock.sleep(queue_cache.EVERY)
    assert ids("12") == ["12"]


def test_what_decides_asks_the_queue_itself(slurm):
    ids("12")
    slurm.says("squeue", "")
    assert queue.jobs(["12"]) == []


def test_the_answer_is_for_its_user_alone(slurm, tmp_path):
    ids("12")
    for path in (tmp_path / "cache").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def damaged(path):
    """Ways in which the file may not be what was written."""
    whole = path.read_text()
    yield "cut", lambda: path.write_text(whole[: len(whole) // 2])
    yield "empty", lambda: path.write_text("")
    yield "no object", lambda: path.write_text("[1]")
    yield "other values", lambda: path.write_text(json.dumps({**json.loads(whole), "jobs": 7}))
    yield "another job", lambda: path.write_text(whole.replace('"state"', '"stat"'))
    yield "deep", lambda: path.write_text("[" * 100_000)
    yield "future", lambda: path.write_text(json.dumps({**json.loads(whole), "at": 9e12}))
    yield "open", lambda: path.chmod(0o644)
    yield "link", lambda: (path.rename(path.with_name("x")), path.symlink_to(path.with_name("x")))
    yield "folder", lambda: (path.unlink(), path.mkdir())
    yield "pipe", lambda: (path.rmdir(), os.mkfifo(path, 0o600))
    if os.getuid() == 0:
        yield "foreign", lambda: (path.unlink(), path.write_text(whole), os.chown(path, 65534, 0))


def test_a_damaged_or_foreign_answer_counts_for_nothing(slurm, tmp_path):
    ids("12")
    for count, (name, harm) in enumerate(damaged(stored(tmp_path)), 2):
        harm()
        assert ids("12") == ["12"], name
        assert len(slurm.calls("squeue")) == count, name


def test_where_nothing_can_be_kept_slurm_is_asked_each_time(slurm, tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert ids("12") == ids("12") == ["12"]
    assert len(slurm.calls("squeue")) == 2


@pytest.fixture
def submission(tmp_path, slurm) -> Submission:
    submission = Submission(Run(tmp_path / "run").new_job())
    submission.submitted("12", submission.script, None, 1.7e9)
    submission.write(slurm={}, log=str(submission.path / "slurm.log"))
    ended(slurm, submission)
    return submission


def ended(slurm, submission, state="FAILED", code="127:0", restarts=0):
    facts = f"JobId=12 JobState={state} ExitCode={code} Restarts={restarts}"
    slurm.says("scontrol", f"{facts} Command={submission.script} WorkDir=/tmp\n")


def start(submission, restart=0):
    path = submission.run.new_attempt().path
    outcome.record_start(
        path, ["srun"], 1, slurm={"submission": submission.name, "restart": restart}
    )


def test_a_job_that_ended_before_any_rank_is_told_with_its_code_and_log(slurm, clock, submission):
    (submission.path / "slurm.log").write_text("one\ntwo\nbash: python: command not found\n")
    end = queue_cache.early_end(submission)
    assert end.sentence == "Job 12 ended before any rank of it began: FAILED, exit code 127."
    assert end.tail(2) == ["two", "bash: python: command not found"]
    slurm.says("scontrol", "")
    clock.sleep(3 * 3600)
    assert queue_cache.early_end(submission) == end
    assert len(slurm.calls("scontrol")) == 1, "an end stays as it is"
    later = Submission(submission.run.new_job())
    later.submitted("12", later.script, None, 1.8e9)
    assert queue_cache.early_end(later).state is None, "ids may begin anew"


def test_the_signal_that_ended_it_is_told(slurm, submission):
    ended(slurm, submission, "OUT_OF_MEMORY", "0:9")
    assert queue_cache.early_end(submission).sentence.endswith(
        "OUT_OF_MEMORY, exit code 0 (signal 9)."
    )
    assert queue_cache.early_end(submission).tail(5) == [], "it has no log"


def test_of_a_job_that_slurm_has_forgotten_no_more_is_said_than_is_known(slurm, submission):
    slurm.says("scontrol", "JobId=12 JobState=FAILED Command=/somebody/elses WorkDir=/tmp\n")
    sentence = "Job 12 is no longer in the queue, and no rank of it began."
    assert queue_cache.early_end(submission).sentence == sentence


def test_a_job_of_which_ranks_began_did_not_end_early(slurm, submission):
    start(submission)
    assert queue_cache.early_end(submission) is None


def test_only_the_last_start_of_a_job_counts(slurm, submission):
    """SLURM started it again, on a node that lacks what the first one had."""
    start(submission)
    ended(slurm, submission, restarts=1)
    assert queue_cache.early_end(submission).code == "127"
    start(submission, restart=1)
    assert queue_cache.early_end(submission) is None


def test_what_is_in_the_queue_after_all_or_was_stopped_has_not_ended(slurm, submission):
    ended(slurm, submission, "PENDING", "0:0")
    assert queue_cache.early_end(submission) is None
    ended(slurm, submission)
    assert queue_cache.early_end(submission) is not None
    submission.stop()
    assert queue_cache.early_end(submission) is None


def test_without_slurm_nothing_is_asked(submission, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert queue_cache.in_queue([submission]) == []
    assert queue_cache.early_end(submission) is None
