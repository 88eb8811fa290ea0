"""`forescale logs` and `stop` of runs on this machine."""

import os
import shutil
import signal
import sys
import time
from contextlib import suppress

import psutil
import pytest

from forescale.ground.errors import UserError
from forescale.resilience import outcome
from forescale.resilience.launcher import ATTEMPT
from forescale.run.directory import Run
from forescale.slurm import queue
from forescale.slurm.submission import Submission
from tests.trainer.small_run import make_run


@pytest.fixture
def run(small_data, tmp_path, monkeypatch) -> Run:
    """A run whose newest attempt crashed: rank 1 failed, rank 0 lost it."""
    monkeypatch.chdir(tmp_path)
    run = make_run(small_data, "runs", "small")
    path = run.new_attempt().path
    outcome.record_start(path, ["x"], 2)
    (path / "rank-0.log").write_text("".join(f"step {i}\n" for i in range(100)))
    (path / "rank-1.log").write_text("begun\nValueError: nine\n")
    return run


def test_a_failed_attempt_shows_the_end_of_the_first_failed_ranks_log(run, forescale):
    path = run.attempts()[-1].path
    outcome.record_end(path, 1, "rank 1 ended with ValueError: nine", 1)
    out = forescale.prints("logs", "small", "lines=3")
    assert out.splitlines() == [
        f"== {path}/rank-0.log",
        *["step 97", "step 98", "step 99"],
        "== Attempt 2 ended: rank 1 ended with ValueError: nine.",
        f"== {path}/rank-1.log, the rank that failed first",
        *["begun", "ValueError: nine"],
    ]
    _, out, _ = forescale("logs", "small", "rank=1")
    assert "begun\nValueError: nine\n" in out
    assert "failed first" not in out, "it was just shown"


def test_it_follows_until_the_attempt_ends(run, forescale, monkeypatch):
    path, naps = run.attempts()[-1].path, []

    def nap(seconds):
        """What happens meanwhile."""
        naps.append(seconds)
        if len(naps) == 2:
            with open(path / "rank-0.log", "a") as f:
                f.write("one more\n")
        if len(naps) == 4:
            outcome.record_end(path, 0, "done")

    monkeypatch.setattr(time, "sleep", nap)
    _, out, _ = forescale("logs", "small", "lines=1")
    assert "step 99\none more\n== Attempt 2 ended: done.\n" in out
    assert len(naps) >= 4


def test_ranks_of_a_job_are_in_logs_of_nodes(run, forescale, monkeypatch):
    path = run.new_attempt().path
    outcome.record_start(path, ["srun"], 4, slurm={"nodes": ["a", "b"]})
    log = path / "node-1.log"
    log.write_text("".join(f"{rank}: step {i}\n" for i in range(9) for rank in (2, 3, 23)))

    def nap(seconds):
        """The file is renamed while one follows it."""
        if not seconds:
            return
        log.rename(path / "node-1.log.1")
        log.write_text("2: another\n3: ValueError: nine\n")
        outcome.record_end(path, 1, "rank 2 ended with ValueError", 2)

    monkeypatch.setattr(time, "sleep", nap)
    assert forescale("logs", "small", "rank=3", "lines=2")[1].splitlines() == [
        f"== {log}, rank 3",
        *["step 7", "step 8", "ValueError: nine"],
        "== Attempt 3 ended: rank 2 ended with ValueError.",
        f"== {log}, rank 2, the rank that failed first",
        *[f"step {i}" for i in range(9)],
        "another",
    ]


def test_a_newer_attempt_ends_it_too(run, forescale):
    newer = run.new_attempt().path
    outcome.record_start(newer, ["x"], 2)
    _, out, _ = forescale("logs", "small", "attempt=2", "lines=1")
    assert out.splitlines()[-1] == "step 99"


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("rank=7",), 0, "Rank 7 of small has no log yet"),
        (("attempt=9",), 2, "has no attempt 9"),
        (("rank=null",), 2, "was never submitted"),
    ],
)
def test_what_is_not_there(run, forescale, words, code, message):
    exit_code, out, err = forescale("logs", "small", *words)
    assert exit_code == code
    assert message in out + err


