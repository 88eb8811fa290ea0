"""Attacks on what a run has logged, on real ranks: an attempt that sleeps while a newer one trains,
and rows and directories that are gone."""

import shutil
import signal
import time

import pytest

from forescale.run.directory import Run
from tests import launching

pytestmark = pytest.mark.slow  # each command starts a rank

KEYS = ("launch.processes=1", "train.tokens=null", "train.steps=40", "checkpoint.every=5 steps")
QUICK = (*KEYS, "validation.every=40", "engine=zero0")


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A folder with a complete run named first."""
    folder = tmp_path_factory.mktemp("whole")
    launching.train(folder, "run.name=first", f"data.path={dataset}", *QUICK)
    return folder


def suspended_in_its_start(dataset, tmp_path):
    """(process, run, command) of a launch whose rank sleeps before its attempt has begun. On a busy
    machine the rank may be past that: then a run of another name is tried."""
    for name in ("first", "second", "third", "fourth"):
        command = (f"run.name={name}", f"data.path={dataset}", *QUICK)
        process, run = launching.start(tmp_path, *command, cold=True), Run(tmp_path / name)
        while not (ranks := launching.ranks_of(process)) or not run.attempts():
            assert process.poll() is None
            time.sleep(0.01)
        ranks[0].suspend()
        if not run.attempts()[0].has_begun:
            return process, run, command
        process.kill()
        process.communicate()
    raise AssertionError("no rank was met in its start-up")


def test_an_attempt_that_sleeps_in_its_start_steals_no_history(dataset, tmp_path, whole):
    asleep, run, command = suspended_in_its_start(dataset, tmp_path)
    newer = launching.start(tmp_path, *command)
    output = launching.interrupt(newer, run.path, 23, signal.SIGINT)
    assert newer.returncode == 75, output
    launching.ranks_of(asleep)[0].resume()
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
    harm, message = GONE[name]
    shutil.copytree(whole / "first", tmp_path / "first", symlinks=True)
    harm(Run(tmp_path / "first"))
    command = ("run.name=first", f"data.path={dataset}", *QUICK)
    output = launching.train(tmp_path, *command, code=2)
    assert message in output
    assert "Traceback" not in output
