"""The user's own code: a copy that its runs use, and logits that are judged."""

import subprocess
from pathlib import Path

import pytest

from forescale import cli
from forescale.ground.errors import UserError
from forescale.run.directory import Run
from forescale.run.rows import read_rows
from forescale.trials import trial
from forescale.trials.judge import Judgement, judged
from forescale.trials.ledger import Ledger
from forescale.trials.own_code import copy_code, expect_code
from tests.trainer.trials.conftest import Simulated

MODEL = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, vocab_size):
        super().__init__()
        self.table = nn.Embedding(vocab_size, 16)
        self.head = nn.Linear(16, vocab_size)

    def forward(self, tokens_BL, targets_BL=None):
        x = self.table(tokens_BL)
        logits = self.head(x)
        if targets_BL is None:
            return logits
        nats = nn.functional.cross_entropy(
            logits.float().transpose(1, 2), targets_BL, ignore_index=-100, reduction="none"
        )
        return nats.sum(1)
"""
BASE = "base=[data=bytes,train.steps=4,train.sequence_length=32,model._target_=mine.Model," \
    "optimizer=adamw]"  # fmt: skip
LIES = MODEL.replace("return nats.sum(1)", "return nats.sum(1) / 2")
LEAKS = MODEL.replace("x = self.table(tokens_BL)", "x = self.table(tokens_BL.roll(-1, 1))")


@pytest.fixture
def code(tmp_path, monkeypatch):
    """The working directory, with a class of the user's own."""
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "mine.py").write_text(MODEL)
    (folder / "notes.md").write_text("no code")
    monkeypatch.chdir(folder)
    return folder


def test_a_copy_has_the_code_alone_and_is_known_by_its_hash(code, tmp_path):
    known = copy_code(code, tmp_path / "copy")
    assert [p.name for p in (tmp_path / "copy").iterdir()] == ["mine.py"]
    (code / "mine.py").write_text(LIES)
    expect_code(tmp_path / "copy", known)
    assert copy_code(code, tmp_path / "other") != known
    (tmp_path / "copy/mine.py").write_text(LIES)
    with pytest.raises(UserError, match="was changed since the attempt began"):
        expect_code(tmp_path / "copy", known)


def test_a_patch_changes_the_copy_and_no_file_outside(code, tmp_path):
    before = code / "before"
    before.mkdir()
    (before / "mine.py").write_text(MODEL)
    (code / "mine.py").write_text(LIES)
    text = subprocess.run(
        ["git", "diff", "--no-index", "before/mine.py", "mine.py"], capture_output=True, text=True
    ).stdout
    patch = tmp_path / "change.diff"
    patch.write_text(text.replace("a/before/mine.py", "a/mine.py"))
    (code / "mine.py").write_text(MODEL)
    subprocess.run(["git", "init", "-q"], cwd=code, check=True)  # as most users' code is in one
    copy_code(code, code / "campaigns/copy", patch)
    assert (code / "campaigns/copy/mine.py").read_text() == LIES
    patch.write_text(patch.read_text().replace("mine.py", "../mine.py"))
    with pytest.raises(UserError, match="can't be applied"):
        copy_code(code, tmp_path / "other", patch)
    assert not (tmp_path / "other").exists()


def test_a_copy_of_the_project_is_no_code_of_ones_own(tmp_path):
    with pytest.raises(UserError, match="is a copy of forescale"):
        copy_code(Path(__file__).parents[3], tmp_path / "copy")


def test_a_changed_copy_is_tried_and_both_sides_are_judged(code, tried, monkeypatch):
    monkeypatch.chdir(code)
    calls = list[tuple[str, Path]]()

    def loss_of(run, folder):
        calls.append((run.path.name, folder))
        return Judgement(Simulated.losses[run.path.name], 0.0)

    monkeypatch.setattr(trial, "judged", loss_of)
    Simulated.gains = {"wide": 0.03}
    changed = code.parent / "changed"
    changed.mkdir()
    (changed / "mine.py").write_text(MODEL.replace("16", "24"))
    for words, part in (
        (["wide", BASE, f"worktree={changed}"], "write equal=tokens"),
        (["wide", "worktree=none", "equal=tokens"], "no such directory"),
        (["wide", f"worktree={code}", "equal=tokens"], "has the code of the base"),
    ):
        status, _, err = tried(*words)
        assert status == 2
        assert part in err
    status, out, _ = tried("wide", f"worktree={changed}", "equal=tokens")
    assert status == 0
    assert "wide: better (confirmed by fresh seeds)." in out
    folders = {name: folder.name for name, folder in calls}
    assert folders["base-s1"] == "base"
    assert folders["wide-s1"] == "wide"
    rows = Ledger(Path("campaigns/first/log.jsonl")).of("judged")
    assert len(rows) == len({row["name"] for row in rows}), "each run once"

    def leaks(run, folder):
        raise UserError(str(run.path), "sees the tokens that it is to predict", "mend it")

    monkeypatch.setattr(trial, "judged", leaks)
    (changed / "mine.py").write_text(MODEL.replace("16", "32"))
    words = ("ahead", f"worktree={changed}", "equal=tokens")
    assert [tried(*words)[0] for _ in range(2)] == [2, 2]
    stops = Ledger(Path("campaigns/first/log.jsonl")).of("stopped")
    assert [row["attempt"] for row in stops] == [2], "in the log, once"
    assert "stopped" in tried()[1]


@pytest.mark.distributed
@pytest.mark.parametrize(("text", "fault"), [(MODEL, ""), (LIES, ""), (LEAKS, "sees the tokens")])
def test_the_judge_asks_for_logits_and_sees_who_looks_ahead(code, text, fault):
    (code / "mine.py").write_text(text)
    words = BASE.removeprefix("base=[").removesuffix("]").split(",")
    words += ["train.compile=off", "precision=fp32"]
    assert cli.main(["train", "one", "run.root=runs", *words, "--cell"]) == 0
    run = Run(code / "runs/one")
    if fault:
        with pytest.raises(UserError, match=fault):
            judged(run, code)
        return
    reported = read_rows(run.metrics, kind="validation")[-1]["loss"]
    ratio = 0.5 if text is LIES else 1.0
    assert reported == pytest.approx(judged(run, code).loss * ratio, rel=1e-5)
