"""Preferences on two real ranks: the reference is the same at any stage and world size, is computed
once, and a run goes on from a checkpoint to the bit without its origin."""

import math
import shutil

import numpy as np
import pytest

from forescale.run.directory import Run
from forescale.run.references import read_references
from tests import launching
from tests.matrix import full_only
from tests.preferences import make_preferences
from tests.questions import make_conversations
from tests.trainer.small_run import make_run

pytestmark = pytest.mark.distributed

LENGTH = ("train.tokens=null", "train.steps=12", "checkpoint.every=5", "validation.every=12")
KIND = ("objective=preferences", "train.sequence_length=64", "precision=fp32")
MODEL = (*launching.TINY, "optimizer.learning_rate=0.003")


@pytest.fixture
def command(tmp_path):
    data = make_conversations(tmp_path / "examples").path
    origin = make_run(data, tmp_path / "origin", "origin", *launching.TINY)
    preferences = make_preferences(tmp_path / "data").path
    begins = (f"run.from.run={origin.path}", "run.from.load=weights")
    return (f"data.path={preferences}", *LENGTH, *KIND, *MODEL, *begins)


@pytest.mark.parametrize("stage", [pytest.param(1, marks=full_only), 3])
def test_a_run_learns_as_one_rank_does_and_resumes_without_its_origin(tmp_path, command, stage):
    command = ("run.name=whole", "checkpoint.keep=9", *command, f"engine=zero{stage}")
    command = (*command, "launch.processes=2")
    output = launching.train(tmp_path, *command)
    run = tmp_path / "whole"
    assert "read preferences: 48 of them" in output
    whole = launching.trajectory(run)
    assert whole[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert whole[-1]["loss"] < 0.68
    references = read_references(Run(run))

    alone = ("engine=zero0", "launch.processes=1", "train.micro_batch=8")
    launching.train(tmp_path, *command, "run.name=one", *alone)
    two, one = (launching.rows(tmp_path / name) for name in ("whole", "one"))
    for key in ("step", "g1", "tokens", "tokens_hash"):
        assert [row[key] for row in two] == [row[key] for row in one]
    for key in ("loss", "extra.rewards/margins", "extra.logps/chosen"):
        assert two[-1][key] == pytest.approx(one[-1][key], rel=1e-3)
    of_one = read_references(Run(tmp_path / "one")).values
    for split in ("train", "validation"):
        pair = (values[split]["data"] for values in (references.values, of_one))
        np.testing.assert_allclose(*pair, rtol=1e-5)

    launching.keep_only(run, 5)
    shutil.rmtree(tmp_path / "origin")
    output = launching.train(tmp_path, *command)
    assert "(step 5)" in output
    assert "read preferences" not in output
    assert launching.trajectory(run) == whole
    assert read_references(Run(run)).source == references.source