def test_rank_0_of_a_local_run_prints_to_its_terminal(own_run, forescale):
    outcome.record_start(own_run.attempts()[-1].path, ["x"], 1)
    assert "prints to the terminal that started it" in forescale("logs", "small")[1]


@pytest.fixture
def gone(run, monkeypatch, tmp_path) -> Submission:
    """A submission whose job ended early. Stands in for SLURM's commands."""
    monkeypatch.setenv("FORESCALE_CACHE", str(tmp_path / "cache"))
    submission = Submission(run.new_job())
    submission.submitted("12", submission.script, None, 1.7e9)
    submission.write(slurm={}, log=str(submission.path / "slurm.log"))
    facts = {"JobState": "FAILED", "ExitCode": "127:0", "Restarts": "0"}
    monkeypatch.setattr(queue, "is_here", lambda: True)
    monkeypatch.setattr(queue, "jobs", lambda ids: [])
    monkeypatch.setattr(queue, "show", lambda job: facts)
    return submission


def test_the_log_of_a_job_of_which_no_rank_began_is_that_of_its_script(run, forescale, gone):
    gone.log.write_text("begun\npython: command not found\n")
    sentence = "== Job 12 ended before any rank of it began: FAILED, exit code 127."
    end = [sentence, f"== {gone.log}", "begun", "python: command not found"]
    _, out, _ = forescale("logs", "small", "follow=false", "lines=1")
    assert out.splitlines()[-5:] == ["step 99", *end], "after the newest log of a rank"
    shutil.rmtree(run.path / "attempts")
    assert forescale("logs", "small")[1].splitlines() == end
    assert forescale("logs", "small", "rank=null")[1].splitlines() == [*end[1:], sentence]


def test_nobody_waits_for_the_log_of_a_job_that_is_gone(run, forescale, gone, monkeypatch):
    """Its node died: how the attempt ended was never recorded."""
    slurm, end = {"submission": gone.name, "restart": 0}, "how attempt 2 ended was not recorded"
    outcome.record_start(run.attempts()[-1].path, ["srun"], 2, slurm=slurm)
    _, last, sentence = forescale("logs", "small", "lines=1")[1].splitlines()
    assert (last, end in sentence) == ("step 99", True)

    def nap(seconds):
        """It goes on while the queue can't be read; then the job is seen to be gone."""
        monkeypatch.setattr(queue, "jobs", lambda ids: [])
        shutil.rmtree(os.environ["FORESCALE_CACHE"])
        monkeypatch.setattr(time, "monotonic", lambda: 1e9)

    def away(ids):
        raise UserError("squeue", "SLURM says: unable to contact the controller", "see sinfo")

    shutil.rmtree(os.environ["FORESCALE_CACHE"])
    monkeypatch.setattr(queue, "jobs", away)
    monkeypatch.setattr(time, "sleep", nap)
    _, last, sentence = forescale("logs", "small", "lines=1")[1].splitlines()
    assert (last, end in sentence) == ("step 99", True)
    assert time.monotonic() == 1e9


@pytest.fixture
def started(run):
    """Start a process with a child that has an attempt, as launchers have."""
    processes = []

    def start(path):
        code = "import subprocess, sys; subprocess.run(['sleep', '60'])"
        environment = {**os.environ, ATTEMPT: str(path)}
        process = psutil.Popen([sys.executable, "-c", code], env=environment)
        processes.append(process)
        while not process.children():
            time.sleep(0.01)
        facts = {"pid": process.pid, "process": outcome.process_mark(process.pid)}
        outcome.add_to_launch(run.attempts()[-1].path, **facts)
        return process

    yield start
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            for one in (*process.children(), process):
                one.kill()


