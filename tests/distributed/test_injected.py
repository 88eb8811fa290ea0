"""Requested faults are injected into real ranks, once, and the run ends with the same bits."""

import pytest

from forescale.resilience.injector import records
from forescale.run.directory import Run
from tests import launching

pytestmark = pytest.mark.distributed

TWO = ("launch.processes=2", "train.steps=40", "checkpoint.every=10", "validation.every=40")


def test_ranks_are_killed_and_the_run_resumes_bit_for_bit(dataset, tmp_path):
    command = (f"data.path={dataset}", *TWO)
    launching.train(tmp_path, "run.name=whole", *command)
    faults = "faults=[kill@15:rank1:norm,kill@30:write]"
    output = launching.train(tmp_path, "run.name=struck", faults, *command, cold=True)
    assert output.count("ended with SIGKILL") == 2
    struck = [row["fault"] for row in records(Run(tmp_path / "struck"))]
    assert struck == ["kill@15:rank1:norm", "kill@30:rank0:write"]
    assert launching.trajectory(tmp_path / "struck") == launching.trajectory(tmp_path / "whole")
    assert launching.train(tmp_path, "run.name=struck", faults, *command)  # nothing strikes again


def test_a_full_disk_gives_one_sentence_and_the_same_command_resumes(dataset, tmp_path):
    command = ("run.name=full", f"data.path={dataset}", *TWO, "faults=[enospc@20:rank1]")
    output = launching.train(tmp_path, *command, code=2)
    assert "the disk is full" in output
    assert "Traceback" not in output
    assert Run(tmp_path / "full").checkpoint_steps() == [10]
    launching.train(tmp_path, *command)
    assert [row["step"] for row in launching.rows(tmp_path / "full")] == list(range(1, 41))
