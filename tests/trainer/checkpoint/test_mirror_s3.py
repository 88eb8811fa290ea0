"""A run mirrored to a real S3 server while it trains, lost, and restored from there."""

import shutil
import signal

import pytest

from forescale.data.remote.folder import Folder
from tests import launching
from tests.trainer.data.remote.test_s3 import bucket, endpoint  # noqa: F401

pytestmark = pytest.mark.slow  # an S3 server of its own, and three short trainings


def test_a_run_that_lost_its_directory_goes_on_from_a_bucket(small_data, tmp_path, bucket):  # noqa: F811
    steps = ("train.tokens=null", "train.steps=60", "checkpoint.every=5", "validation.every=60")
    command = (f"data.path={small_data}", "launch.processes=1", *steps)
    launching.train(tmp_path, "run.name=whole", *command)
    mirrored = ("run.name=cut", "checkpoint.mirror=s3://books/runs", *command)
    process = launching.start(tmp_path, *mirrored, "faults=[freeze@21]")
    there, run = Folder("s3://books/runs/cut"), tmp_path / "cut"
    try:
        while "checkpoints/step-00000015/files.json" not in there.list():
            assert process.poll() is None, process.stdout.read()
    finally:
        process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    while launching.processes(tmp_path):
        pass
    shutil.rmtree(run)
    # The name and the mirror are enough: everything else is in the config that comes back.
    output = launching.train(tmp_path, *mirrored[:2])
    assert f"Restored {run} from s3://books/runs/cut: step" in output
    assert "Mirrored to s3://books/runs/cut up to step 60." in output
    assert launching.trajectory(run) == launching.trajectory(tmp_path / "whole")
    assert "checkpoints/step-00000015/files.json" not in there.list()  # pruned as in the run
