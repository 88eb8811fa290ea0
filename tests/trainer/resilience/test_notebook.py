"""What a notebook does from the first training to an export, without the command line."""

import json
import traceback

import numpy as np
import pytest
from jupyter_client.manager import start_new_kernel

import forescale
from forescale.config.job import overrides_of, words_of
from forescale.config.train import TrainJob
from forescale.ground.errors import CRASHED, DONE, INTERRUPTED, CommandFailed, UserError
from forescale.resilience.notebook import CommandResult
from forescale.run.command import job_of

KEYS = dict(
    model=dict(num_layers=1, width=32, num_heads=2),
    train=dict(steps=8, sequence_length=32, global_batch=4, micro_batch=4),
    checkpoint=dict(every="4 steps"),
    validation=dict(every="8 steps"),
)


def test_keys_are_words_of_a_command_line():
    keys = dict(run=dict(name="a b"), data=dict(path=None), train=dict(seed=3, deterministic=True))
    words = words_of(keys | dict(logging=dict(wandb=dict(tags=["a", "b"]))))
    assert words == [
        "run.name=a b", "data.path=null", "train.seed=3", "train.deterministic=true",
        "logging.wandb.tags=[a,b]",
    ]  # fmt: skip


def test_keys_reach_the_job():
    tags = ["a, b", "it's"]
    words = words_of(KEYS | dict(run=dict(name="x"), logging=dict(wandb=dict(tags=tags))))
    job = job_of(TrainJob, overrides_of(TrainJob, words))
    assert (job.model.width, job.train.steps, job.run.name) == (32, 8, "x")
    assert job.logging.wandb.tags == tags
    assert words_of(dict(train=dict(steps=np.int64(3)))) == ["train.steps=3"]


def test_public_names():
    """`dir` lists them alone; rooms that are imported leave the functions of their names."""
    import forescale.plan.plan
    import forescale.train.model

    assert [name for name in dir(forescale) if name[0] != "_"] == sorted(forescale.__all__)
    for name in forescale.__all__:
        assert callable(getattr(forescale, name))
        assert getattr(forescale, name).__doc__