@pytest.mark.parametrize(("words", "number"), [((), signal.SIGTERM), (("--now",), signal.SIGKILL)])
def test_stop_asks_the_launcher(run, forescale, started, words, number):
    """And no other process with the same process id."""
    path = run.attempts()[-1].path
    process = started(path)
    mark = outcome.process_mark(process.pid)
    outcome.add_to_launch(path, process=mark[:-1])
    code, _, err = forescale("stop", "small", *words)
    assert (code, "neither runs on this machine" in err) == (2, True), "another start"
    outcome.add_to_launch(path, process=mark)
    unfinished = run.checkpoints / ".step-00000009.attempt-0002.stage"
    unfinished.mkdir(parents=True)
    for file in (path, *path.iterdir()):  # as they seem to be after a step of the clock
        os.utime(file, (0, 0))
    assert "the run is training" in forescale("prune", "small", "yes=true")[2]
    assert unfinished.exists()
    assert forescale("stop", "small", *words)[0] == 0
    assert process.wait(10) == -number


def test_stop_signals_no_process_that_a_foreign_file_names(run, forescale, started):
    """Not one of the user's own that trains something else, and none of another user."""
    path = run.attempts()[-1].path
    others = started(path.with_name("0001"))
    assert forescale("stop", "small", "--now")[0] == 2
    assert others.is_running()
    foreign = psutil.Popen(["sleep", "60"], user=65534) if os.getuid() == 0 else psutil.Process(1)
    pid = foreign.pid
    outcome.add_to_launch(path, pid=pid, process=outcome.process_mark(pid))
    code, _, err = forescale("stop", "small", "--now")
    assert (code, f"process {pid}, which started it, belongs to user" in err) == (2, True)
    assert foreign.is_running()
    if os.getuid() == 0:
        foreign.kill()
    for wrong in (True, "1", 10**30, -1, 0):
        outcome.add_to_launch(path, pid=wrong)
        assert forescale("stop", "small", "--now")[0] == 2


TAKEN = 1764172905
SQUEUE = f"echo '12|RUNNING|None|1:00|2:00|n1|N/A|{TAKEN}|{{script}}'"
SCONTROL = """\
[ "$2" = config ] && echo 'ClusterName = {cluster}' && exit
echo 'JobId=12 JobName=a b UserId=me({uid}) Command={script} WorkDir=/tmp'"""


def test_stop_cancels_no_job_that_a_foreign_file_names(run, forescale, tmp_path, monkeypatch):
    """SLURM itself says whose job it is, and of which script."""
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    submission = Submission(run.new_job().resolve())
    script = submission.path / "job.sbatch"

    def cluster(uid, script, name="lab"):
        submission.submitted("12", script, "lab", TAKEN)
        says = {"squeue": SQUEUE.format(script=script)}
        says["scontrol"] = SCONTROL.format(uid=uid, script=script, cluster=name)
        says |= {"sbatch": "", "scancel": f'echo "$@" >> {calls}'}
        for name, line in says.items():
            (programs / name).write_text(f"#!/bin/sh\n{line}\n")
            (programs / name).chmod(0o755)

    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    mine = os.getuid()
    script.write_text(f"jobs=(\n    {submission.path}\n)\n")
    cluster(mine, script)
    assert "the run is complete, and its job 12 ends by itself" in forescale("stop", "small")[2]
    shutil.rmtree(run.checkpoint_path(max(run.checkpoint_steps())))
    script.write_text(f"jobs=(\n    {submission.path.parent}/0009\n)\n")
    for uid, path in ((mine, "/tmp/an other"), (mine, script), (mine + 1, script)):
        cluster(uid, path)
        code, _, err = forescale("stop", "small", "--now")
        assert (code, "doesn't know as a job of yours for this run" in err) == (2, True)
        script.write_text(f"jobs=(\n    {submission.path}\n)\n" * (path == script))
    assert not calls.exists()
    assert not submission.is_stopped
    script.write_text(f"jobs=(\n    {submission.path}\n)\n")
    cluster(mine, script, "another")
    assert forescale("stop", "small", "--now")[0] == 2
    assert not calls.exists()
    cluster(mine, script)
    assert forescale("stop", "small", "--now")[0] == 0
    assert calls.read_text() == "12\n"
