"""Commands in a working directory whose files have the names of modules that we import."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forescale.verbs import VERBS
from tests.matrix import full_only

pytestmark = pytest.mark.slow  # each command is a process of its own
FILES = ("trainer", "random", "torch", "yaml", "types", "json", "numpy", "hydra", "logging", "cli")
FOLDERS = ("models", "conf", "slurm", "trainer", "data")
FORESCALE = str(Path(sys.executable).parent / "forescale")
AS_MODULE = (sys.executable, "-m", "forescale")  # without -P: Python puts this directory first
MODEL = '''
import torch
from torch import nn
from torch.nn import functional as F

class Model(nn.Module):
    """Predict each token from the one before it."""

    def __init__(self, vocab_size: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens, targets=None, **others):
        logits = self.head(self.embedding(tokens))
        if targets is None:
            return logits
        losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        return losses.view(targets.shape).sum(1)
'''
SHORT = (
    *("train.sequence_length=32", "train.global_batch=8", "train.micro_batch=8", "train.steps=3"),
    *("train.compile=off", "optimizer=adamw", "schedule.warmup=1", "validation.windows=2"),
    *("launch.processes=1", "machine=cpu"),
)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    return hostile(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def without_types(tmp_path_factory):
    """The same without types.py, which Python itself would import before our first line if it is
    started with -m and without -P."""
    path = hostile(tmp_path_factory.mktemp("hostile"))
    (path / "types.py").unlink()
    return path


def hostile(path):
    """Make a directory in which every import of a file ends the process."""
    for name in FOLDERS:
        (path / name).mkdir()
        (path / name / "__init__.py").write_text('raise SystemExit("replaced")\n')
        (path / name / "train.yaml").write_text("no: [")
    for name in FILES:
        (path / f"{name}.py").write_text('raise SystemExit("replaced")\n')
    (path / "forescale").mkdir()
    (path / "mypackage.py").write_text(MODEL)
    return path


def run(here, *arguments, command=(FORESCALE,), code=0):
    """The output of a command in this directory."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [*command, *map(str, arguments)], cwd=here, env=environment, capture_output=True, text=True
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "replaced" not in done.stdout + done.stderr
    return done.stdout


def test_every_verb_shows_its_help(here):
    """In one process with the path of the command, which has no working directory in it."""
    code = "import sys; from forescale.cli import main\n"
    code += "for verb in sys.argv[1:]: main([verb, '--help'])"
    printed = run(here, *VERBS, command=(sys.executable, "-P", "-c", code))
    assert all(f"forescale {verb}" in printed for verb in VERBS)
    assert "forescale train" in run(here, "train", "--help")


@pytest.mark.parametrize("verb", ["plan", "study"])
def test_the_module_does_too_without_a_safe_path(without_types, verb):
    assert f"forescale {verb}" in run(without_types, verb, "--help", command=AS_MODULE)


@pytest.fixture(scope="module")
def words(here, small_data):
    """A run of the user's own model, trained in this directory by a launcher and its rank."""
    keys = (f"data.path={small_data}", "model=custom", "model._target_=mypackage.Model")
    return "own", (*keys, "model.width=16", *SHORT)


@pytest.fixture(scope="module")
def trained_here(here, words):
    name, keys = words
    run(here, "train", name, *(k for k in keys if not k.startswith("machine")))
    return name


def test_train_finds_the_users_own_model(here, trained_here):
    assert (here / "runs" / trained_here / "checkpoints").is_dir()


@pytest.mark.slow  # a second real start
def test_a_start_as_a_module_finds_it_too(without_types, words):
    keys = (k for k in words[1] if not k.startswith(("machine", "train.steps")))
    run(without_types, "train", "again", *keys, "train.steps=2", command=AS_MODULE)


@pytest.mark.slow  # two ranks under another launcher
@pytest.mark.parametrize("command", [pytest.param("program", marks=full_only), "module"])
def test_torchrun_starts_ranks_that_find_it(without_types, words, command):
    """Started as `torchrun $(which forescale)`, and as `torchrun -m forescale`."""
    torchrun = (str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node=2")
    started = {"program": ("--no-python", FORESCALE), "module": ("-m", "forescale")}[command]
    swapped = ("machine", "train.steps", "train.micro_batch", "launch")
    keys = (k for k in words[1] if not k.startswith(swapped))
    overrides = ("train.steps=2", "train.micro_batch=4", "checkpoint.every=1 steps")
    run(without_types, "train", command, *keys, *overrides, command=(*torchrun, *started))
    state = without_types / "runs" / command / "checkpoints" / "step-00000002" / "state.json"
    assert json.loads(state.read_text())["world_size"] == 2


def test_plan_finds_it(here, words):
    assert "parameters" in run(here, "plan", words[0], *words[1]).lower()


def test_generate_and_eval_find_it(here, trained_here):
    run(here, "generate", trained_here, "num_tokens=3", "trust=true")
    assert "bits per byte" in run(here, "eval", trained_here, "windows=2", "trust=true")


def test_status_needs_nothing_of_the_user(here, trained_here):
    assert trained_here in run(here, "status")


def test_workers_that_build_a_dataset_are_not_replaced(here, tmp_path):
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"text {i} " * 50)
    keys = ("tokenizer=bytes", "workers=2", f"output={tmp_path / 'data'}")
    run(here, "shards", tmp_path, *keys)
    assert (tmp_path / "data" / "manifest.json").exists()