def test_wrong_values_of_python_are_sentences(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = {
        r"train\.stepz: no such key": lambda: forescale.train(train=dict(stepz=3)),
        r"model\.width: expects a whole number": lambda: forescale.plan(model=dict(width="x")),
        "model: <object": lambda: forescale.train(model=object()),
        "callbacks: .* is no number": lambda: forescale.train(callbacks=[{"_target_": object()}]),
        "show: 3 is no function": lambda: forescale.plan(show=3),
        "5: is no word": lambda: forescale.plan(5),
        "null byte": lambda: forescale.plan("run.name=\0"),
        "target: takes text, not 3": lambda: forescale.export(3),
        "to: takes text, not 3": lambda: forescale.export("first", to=3),
        "first: no run has this name": lambda: forescale.export("first"),
        "data: takes text, not 3": lambda: forescale.finetune("first", 3),
        "first: no run": lambda: forescale.finetune("first", "questions.jsonl"),
        "path: takes text, not 3": lambda: forescale.import_hf(3, "x"),
        "3: is not a path": lambda: (forescale.open_run(3),),
        "None: is not a path": lambda: (forescale.open_dataset(None),),
        "columns: .* is no number": lambda: (forescale.open_study("x", columns=object()),),
    }
    for sentence, wrong in calls.items():
        with pytest.raises(UserError, match=sentence):
            wrong()
    assert not any(tmp_path.iterdir())


def test_an_error_is_its_sentence_in_a_notebook_and_the_last_line_elsewhere():
    error = UserError("train.stepz", "no such key", "correct it")
    assert error._render_traceback_() == [f"UserError: {error}"]
    assert traceback.format_exception(error)[-1].endswith(f"UserError: {error}\n")


class Notebook:
    """A kernel of Jupyter. outputs: of the last cell, by their type."""

    def __init__(self, folder):
        self._manager, self._client = start_new_kernel(kernel_name="python3", cwd=str(folder))

    def run(self, code: str) -> dict[str, list[dict]]:
        outputs: dict[str, list[dict]] = {}
        self._client.execute_interactive(
            code,
            timeout=300,
            output_hook=lambda m: outputs.setdefault(m["msg_type"], []).append(m["content"]),
        )
        return outputs

    def close(self) -> None:
        self._client.stop_channels()
        self._manager.shutdown_kernel(now=True)


@pytest.fixture
def notebook(tmp_path, monkeypatch):
    monkeypatch.setenv("FORESCALE_CACHE", str(tmp_path / "cache"))
    opened = Notebook(tmp_path)
    yield opened
    opened.close()


STOP = """
import signal
def stop_once(line):
    if line.startswith("step 2/"):
        signal.raise_signal(signal.SIGINT)
forescale.train(run=dict(name="cut"), show=stop_once, **slow)
"""


CLASS = """
from torch import nn
class Model(nn.Module):
    def __init__(self, vocab_size: int, width: int = 16):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size)
    def forward(self, tokens_BL, targets_BL=None):
        logits = self.head(self.embedding(tokens_BL) * 2.0)
        if targets_BL is None:
            return logits
        losses = nn.functional.cross_entropy(
            logits.float().mT, targets_BL, ignore_index=-100, reduction="none"
        )
        return losses.sum(1)
classes = {**keys, "model": {"_target_": Model, "width": 8}, "optimizer": "adamw"}
trained = forescale.train(run=dict(name="own"), **classes).model(trust=True)
trained.embedding.weight.shape[1], type(trained).__name__
"""


@pytest.mark.slow  # trains five times
def test_a_notebook(tmp_path, monkeypatch, small_data, notebook):
    """Trains, is interrupted, goes on to the same losses, fine-tunes, exports and imports; shows
    the loss meanwhile, and of a mistake one sentence."""
    monkeypatch.chdir(tmp_path)
    keys = KEYS | dict(data=dict(path=str(small_data)), launch=dict(processes=1))
    slow = keys | dict(logging=dict(every="1 steps"))
    notebook.run(f"import forescale; keys, slow = {keys!r}, {slow!r}")
    (mistake,) = notebook.run("forescale.train(train=dict(stepz=3))")["error"]
    assert mistake["traceback"] == [
        "ConfigError: train.stepz: no such key; did you mean train.steps?"
    ]
    (plan,) = notebook.run("forescale.plan(**keys)")["execute_result"]
    assert plan["data"]["text/plain"].startswith("Plan: 8 steps, 1,024 tokens on 1 GPU")

    outputs = notebook.run("run = forescale.train(run=dict(name='whole'), **keys)")
    assert "step 8/8" in "".join(output["text"] for output in outputs["stream"])
    assert "<svg" in outputs["display_data"][0]["data"]["image/svg+xml"]
    assert outputs["update_display_data"]
    whole = forescale.open_run("whole")
    assert [c.position.step for c in whole.checkpoints()] == [4, 8]

    outputs = notebook.run(STOP)
    assert outputs["error"][0]["traceback"] == [
        "Interrupted: a run that was training is saved; make the same call again to continue"
    ]
    assert "display_data" not in outputs  # `show` is given
    assert 2 <= forescale.open_run("cut").checkpoints()[-1].position.step < 8
    again = forescale.train(run=dict(name="cut"), show=lambda line: None, **slow)
    assert list(again.metrics()["loss"]) == list(whole.metrics()["loss"])
    score = again.evaluate(windows=4)["data"]
    assert score.windows == 4
    assert score.loss > 0

    outputs = notebook.run(CLASS)
    assert outputs["execute_result"][0]["data"]["text/plain"] == "(8, 'Model')"
    outputs = notebook.run(CLASS.replace("* 2.0", "* 3.0"))
    assert "was started with another config: model._target_" in outputs["error"][0]["traceback"][0]

    examples = [{"prompt": f"{i} + 1", "response": str(i + 1)} for i in range(20)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, examples)))
    tune = "chat = forescale.finetune(run, 'sums.jsonl', train=dict(steps=2)); chat.path.name"
    outputs = notebook.run(tune)
    assert outputs["display_data"]
    assert outputs["execute_result"][0]["data"]["text/plain"] == "'whole-sums'"
    outputs = notebook.run("forescale.import_hf(forescale.export(chat, to='hf'), 'back')")
    assert "AutoModelForCausalLM" in "".join(output["text"] for output in outputs["stream"])
    chat, back = forescale.open_run("whole-sums"), forescale.open_run("back")
    weights, imported = chat.model().state_dict(), back.model().state_dict()
    assert all(np.array_equal(weights[name], imported[name]) for name in weights)


def test_the_ends_of_a_command():
    assert CommandResult(DONE, {"path": "runs/x"}, []).result() == {"path": "runs/x"}
    with pytest.raises(KeyboardInterrupt, match="make the same call again"):
        CommandResult(INTERRUPTED, {"path": "runs/x"}, []).result()
    with pytest.raises(CommandFailed, match="rank 0: boom") as failed:
        CommandResult(CRASHED, {"error": {"verb": "train"}}, ["rank 0: boom\n"]).result()
    assert failed.value.code == CRASHED


def test_errors_of_a_command(tmp_path, monkeypatch):
    """What the user can correct is the command's own error; a failure has its last lines."""
    monkeypatch.chdir(tmp_path)
    lines: list[str] = []
    with pytest.raises(UserError, match=r"nowhere: no such dataset; make one"):
        forescale.train(data=dict(path="nowhere"), show=lines.append)
    with pytest.raises(UserError, match="no such directory"):
        forescale.import_hf("nowhere", "x", show=lines.append)  # with torch, it ends slowly
    assert not any("nowhere" in line for line in lines)  # the error has it
