"""A run mirrored to a real S3 server while it trains, lost, and restored from there."""

import shutil
import signal

import pytest

from forescale.remote.buckets import Folder
from tests import launching
from tests.trainer.remote.test_s3 import bucket, endpoint  # noqa: F401

# An S3 server of its own, whose environment may have to be made, and three short trainings.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_a_run_that_lost_its_directory_goes_on_from_a_bucket(small_data, tmp_path, bucket):  # noqa: F811
    steps = ("train.tokens=null", "train.steps=60", "checkpoint.every=5", "validation.every=60")
    command = (f"data.path={small_data}", "launch.processes=1", *steps)
    launching.train(tmp_path, "run.name=whole", *command)
    mirrored = ("run.name=cut", "checkpoint.mirror=s3://books/runs", *command)
    process = launching.start(tmp_path, *mirrored, "faults=[freeze@21]", cold=True)
    there, run = Folder("s3://books/runs/cut"), tmp_path / "cut"
    try:
        problem = "checkpoints/step-00000015/files.json"
        launching.wait_until(process, lambda: problem in there.list(), problem, every=0.5)
    finally:
        process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    while launching.processes(tmp_path):
        pass
    shutil.rmtree(run)
    # The name and the mirror are enough: everything else is in the config that comes back. So is
    # the fault; that it struck may be lost with the directory, and then it would strike again.
    output = launching.train(tmp_path, *mirrored[:2], "faults=[]", cold=True)
    assert f"Restored {run} from s3://books/runs/cut: step" in output
    assert "Mirrored to s3://books/runs/cut up to step 60." in output
    assert launching.trajectory(run) == launching.trajectory(tmp_path / "whole")
    assert problem not in there.list()  # pruned as in the run
