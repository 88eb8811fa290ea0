"""Attacks on what a run has logged, on real ranks: an attempt that sleeps while a newer one trains,
and rows and directories that are gone."""

import os
import shutil
import signal
import time

import pytest

from forescale.run.directory import Run
from tests import launching

pytestmark = pytest.mark.slow  # each command starts a rank

KEYS = ("launch.processes=1", "train.tokens=null", "train.steps=40", "checkpoint.every=5 steps")
QUICK = (*KEYS, "validation.every=40", "engine=zero0")


def ranks_of(process) -> list[int]:
    return [int(p) for p in os.popen(f"pgrep -P {process.pid}").read().split()]


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A folder with a complete run named first."""
    folder = tmp_path_factory.mktemp("whole")
    launching.train(folder, "run.name=first", f"data.path={dataset}", *QUICK)
    return folder


@pytest.mark.distributed  # alone on the machine: it has to meet a rank in its start-up
def test_an_attempt_that_sleeps_in_its_start_steals_no_history(dataset, tmp_path, whole):
    command = ("run.name=first", f"data.path={dataset}", *QUICK)
    asleep = launching.start(tmp_path, *command)
    run = Run(tmp_path / "first")
    while not (found := ranks_of(asleep)) or not run.attempts():
        assert asleep.poll() is None
        time.sleep(0.01)
    os.kill(found[0], signal.SIGSTOP)  # it imports its libraries
    newer = launching.start(tmp_path, *command)
    output = launching.interrupt(newer, run.path, 23, signal.SIGINT)
    assert newer.returncode == 75, output
    os.kill(found[0], signal.SIGCONT)
    output, _ = asleep.communicate(timeout=120)
    assert asleep.returncode == 2, output
    assert "attempt 2 was started after this one, attempt 1; do nothing" in output
    assert not run.attempts()[0].has_begun
    launching.train(tmp_path, *command)
    assert launching.trajectory(run.path) == launching.trajectory(whole / "first")


def halve(run):
    data = run.metrics.read_bytes()
    run.metrics.write_bytes(data[: len(data) // 2])


GONE = {
    "rows": (halve, "the rows up to step 40, to resume after, are damaged or missing"),
    "attempts": (
        lambda run: shutil.rmtree(run.path / "attempts"),
        "attempts/0001: is missing or empty, but it has saved the checkpoint of step 40",
    ),
    "checkpoints": (
        lambda run: shutil.rmtree(run.checkpoints),
        "checkpoints: is empty or missing, but step 40 of the run was saved",
    ),
}


@pytest.mark.parametrize("name", GONE)
def test_what_is_gone_is_missed(dataset, tmp_path, whole, name):
    harm, said = GONE[name]
    shutil.copytree(whole / "first", tmp_path / "first", symlinks=True)
    harm(Run(tmp_path / "first"))
    command = ("run.name=first", f"data.path={dataset}", *QUICK)
    output = launching.train(tmp_path, *command, code=2)
    assert said in output
    assert "Traceback" not in output
