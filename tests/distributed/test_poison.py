"""Poisoned data on real ranks: the update is dropped, the run rolls back, or it halts."""

import json
import signal

import pytest

from tests import launching
from tests.matrix import full_only

pytestmark = pytest.mark.distributed

LENGTH = ("train.tokens=null", "train.steps=60", "checkpoint.every=10", "validation.every=60")
RULES = ("guard.warmup=8", "guard.window=16", "guard.back=5", "guard.cooldown=0")
MODEL = """
import torch
from torch import nn

class Model(nn.Module):
    # A window with many bytes 1 ruins its loss, as a damaged document can.
    def __init__(self, vocab_size, ruin):
        super().__init__()
        self.ruin = float("nan") if ruin < 0 else float(ruin)
        self.embedding = nn.Embedding(vocab_size, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, vocab_size)

    def forward(self, tokens, targets=None):
        logits = self.head(self.norm(self.embedding(tokens)))
        if targets is None:
            return logits
        losses = nn.functional.cross_entropy(
            logits.float().transpose(1, 2), targets, reduction="none", ignore_index=-100).sum(1)
        poisoned = (tokens == 1).sum(1) > 12
        return losses * torch.where(poisoned, self.ruin, 1.0)
"""


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory):
    """Plain text with two documents of bytes 1, for a tokenizer of bytes."""
    from forescale.data.prepare.builder import BuildConfig, build_dataset
    from forescale.data.text.files import Files

    root = tmp_path_factory.mktemp("poisoned")
    (root / "text").mkdir()
    for i in range(40):
        (root / "text" / f"{i:02d}.txt").write_text(f"the story of {i} and its end. " * 20)
    for i in range(2):
        (root / "text" / f"poison-{i}.txt").write_text("\x01" * 40 + str(i))
    config = BuildConfig(tokenizer="bytes", validation=0.1)
    build_dataset(Files([root / "text"]), root / "dataset", config)
    (root / "poisoned.py").write_text(MODEL)
    return root


def train(root, folder, name, ruin, *overrides, start=False, code=0):
    how = {"model": ["model._target_=poisoned.Model", f"model.ruin={ruin}"]}
    how["PYTHONPATH"] = str(root)
    command = (f"run.name={name}", f"data.path={root / 'dataset'}", *LENGTH, *RULES, *overrides)
    if start:
        return launching.start(folder, *command, **how)
    return launching.train(folder, *command, code=code, **how)


def parents(run):
    return [json.loads(p.read_text()) for p in sorted(run.glob("attempts/*/parent.json"))]


@pytest.mark.parametrize(
    ("ruin", "policies"),
    [
        ("-1", ("guard.non_finite=rollback",)),
        pytest.param("1000", ("guard.loss_spike=rollback",), marks=full_only),
        ("1000", ("guard.gradient_spike=rollback", "engine=zero3")),
    ],
)
def test_after_rollbacks_a_run_equals_one_whose_config_skips_the_same_samples(
    poisoned, tmp_path, ruin, policies
):
    policies = (*policies, "guard.most_rollbacks=9", "launch.processes=2")
    output = train(poisoned, tmp_path, "anomalous", ruin, *policies)
    assert "Rolling back" in output
    run = tmp_path / "anomalous"
    skipped = parents(run)[-1]["skipped"]
    assert len(parents(run)) > 1
    assert "rollback" in launching.events(run)
    train(poisoned, tmp_path, "skips", ruin, *policies, f"data.skip={skipped}")
    assert len(parents(tmp_path / "skips")) == 1
    assert launching.trajectory(run) == launching.trajectory(tmp_path / "skips")
    assert [row["step"] for row in launching.rows(run)] == list(range(1, 61))


def test_a_kill_after_a_rollback_does_not_bring_skipped_samples_back(poisoned, tmp_path):
    """The kill comes before the next checkpoint; the only existing one doesn't know of them."""
    policies = ("guard.non_finite=rollback", "guard.most_rollbacks=9")
    train(poisoned, tmp_path, "whole", "-1", *policies)
    process = train(poisoned, tmp_path, "cut", "-1", *policies, start=True)
    run = tmp_path / "cut"
    while len(parents(run)) < 2:
        assert process.poll() is None, process.stdout.read()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    train(poisoned, tmp_path, "cut", "-1", *policies)
    assert launching.trajectory(run) == launching.trajectory(tmp_path / "whole")


def test_a_skip_drops_the_update_and_a_halt_saves_the_last_healthy_step(poisoned, tmp_path):
    train(poisoned, tmp_path, "skips", "-1", "guard.non_finite=skip")
    rows = launching.rows(tmp_path / "skips")
    dropped = [row["step"] for row in rows if not row["applied"]]
    assert dropped
    assert len(rows) == 60
    output = train(poisoned, tmp_path, "halts", "-1", "guard.non_finite=halt", code=2)
    assert f"step {dropped[0]}" in output
    assert "Traceback" not in output
    saved = sorted(p.name for p in (tmp_path / "halts" / "checkpoints").glob("step-*"))
    assert saved[-1:] == ([f"step-{dropped[0] - 1:08d}"] if dropped[0] > 1 else [])
