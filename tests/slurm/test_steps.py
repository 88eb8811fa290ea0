"""What srun says of tasks that end badly, read; and which of them explains the others."""

import shlex
import subprocess
import sys
import time

import pytest

from forescale.errors import CRASHED, DONE, INTERRUPTED, USER, UserError
from forescale.resilience.diagnosis import Hang, publish_hang
from forescale.resilience.outcome import write_error
from forescale.run.directory import Run
from forescale.slurm.policy import outcome_of
from forescale.slurm.steps import Failure, JobStep, failures, own_scratch

# As srun 24.11 wrote them.
SAID = """\
srun: error: n1: task 0: Exited with exit code 75
srun: Terminating StepId=1.0
srun: error: n2: task 1: Killed
srun: error: n[2-3]: tasks 2-3,5: Terminated
srun: error: n4: task 7: Out Of Memory
srun: error: n4: task 8: Segmentation fault (core dumped)
"""


def test_each_kind_of_end():
    found = [(f.rank, f.host, f.code) for f in failures(SAID)]
    assert found == [
        (0, "n1", 75),
        (1, "n2", -9),
        (2, "n2", -15),
        (5, "n2", -15),
        (7, "n4", -9),
        (8, "n4", -11),
    ]


@pytest.fixture
def attempt(tmp_path):
    return Run(tmp_path / "run").new_attempt().path


def failed(rank, code, how=""):
    return Failure(rank, f"n{rank}", code, how)


def test_all_is_well(attempt):
    assert outcome_of(attempt, 0, [], False).code == DONE


def test_a_users_fault_counts_whatever_the_others_die_of(attempt):
    write_error(attempt, 1, UserError("data.path", "is gone", "bring it back"))
    found = outcome_of(attempt, 143, [failed(0, 75), failed(2, -9), failed(1, USER)], False)
    assert (found.code, found.how) == (USER, "data.path: is gone; bring it back.")
    assert not found.blamed


def test_who_only_lost_a_peer_explains_nothing(attempt):
    found = outcome_of(attempt, 137, [failed(0, CRASHED), failed(1, -9)], False)
    assert (found.code, found.rank) == (-9, 1)
    assert found.blamed.keys() == {"n1"}


def test_a_python_error_is_not_the_nodes(attempt):
    write_error(attempt, 1, ValueError("x"))
    found = outcome_of(attempt, 1, [failed(0, CRASHED), failed(1, CRASHED), failed(2, -15)], False)
    assert found.rank == 1
    assert "ValueError: x" in found.how
    assert not found.blamed


def test_a_device_error_is_the_nodes(attempt):
    write_error(attempt, 1, RuntimeError("CUDA error: uncorrectable ECC error encountered"))
    assert outcome_of(attempt, 1, [failed(1, CRASHED)], False).blamed.keys() == {"n1"}


def test_memory_that_runs_out_is_not_the_nodes(attempt):
    found = outcome_of(attempt, 1, [failed(1, -9, "Out Of Memory")], False)
    assert "memory ran out" in found.how
    assert not found.blamed


def test_a_hang_blames_the_host_that_is_waited_for(attempt):
    publish_hang(attempt, Hang((3,), "n9", "data", 5, 4.0, "rank 3 on n9 stands"))
    assert outcome_of(attempt, 1, [failed(0, CRASHED)], False).blamed == {
        "n9": "rank 3 on n9 stands"
    }


def test_ranks_that_were_asked_are_interrupted_however_they_end(attempt):
    assert outcome_of(attempt, 137, [failed(0, -9)], True).code == INTERRUPTED
    assert outcome_of(attempt, 75, [failed(0, 75)], False).code == INTERRUPTED


def test_srun_that_fails_by_itself_is_a_crash(attempt):
    found = outcome_of(attempt, 1, [], False)
    assert (found.code, found.how) == (CRASHED, "srun ended with code 1, and no task did")


def test_a_step_that_does_not_end_is_killed(tmp_path, monkeypatch):
    """First its tasks, through SLURM; where a node doesn't answer, then srun itself."""
    from forescale.slurm import queue, steps

    ended = []
    monkeypatch.setattr(queue, "end_step", ended.append)
    monkeypatch.setattr(steps, "_LAST", 0.3)
    step = JobStep([sys.executable, "-c", "import time; time.sleep(60)"], {}, tmp_path / "srun.log")
    began = time.monotonic()
    assert step.wait(lambda: time.monotonic() - began > 0.2, lambda: "7.1") == -9
    assert ended == ["7.1"]


def test_a_failed_task_does_not_wait_for_ever_for_the_others(tmp_path, monkeypatch):
    from forescale.slurm import queue, steps

    monkeypatch.setattr(queue, "end_step", lambda step: None)
    monkeypatch.setattr(steps, "_PATIENCE", 0.2)
    monkeypatch.setattr(steps, "_LAST", 0.2)
    said = "print('srun: error: n2: task 1: Killed', flush=True); import time; time.sleep(60)"
    step = JobStep([sys.executable, "-c", said], {}, tmp_path / "srun.log")
    assert step.wait(lambda: False, lambda: "7.1") == -9
    assert step.failures == [Failure(1, "n2", -9, "Killed")]


def test_a_collective_that_hangs_over_several_nodes_blames_none(attempt):
    publish_hang(attempt, Hang((0, 1), "n1, n2", "backward", 5, 4.0, "ranks 0, 1 stand"))
    found = outcome_of(attempt, 1, [failed(0, CRASHED)], False)
    assert (found.how, found.blamed) == ("ranks 0, 1 stand (on n0)", {})


def test_the_scratch_on_a_nodes_disk_is_the_users_own(tmp_path):
    """Its name can be guessed, and code runs from it: nobody else may have made it."""
    place, link = tmp_path / "it's/mine", tmp_path / "link"
    make = lambda path: subprocess.run(  # noqa: E731
        ["bash", "-c", "\n".join(own_scratch(shlex.quote(str(path))))],
        capture_output=True,
        text=True,
    )
    assert make(place).returncode == make(place).returncode == 0
    assert place.stat().st_mode & 0o777 == 0o700
    link.symlink_to(place)
    assert make(link).returncode == 2
    assert f"{link}: belongs to another user, or is a link" in make(link).stderr
