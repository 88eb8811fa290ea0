"""The main command on real DeepSpeed: it learns, and resumes exactly where it ended.

A thin set; every ZeRO stage on two ranks is in tests/distributed/test_resume.py.
"""

import itertools
import shutil
import signal

import pytest

from forescale import open_run
from tests import launching

ABLE = ("validation.abilities=[copy,recall]", "validation.shots=[0]", "validation.questions=9",
        "validation.prompts=[def,a b]", "validation.prompt_tokens=6")  # fmt: skip
LENGTH = ("train.tokens=null", "train.steps=60", "checkpoint.every=20", "validation.every=20")


@pytest.fixture(scope="module")
def finished(dataset, tmp_path_factory):
    """(run directory, output) of an uninterrupted run on one rank."""
    folder = tmp_path_factory.mktemp("runs")
    output = launching.train(folder, "run.name=whole", f"data.path={dataset}", *LENGTH, cold=True)
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
    assert "Exact: on a CPU a resumed run repeats the unbroken one bit for bit." in output
    assert "exactness" in launching.events(run)
    assert "Next:" in output
    logged = (run / "attempts/0001/rank-0.log").read_text()
    assert "step 60/60 (100.0%) | loss " in logged
    assert logged in output, "the log of rank 0 is what it has printed"
    names = sorted(p.name for p in (run / "checkpoints").iterdir())
    assert names == ["step-00000040", "step-00000060"]


@pytest.fixture(scope="module")
def killed(dataset, tmp_path_factory):
    """(run directory, the command) of a run whose launcher was killed -9 after step 45; other than
    the finished one, it measures abilities and writes texts."""
    folder = tmp_path_factory.mktemp("killed")
    command = (
        "run.name=cut",
        f"data.path={dataset}",
        *LENGTH,
        "checkpoint.background=false",
        *ABLE,
    )
    run = folder / "cut"
    launching.interrupt(launching.start(folder, *command), run, 45, signal.SIGKILL)
    assert not launching.processes(folder), "ranks outlive their launcher"
    assert len(launching.rows(run)) < 60
    return run, command


@pytest.fixture
def cut(killed, tmp_path):
    """(copy of the killed run's directory, the command), to be resumed."""
    run, command = killed
    return shutil.copytree(run, tmp_path / "cut", symlinks=True), command


def test_a_killed_run_resumes_bit_for_bit(finished, cut):
    run, command = cut
    output = launching.train(run.parent, *command)
    assert "Resuming from" in output
    assert "(step 40)" in output
    assert launching.trajectory(run) == launching.trajectory(finished[0])
    assert "numerics_changed" not in launching.events(run)
    assert weights(run) == weights(finished[0]), "what it measures beside must not change a bit"
    scores = launching.rows(run, "validation")
    assert [row["step"] for row in scores] == [20, 40, 60]
    for name in ("copy", "recall"):
        nats = {row[f"ability/{name}/0_nats"] for row in scores}
        assert len(nats) == 3, "each is of the weights of its step"
    texts = launching.texts(run)
    assert [(step, prompt) for step, prompt, _ in texts] == [
        (step, prompt) for step in (20, 40, 60) for prompt in ("def", "a b")
    ]
    assert len({text for *_, text in texts}) > 3
    (step, prompt, text) = texts[-1]
    assert f"step {step}: {prompt!r} goes on as {text!r}" in output


def weights(run):
    """The weights of the last checkpoint, by name."""
    checkpoint = open_run(run).checkpoint(60)
    return {name: checkpoint.tensor(name).tolist() for name in checkpoint.shapes}


@pytest.mark.slow  # one more run in two parts; SIGTERM is in tests/distributed
def test_an_interrupted_run_saves_first_and_repeats_no_step(finished, dataset, tmp_path):
    command = ("run.name=cut", f"data.path={dataset}", *LENGTH)
    run = tmp_path / "cut"
    launching.interrupt(launching.start(tmp_path, *command), run, 28, signal.SIGINT)
    reached = len(launching.rows(run))
    assert reached < 60
    output = launching.train(tmp_path, *command)
    assert "Resuming from" in output
    assert f"(step {reached:,})" in output
    assert launching.trajectory(run) == launching.trajectory(finished[0])


