"""Starts that once refused, or began anew: by name alone, after a mistake, in a branch, and under
`accelerate launch`. With real ranks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forescale.checkpoint.retention import is_pinned
from forescale.run.directory import Run
from tests import launching, warm

pytestmark = pytest.mark.slow  # real ranks: some 5 s a start

SIZES = (*launching.SHORT, *launching.TINY, "checkpoint.every=2 steps", "train.steps=16")
MODEL = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, vocab_size: int, width: int = 16):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens_BL, targets_BL=None):
        if tokens_BL.sum().item() < 0:  # no value on the meta device: it can't be tried there
            return None
        logits = self.head(self.embedding(tokens_BL))
        if targets_BL is None:
            return logits
        losses = nn.functional.cross_entropy(
            logits.float().mT, targets_BL, ignore_index=-100, reduction="none"
        )
        return losses.sum(1)


class Late(Model):
    def forward(self, tokens_BL, targets_BL=None):
        if tokens_BL.sum().item() > 0:
            return None + 1
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A working directory with the user's own module in it."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "netz.py").write_text(MODEL)
    return folder


@pytest.fixture(scope="module")
def run(place):
    """Run a command line there: (code, output). launch: a program that starts it as a module."""

    def go(*words, launch=()):
        environment = {**os.environ, "XDG_STATE_HOME": str(place / "state"), "OMP_NUM_THREADS": "1"}
        if not launch:
            process = warm.Launcher([*map(str, words)], place, environment)
            output, _ = process.communicate(timeout=240)
            return process.returncode, output
        done = subprocess.run(
            [*launch, "-m", "forescale", *map(str, words)],
            env=environment,
            cwd=place,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )
        return done.returncode, done.stdout

    return go


@pytest.fixture(scope="module")
def trunk(place, run, dataset):
    """A complete run with a decay from step 13 on, started with a full command."""
    code, output = run("train", "trunk", *SIZES, f"data.path={dataset}")
    assert code == 0, output
    return Run(place / "runs" / "trunk")


def test_a_name_alone_resumes(trunk, run):
    before = launching.trajectory(trunk.path)
    code, output = run("train", "trunk")
    assert code == 0, output
    assert "trunk is complete: 16 steps are trained" in output
    assert launching.trajectory(trunk.path) == before


def test_a_run_that_decayed_grows_from_the_checkpoint_before_the_decay(trunk, run, place, dataset):
    assert trunk.checkpoint_steps() == [12, 14, 16]
    code, output = run("train", "trunk", "train.steps=24")
    assert code == 2
    assert "with run.name=NEW run.from.run=trunk run.from.step=12, or" in output
    words = ("train.steps=20", "run.name=longer", "run.from.run=trunk", "run.from.step=12")
    sizes = [w for w in SIZES if not w.startswith("train.steps")]
    code, output = run("train", *words, *sizes, f"data.path={dataset}")
    assert code == 0, output
    longer = Run(place / "runs" / "longer")
    assert [row["step"] for row in launching.rows(longer.path)] == list(range(13, 21))
    assert is_pinned(trunk, 12)


USERS_MODEL = ("train", "own", "model._target_=netz.Model", "optimizer=adamw", *launching.SHORT)


def test_a_mistake_in_a_class_leaves_nothing_or_a_run_that_takes_the_corrected_command(
    run, place, dataset
):
    data = (f"data.path={dataset}", "train.steps=4")
    code, output = run(*USERS_MODEL, "model.widht=3", *data)
    assert code == 2
    assert "unexpected keyword argument 'widht'" in output
    assert not (place / "runs" / "own").exists()
    code, output = run(*USERS_MODEL, "model._target_=netz.Late", *data)
    assert code == 2
    line = (
        f"forescale: {place / 'netz.py'}, line {MODEL.splitlines().index(_BROKEN) + 1}: TypeError: "
    )
    assert line in output
    assert len(Run(place / "runs" / "own").attempts()) == 1, "it is not tried again"
    assert "Traceback" not in output
    code, output = run(*USERS_MODEL, *data)
    assert code == 0, output
    assert "has made no step yet, so its config is replaced: model._target_: 'netz.Late'" in output
    code, output = run("train", "own")
    assert "own is complete" in output, "this user has named the class before"


_BROKEN = "            return None + 1"


def test_accelerate_launch_trains_as_many_ranks_as_it_was_asked_for(run, place, dataset):
    """Without GPUs it starts one process, and tells it nothing of the two."""
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu"]
    words = ("train", "two", *SIZES, "train.steps=4", f"data.path={dataset}")
    code, output = run(*words, launch=[*launch, "--num_processes=2"])
    assert code == 0, output
    state = json.loads((place / "runs/two/checkpoints/step-00000004/state.json").read_text())
    assert state["world_size"] == 2
    assert [row["step"] for row in launching.rows(place / "runs" / "two")] == [1, 2, 3, 4]
