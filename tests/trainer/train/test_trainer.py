"""The main command on real DeepSpeed: it learns, and resumes exactly where it ended.

A thin set; every ZeRO stage on two ranks is in tests/distributed/test_resume.py.
"""

import itertools
import signal

import pytest

from tests import launching

LENGTH = ("train.tokens=null", "train.steps=60", "checkpoint.every=20", "validation.every=20")


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """(run directory, output) of an uninterrupted run on one rank."""
    folder = tmp_path_factory.mktemp("runs")
    output = launching.train(folder, "run.name=whole", f"data.path={dataset}", *LENGTH)
    return folder / "whole", output


def test_a_run_learns_and_writes_its_rows(finished):
    run, output = finished
    rows = launching.rows(run)
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert all(a["g1"] == b["g0"] for a, b in itertools.pairwise(rows))
    assert rows[-1]["loss"] < rows[0]["loss"] - 1
    scores = launching.rows(run, "validation")
    assert [row["step"] for row in scores] == [20, 40, 60]
    assert scores[-1]["loss"] < scores[0]["loss"]
    assert scores[-1]["windows"] > scores[0]["windows"] == 8, "bytes a token differ between them"
    assert "bits per byte" in output
    assert "Next:" in output
    kept = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert kept == ["step-00000040", "step-00000060"]


def test_the_same_command_on_a_complete_run_changes_nothing(finished, dataset):
    run, _ = finished
    before = launching.trajectory(run)
    output = launching.train(run.parent, "run.name=whole", f"data.path={dataset}", *LENGTH)
    assert "is complete" in output
    assert launching.trajectory(run) == before


@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)],
    ids=lambda s: s.name,
)
def test_an_interrupted_run_resumes_bit_for_bit(finished, dataset, tmp_path, number):
    whole, _ = finished
    command = ("run.name=cut", f"data.path={dataset}", *LENGTH, "checkpoint.background=false")
    run = tmp_path / "cut"
    launching.interrupt(launching.start(tmp_path, *command), run, 28, number)
    assert not launching.processes(tmp_path), "ranks outlive their launcher"
    reached = len(launching.rows(run))
    assert reached < 60
    output = launching.train(tmp_path, *command)
    assert "Resuming from" in output
    assert launching.trajectory(run) == launching.trajectory(whole)
    assert "numerics_changed" not in launching.events(run)
    if number == signal.SIGINT:  # it had saved first: nothing was done twice
        assert f"(step {reached:,})" in output


def test_a_damaged_checkpoint_is_passed_over_and_reported(finished, dataset, tmp_path):
    whole, _ = finished
    command = ("run.name=hurt", f"data.path={dataset}", *LENGTH)
    run = tmp_path / "hurt"
    launching.interrupt(launching.start(tmp_path, *command), run, 45, signal.SIGINT)
    newest = sorted((run / "checkpoints").iterdir())[-1]
    file = next(newest.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    output = launching.train(tmp_path, *command)
    assert "checkpoint damaged" in output
    assert "Resuming from" in output
    assert launching.trajectory(run) == launching.trajectory(whole)
    assert "checkpoint_damaged" in launching.events(run)


def test_without_a_usable_checkpoint_it_never_starts_again_at_step_0(finished, dataset, tmp_path):
    command = ("run.name=lost", f"data.path={dataset}", *LENGTH)
    run = tmp_path / "lost"
    launching.interrupt(launching.start(tmp_path, *command), run, 28, signal.SIGINT)
    for table in run.glob("checkpoints/*/files.json"):
        table.unlink()
    output = launching.train(tmp_path, *command, code=2)
    assert "none of its" in output
    assert "Traceback" not in output
    assert launching.rows(run)[-1]["step"] >= 28


def test_a_model_and_a_callback_of_the_users_own(dataset, tmp_path):
    """model._target_ and callbacks: classes that import nothing of forescale but Halt."""
    package = tmp_path / "mypackage.py"
    package.write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Bigram(nn.Module):\n"
        "    def __init__(self, vocab_size, width=16):\n"
        "        super().__init__()\n"
        "        self.embedding = nn.Embedding(vocab_size, width)\n"
        "        self.middle = nn.Linear(width, width)\n"
        "        self.head = nn.Linear(width, vocab_size)\n"
        "    def forward(self, tokens, targets=None):\n"
        "        x = self.embedding(tokens)\n"
        "        self.spread = x.detach().float().std()\n"
        "        logits = self.head(x + self.middle(x).relu())\n"
        "        if targets is None:\n"
        "            return logits\n"
        "        return nn.functional.cross_entropy(\n"
        "            logits.float().transpose(1, 2), targets, reduction='none').sum(1)\n"
        "    def metrics(self):\n"
        "        return {'spread': self.spread, 'width': self.head.in_features}\n"
        "class Recorder:\n"
        "    def __init__(self, folder, engine, at):\n"
        "        self.file, self.at = folder / 'seen', at\n"
        "        assert engine.world.is_main\n"
        "    def see(self, step, summary):\n"
        "        with open(self.file, 'a') as file:\n"
        "            print(summary.step, sum(summary.losses) / step.targets, file=file)\n"
        "        if summary.step == self.at:\n"
        "            from forescale.train.guard import Halt\n"
        "            raise Halt(summary.step, 'as told')\n"
    )

    def with_callback(at):
        return (*command, f"callbacks=[{{_target_: mypackage.Recorder, at: {at}}}]")

    command = ("run.name=own", f"data.path={dataset}", *LENGTH, "checkpoint.background=false")
    how = {"model": ["model._target_=mypackage.Bigram", "model.width=24"]}
    how["PYTHONPATH"] = str(tmp_path)
    run = tmp_path / "own"
    process = launching.start(tmp_path, *with_callback(99), **how)
    launching.interrupt(process, run, 28, signal.SIGKILL)
    output = launching.train(tmp_path, *with_callback(45), code=2, **how)
    assert "Resuming from" in output
    assert "step 45: halted: as told" in output
    assert "Traceback" not in output
    kinds = [kind for kind in launching.events(run) if kind != "checkpoint_deleted"]
    assert kinds[-3:] == ["halt", "checkpoint_saved", "ended"]
    output = launching.train(tmp_path, *with_callback(99), **how)
    assert "(step 46)" in output, "a summary is read one step late"
    rows = launching.rows(run)
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[-1]["loss"] < rows[0]["loss"]
    seen = [line.split() for line in (run / "attempts/0003/seen").read_text().splitlines()]
    assert seen == [[str(row["step"]), str(row["loss"])] for row in rows[46:]]
    assert {row["extra.width"] for row in rows} == {24.0}
    assert 0 < rows[0]["extra.spread"] != rows[-1]["extra.spread"]
    parameters = 512 * 24 + 24 * 24 + 24 + 512 * 24 + 512
    assert rows[-1]["flops_6nd"] == 6 * parameters * rows[-1]["tokens"]