@pytest.mark.slow  # four launches; the order of save and evaluation is in test_callbacks
def test_a_run_killed_in_an_evaluation_resumes_from_the_same_step_and_evaluates_it(
    dataset, tmp_path
):
    """A step is saved first; so nothing is lost, and no evaluation is missing at the end."""
    (tmp_path / "mypackage.py").write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from torch import nn\n"
        "class Bigram(nn.Module):\n"
        "    def __init__(self, vocab_size, folder):\n"
        "        super().__init__()\n"
        "        self.embedding = nn.Embedding(vocab_size, 16)\n"
        "        self.head = nn.Linear(16, vocab_size)\n"
        "        self.folder, self.evaluated = Path(folder), 0\n"
        "    def forward(self, tokens, targets=None):\n"
        "        assert 'torch._dynamo' not in sys.modules, 'nothing is compiled'\n"
        "        self.evaluated += not self.training\n"
        "        kills = self.folder / str(self.evaluated)\n"
        "        if not self.training and kills.exists():\n"
        "            kills.unlink()\n"
        "            os.kill(os.getpid(), 9)\n"
        "        logits = self.head(self.embedding(tokens))\n"
        "        if targets is None:\n"
        "            return logits\n"
        "        return nn.functional.cross_entropy(\n"
        "            logits.float().transpose(1, 2), targets, reduction='none').sum(1)\n"
    )
    # 8 windows of 2 are 4 micro-batches: the 2nd of the first evaluation; then, in a process that
    # has made up for that and evaluated step 40, the 3rd of the last.
    kills, never = tmp_path / "kills", tmp_path / "never"
    for folder in (kills, never):
        folder.mkdir()
    for number in (2, 4 + 4 + 3):
        (kills / str(number)).touch()
    for folder in (kills, never):
        model = ["model._target_=mypackage.Bigram", f"model.folder={folder}"]
        command = (f"run.name={folder.name}-run", f"data.path={dataset}", *LENGTH)
        settings = ("checkpoint.background=false", "optimizer=adamw")
        output = launching.train(
            tmp_path, *command, *settings, model=model, cold=True, PYTHONPATH=str(tmp_path)
        )
        if folder is kills:
            assert "(step 20)" in output
            assert "(step 60)" in output
            assert not list(kills.iterdir())
    keys = ("step", "tokens", "loss", "bits_per_byte", "windows")
    scores = [
        [
            [row[key] for key in keys]
            for row in launching.rows(tmp_path / f"{name}-run", "validation")
        ]
        for name in ("kills", "never")
    ]
    assert scores[0] == scores[1]
    assert [row[0] for row in scores[0]] == [20, 40, 60]
    assert launching.trajectory(tmp_path / "kills-run") == launching.trajectory(
        tmp_path / "never-run"
    )
    saves = launching.events(tmp_path / "kills-run").count("checkpoint_saved")
    assert saves == 3, "the last step is not saved again"


@pytest.mark.slow  # a launch of its own
def test_without_a_usable_checkpoint_it_never_starts_again_at_step_0(cut):
    run, command = cut
    for table in run.glob("checkpoints/*/files.json"):
        table.unlink()
    output = launching.train(run.parent, *command, code=2)
    assert "none of its" in output
    assert "Traceback" not in output
    assert launching.rows(run)[-1]["step"] >= 45


@pytest.mark.slow  # two trainings
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
    output = launching.train(tmp_path, *with_callback(45), code=2, **how)
    assert "step 45: halted: as told" in output
    assert "Traceback" not in output
    kinds = [kind for kind in launching.events(run) if kind != "checkpoint_deleted"]
    assert kinds[-3:] == ["halt", "checkpoint_saved", "ended"]
    output = launching.train(tmp_path, *with_callback(99), **how)
    assert "(step 46)" in output, "a summary is read one step late"
    rows = launching.rows(run)
    assert [row["step"] for row in rows] == list(range(1, 61))
    assert rows[-1]["loss"] < rows[0]["loss"]
    lines = [line.split() for line in (run / "attempts/0002/seen").read_text().splitlines()]
    assert lines == [[str(row["step"]), str(row["loss"])] for row in rows[46:]]
    assert {row["extra.width"] for row in rows} == {24.0}
    assert 0 < rows[0]["extra.spread"] != rows[-1]["extra.spread"]
    parameters = 512 * 24 + 24 * 24 + 24 + 512 * 24 + 512
    assert rows[-1]["flops_6nd"] == 6 * parameters * rows[-1]["tokens"]
