"""Real ranks under conditions of a cluster: another launcher, and a disk that fills up."""

import os
import signal
import subprocess
import sys
import time
from functools import cache

import pytest

from tests import disks, launching
from tests.matrix import FULL, full_only

LENGTH = ("train.tokens=null", "train.steps=60", "checkpoint.every=10", "validation.every=30")


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    """A function of the number of ranks: the trajectory of a run that nothing happens to."""

    @cache
    def trained(ranks):
        folder = tmp_path_factory.mktemp("undisturbed")
        command = (f"data.path={dataset}", *LENGTH, f"launch.processes={ranks}")
        launching.train(folder, "run.name=ours", *command)
        return launching.trajectory(folder / "ours")

    return trained


@pytest.mark.distributed
def test_torchrun_starts_the_same_run_as_our_launcher(dataset, undisturbed, tmp_path):
    command = (f"data.path={dataset}", *LENGTH)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    words = [*launching.SHORT, *launching.TINY, f"run.root={tmp_path}", "run.name=theirs", *command]
    process = subprocess.run(
        [*torchrun, "-m", "forescale", "train", *words],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr
    run_of_ours = undisturbed(2)
    assert len(run_of_ours) == 60
    assert launching.trajectory(tmp_path / "theirs") == run_of_ours
    assert (tmp_path / "theirs" / "attempts" / "0001").is_dir()


def checkpoints(run):
    return sorted(p.name for p in (run / "checkpoints").iterdir())


@pytest.mark.slow  # runs on several disks
@pytest.mark.parametrize("ranks", [pytest.param(1, marks=full_only), 2])
def test_a_disk_that_fills_up_during_a_save(dataset, undisturbed, tmp_path, ranks):
    """One sentence and code 2; the last checkpoint is complete, and with room the run resumes."""
    from forescale.ground.storage import check_table

    command = (f"data.path={dataset}", *LENGTH, f"launch.processes={ranks}")
    with disks.small_disk(tmp_path / "disk", "4m") as disk:
        run = disk / "cut"
        process = launching.start(tmp_path, f"run.root={disk}", "run.name=cut", *command)
        while not (run / "checkpoints" / "step-00000010").exists():
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.001)
        filling = disks.fill(disk, leave=40_000)  # for rows, not for a checkpoint
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 2, output
        messages = [line for line in output.splitlines() if "the disk is full" in line]
        assert len(messages) == 1, output
        assert str(run) in messages[0]
        assert "Traceback" not in output
        assert checkpoints(run) == ["step-00000010"]
        assert check_table(run / "checkpoints" / "step-00000010") == []
        filling.unlink()
        output = launching.train(tmp_path, f"run.root={disk}", "run.name=cut", *command)
        assert "(step 10)" in output
        assert launching.trajectory(run) == undisturbed(ranks)


@pytest.mark.slow  # a start for each moment
def test_an_interrupt_at_any_moment_of_the_start_up(dataset, tmp_path):
    """While ranks are started, import, join, and train: always code 75, and then it resumes."""
    command = ("run.name=early", f"data.path={dataset}", *LENGTH, "launch.processes=2")
    for delay in (0, 0.1, 0.3, 0.9, 1.5, 2.1)[:: 1 if FULL else 2]:
        process = launching.start(tmp_path, *command, cold=True)
        while "Data" not in process.stdout.readline():
            assert process.poll() is None
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=60)
        assert process.returncode == 75, output
        assert "Traceback" not in output
    launching.train(tmp_path, *command)
    assert [row["step"] for row in launching.rows(tmp_path / "early")] == list(range(1, 61))
