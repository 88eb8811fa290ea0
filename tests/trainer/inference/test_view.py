"""The Python door: what a notebook gets from a run's directory."""

import json
import math
import subprocess
import sys

import numpy as np
import pandas
import pytest
import torch

import forescale
from forescale.config.frozen import freeze, thaw
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.ground.storage import read_json, write_json
from forescale.inference import view
from forescale.run.rows import RowWriter, read_rows
from forescale.train.model import build_model
from tests.trainer.small_run import SHIFT, STEPS, make_run


def test_importing_the_door_is_light():
    code = "import sys, forescale; sys.exit(any(m in sys.modules for m in ('torch', 'pandas')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_metrics_are_frames_with_a_row_a_step(trained):
    run = forescale.open_run(trained.path)
    frame = run.metrics()
    assert list(frame["step"]) == list(range(1, STEPS + 1))
    assert frame["seconds.compute"].sum() == 1.5 * STEPS
    assert list(run.metrics("validation")["bits_per_byte"]) == [2.25]
    assert len(run.metrics(None)) == STEPS + 1


PLAIN = {"loss": 3.5, "mfu": None, "tokens_hash": 2**64 - 1, "seconds": {"data": 0.1, "compute": 2}}


@pytest.mark.parametrize(
    ("changes", "is_fast"),
    [
        ([{}, {}, {}], True),
        ([{"loss": math.nan}, {"loss": 2}, {"loss": math.inf}], True),
        ([{"extra.a": 1.5}, {"seconds": {"data": 1.0, "evaluation": 3.0}}, {}], True),
        ([{"shares": {"web": 3}}, {}, {"shares": {"web": 1, "a.b": 2}}], True),
        ([{"mfu": 0.25}, {}, {"note": "naïve 🙂"}], True),
        ([{"mfu": None}, {"mfu": 1}, {"mfu": 0.5}], True),
        ([{"deep": {"a": {"b": 1}, "c": 2}}, {}, {}], True),
        ([{"quarantined": [["web", 0, "000001"]]}, {}, {}], False),
        ([{"note": "2026-01-01T00:00:00"}, {}, {}], False),  # else a time
        ([{"note": 1}, {"note": "x"}, {}], False),
    ],
)
def test_columns_are_those_of_the_rows_read_one_by_one(tmp_path, changes, is_fast):
    rows = RowWriter(tmp_path / "metrics.jsonl")
    for step, change in enumerate(changes, 1):
        rows.add({"kind": "train", "step": step, "attempt": 1, **PLAIN, **change})
        rows.add({"kind": "validation", "step": step, "dataset": 'a "train" set', "loss": 1.0})
    for kind in ("train", "validation"):
        slow = view._frame(read_rows(rows.path, kind=kind))
        fast = view._columns(rows.path, kind)
        assert (fast is not None) == (is_fast or kind == "validation")
        if fast is not None:
            assert sorted(fast.columns) == sorted(slow.columns)
            pandas.testing.assert_frame_equal(fast[slow.columns], slow)


def test_of_damaged_rows_no_frame_is_made(own_run):
    raw = own_run.metrics.read_bytes()
    place = raw.index(b'"loss": 3.0')  # of a train row
    own_run.metrics.write_bytes(raw[:place] + b'"loss": 4.0' + raw[place + 11 :])
    with pytest.raises(UserError, match="its checksum differs"):
        forescale.open_run(own_run.path).metrics()
    own_run.metrics.write_bytes(raw[:-5])  # cut short by a kill: no row
    assert forescale.open_run(own_run.path).metrics("validation").empty


def test_events_are_a_frame_with_times(trained):
    events = forescale.open_run(trained.path).events()
    assert list(events["kind"]) == ["checkpoint_saved"] * 2
    assert str(events["time"].dt.tz) == "UTC"


def test_a_run_is_found_by_its_name_under_root(trained):
    run = forescale.open_run("small", root=trained.path.parent)
    assert run.config.train.steps == STEPS
    assert [c.position.step for c in run.checkpoints()] == [4, 8]
    assert run.tokenizer.decode(run.tokenizer.encode("def 数据").ids) == "def 数据"


@pytest.mark.parametrize(("step", "added"), [(4, 4 * SHIFT), (8, 8 * SHIFT), (None, 8 * SHIFT)])
def test_the_model_has_the_weights_of_its_step(trained, step, added):
    run = forescale.open_run(trained.path)
    model = run.model(step)
    assert not model.training
    initial = build_model(run.config, 300).state_dict()
    for name, p in model.state_dict().items():
        assert p.dtype == torch.float32
        torch.testing.assert_close(p, initial[name] + added)


def test_a_checkpoint_opens_its_run_at_that_step(trained):
    run = forescale.open_run(trained.checkpoint_path(4))
    assert run.name == "small"
    assert run.checkpoint().position.step == 4
    with pytest.raises(UserError, match="is of step 4, not 8"):
        run.model(8)


def test_texts_are_those_of_the_command(trained, request):
    command = request.getfixturevalue("forescale")
    run = forescale.open_run(trained.path)
    texts = run.generate(["def ", "x"], num_tokens=5, top_p=0.9, stop=["z"])
    words = ("num_tokens=5", "top_p=0.9", "stop=[z]", 'prompts=["def ",x]', "--json")
    _, out, _ = command("generate", trained.path, *words)
    assert texts == [json.loads(line)["text"] for line in out.splitlines()]


