"""What `status` and `logs` show of a run in the queue; SLURM's commands are stood in for."""

import json
import os
import re
import shutil
import time

import pytest

from forescale.ground.errors import UserError
from forescale.ground.storage import write_json
from forescale.run.directory import Run
from forescale.slurm import queue
from forescale.slurm.submission import Submission
from tests.trainer.monitor.changed_run import age_by, changed_rows, say_how_it_went
from tests.trainer.small_run import make_run


def submitted(run: Run) -> Submission:
    """Of job 7."""
    submission = Submission(run.new_job())
    submission.submitted("7", submission.script, None, 1.7e9)
    submission.write(slurm={}, log=str(submission.path / "slurm.log"))
    return submission


def queued(submission: Submission, state: str) -> queue.Job:
    times = ("0:10", "9:50", "n[1-2]", 0.0, 1.7e9)
    return queue.Job("7", state, "Resources", *times, str(submission.script))


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """Stands in for SLURM's commands: cluster(jobs in the queue, scontrol's facts)."""
    monkeypatch.setenv("FORESCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(queue, "is_here", lambda: True)

    def has(*jobs, **facts):
        monkeypatch.setattr(queue, "jobs", lambda ids: list(jobs))
        monkeypatch.setattr(queue, "show", lambda job: facts)

    return has


def test_an_unreachable_queue_hides_no_run(own_run, forescale, monkeypatch, cluster):
    """SLURM's commands are there, and its controller can't be reached."""

    def away(ids):
        raise UserError("squeue", "SLURM says: unable to contact the controller", "see sinfo")

    submitted(own_run)
    monkeypatch.setattr(queue, "jobs", away)
    code, out, _ = forescale("status")
    assert code == 0
    assert "The queue can't be read: squeue: SLURM says: unable to contact" in out
    assert re.search(r"small +complete", out)
    assert forescale("status", "small")[0] == 0
    assert forescale("logs", "small", "follow=false")[0] == 0
    code, _, err = forescale("stop", "small")
    assert (code, "unable to contact" in err) == (2, True)


@pytest.mark.parametrize(
    ("state", "sentence"), [("PENDING", r"queued \(Resources\)"), ("RUNNING", "running")]
)
def test_the_state_of_a_run_in_the_queue(
    forescale, small_data, tmp_path, monkeypatch, cluster, state, sentence
):
    monkeypatch.chdir(tmp_path)
    run = make_run(small_data, "runs", "other")
    shutil.rmtree(run.checkpoints)
    cluster(queued(submitted(run), state))
    _, out, _ = forescale("status")
    assert re.search(f"other +{sentence}", out), out
    _, out, _ = forescale("status", "other")
    assert ("waits in the queue (Resources)" in out) == (state == "PENDING")
    assert ("runs on n[1-2] for 0:10; 9:50 are left" in out) == (state == "RUNNING")


def test_a_job_that_died_before_our_process_began_is_told(unfinished, forescale, cluster):
    """In the table, on the page with the end of its log, and to programs."""
    submission = submitted(unfinished)
    (submission.path / "slurm.log").write_text("x" * 99 + "\nmodule load: no module [bold]cuda\n")
    cluster(JobState="FAILED", ExitCode="1:0", Restarts="0", Command=str(submission.script))
    _, out, _ = forescale("status")
    assert re.search(r"small +failed +2 ", out)
    sentence = "Job 7 ended before any rank of it began: FAILED, exit code 1."
    assert f"small: {sentence} See forescale logs small" in out
    _, out, _ = forescale("status", "small")
    assert f"{sentence} Its log, {submission.log}, ends:" in out
    assert "\n  module load: no module [bold]cuda\n" in out
    status = json.loads(forescale("status", "small", "--json")[1])
    assert (status["state"], status["job"]["state"], status["job"]["exit"]) == (
        "crashed",
        "FAILED",
        "1",
    )


def test_nothing_is_said_of_a_job_that_cannot_be_known(unfinished, forescale, monkeypatch, cluster):
    submitted(unfinished)
    cluster()
    assert re.search(r"small +never began", forescale("status")[1])
    assert (
        "no longer in the queue, and no rank of it began. No log: "
        in forescale("status", "small")[1]
    )
    monkeypatch.setattr(queue, "is_here", lambda: False)
    assert re.search(r"small +running", forescale("status")[1])


def test_a_job_that_runs_has_not_failed_however_long_it_writes_nothing(
    unfinished, forescale, cluster
):
    """So there is no advice that would rest on its failure."""
    with changed_rows(unfinished) as rows:
        rows[-1]["seconds"]["checkpoint"] = 0.5
    say_how_it_went(unfinished.attempts()[0], 0)
    write_json(unfinished.attempts()[1].path / "launch.json", {"begun": time.time() - 5000})
    submission = submitted(unfinished)
    age_by(unfinished, 3600)
    cluster()
    assert "checkpoint.every" in forescale("status", "small")[1]
    shutil.rmtree(os.environ["FORESCALE_CACHE"])
    cluster(queued(submission, "RUNNING"))
    _, out, _ = forescale("status", "small")
    assert "checkpoint.every" not in out
    assert re.search(r"^ +2 +step 4 .* running *$", out, re.MULTILINE)