def test_a_checkpoint_of_another_model_is_refused(own_run):
    text = freeze(thaw(TrainJob, own_run.config)).replace("width: 32", "width: 64")
    own_run.config.write_text(text)
    with pytest.raises(UserError, match=r"parameter .* in this model"):
        forescale.open_run(own_run.path).model()


def test_a_torn_or_flipped_checkpoint_is_passed_over_or_refused(own_run):
    file = own_run.checkpoint_path(8) / "rank-00001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    run = forescale.open_run(own_run.path)
    assert run.checkpoint().position.step == 4
    with pytest.raises(UserError, match="damaged"):
        run.model(8)


def test_a_checkpoint_of_a_branch_that_was_left_does_not_count(own_run):
    parent = {"step": 4, "checkpoint": str(own_run.checkpoint_path(4))}
    write_json(own_run.new_attempt().path / "parent.json", parent)
    assert forescale.open_run(own_run.path).checkpoint().position.step == 4


def test_what_is_not_there_is_said(own_run, tmp_path):
    with pytest.raises(UserError, match=r"no run has this name.*small"):
        forescale.open_run("smal")
    with pytest.raises(UserError, match="no such dataset"):
        forescale.open_dataset(tmp_path / "nothing")
    alone = tmp_path / "alone" / "step-00000004"
    alone.parent.mkdir()
    own_run.checkpoint_path(4).rename(alone)
    with pytest.raises(UserError, match="not in the directory of its run"):
        forescale.open_run(alone)


class Tied(torch.nn.Module):
    """A user's model whose one matrix has two names."""

    def __init__(self, vocab_size: int, width: int):
        super().__init__()
        self.embedding = torch.nn.Embedding(vocab_size, width)
        self.head = torch.nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens_BL, targets_BL=None):
        return self.head(self.embedding(tokens_BL))


@pytest.fixture
def tied_run(small_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    custom = f"model._target_={__name__}.Tied"
    return make_run(small_data, tmp_path / "runs", "tied", custom, "model.width=16")


def test_a_class_of_the_users_own_runs_only_when_trusted(tied_run):
    run = forescale.open_run("tied")
    assert run.config.model.target.endswith("Tied")
    with pytest.raises(UserError, match="trust=true"):
        run.model()
    model = run.model(trust=True)
    assert model.head.weight is model.embedding.weight
    stored = run.checkpoint().tensor("embedding.weight")
    torch.testing.assert_close(model.head.weight.detach(), stored, rtol=0, atol=0)


def test_a_state_without_its_parts_is_said(own_run):
    path = own_run.checkpoint_path(8) / "state.json"
    state = read_json(path)
    del state["shapes"]
    write_json(path, state)
    with pytest.raises(UserError, match="has no shapes"):
        forescale.open_run(own_run.path).checkpoints()


WRONG = {
    "num_tokens": (0, -1, "x", 1.5, None, True),
    "temperature": (-1, float("nan"), float("inf"), "hot"),
    "top_k": (0, 1.5, "x"),
    "top_p": (0, 2, None),
    "stop": ([""], {}, [None]),
    "seed": (-1, "x", 2**70),
    "batch": (0, -1, "x", 1.5, None),
    "step": ("x", 1.5, [], True, -1),
    "prompts": (None, [None], object()),
    "prompt": ("\ud800",),
    "nosuch": (1,),
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, row in WRONG.items() for v in row])
def test_a_wrong_argument_is_named(trained, name, value):
    key = {"prompt": "prompts"}.get(name, name)
    with pytest.raises(UserError, match=f"^{name}: "):
        forescale.open_run(trained.path).generate(**{"num_tokens": 2, key: value})


def test_wrong_arguments_of_the_other_functions_are_named(trained, small_data):
    run, dataset = forescale.open_run(trained.path), forescale.open_dataset(small_data)
    calls = {
        "batch": (lambda: run.language_model(batch=-1), lambda: dataset.stream(8, 1.5)),
        "split": (lambda: run.evaluate(small_data, split="half"), lambda: dataset.split("half")),
        "windows": (lambda: run.evaluate(small_data, windows=-1),),
        "micro_batch": (lambda: run.evaluate(small_data, micro_batch=0),),
        "step": (lambda: run.model("x"), lambda: run.language_model(2.5)),
        "epochs": (lambda: dataset.stream(8, 1, epochs=float("nan")),),
        "threads": (lambda: dataset.stream(8, 1, threads=0),),
        "rank": (lambda: dataset.stream(8, 1, rank="x"),),
        "batches": (lambda: load({"batches": -1}),),
        "word": (lambda: forescale.train(5),),
        "too long": (lambda: forescale.open_run("x" * 5000),),
    }

    def load(changes):
        stream = dataset.stream(8, 1)
        stream.load_state_dict(stream.state_dict() | changes)

    for word, wrong in calls.items():
        for call in wrong:
            with pytest.raises(UserError, match=word):
                call()
    assert run.checkpoint(np.int64(4)).position.step == 4  # a number of a DataFrame
