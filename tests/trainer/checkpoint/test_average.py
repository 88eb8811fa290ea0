"""Averages of checkpoints: the mean, to the bit, as a run that every verb takes."""

import json
import os
import shutil
import signal
import weakref
from pathlib import Path

import pytest
import torch

from forescale import open_run
from forescale.checkpoint import average as averaging
from forescale.checkpoint.average import average, chosen_steps
from forescale.checkpoint.reader import Checkpoint
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.ground.storage import hash_file, read_json, write_checked_json
from forescale.monitor.status import runs_under
from forescale.run.command import job_of
from forescale.run.directory import Parent, Run
from forescale.run.start import start
from forescale.train.model import build_model
from tests.trainer.small_run import make_job, make_run, save

MODEL = ("model.num_layers=2", "model.width=32", "model.num_heads=2")


@pytest.fixture(scope="module")
def drifted(small_data, tmp_path_factory) -> Run:
    """A run whose weights go their own random way to steps 4, 8 and 12."""
    run = make_run(small_data, tmp_path_factory.mktemp("drifted"), "small", *MODEL)
    module, attempt = open_run(run.path).model(), run.attempts()[0]
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p += 0.3 * torch.randn_like(p)
    save(run, attempt, 12, module)
    return run


@pytest.fixture
def trunk(drifted, tmp_path, monkeypatch) -> Run:
    """A copy under runs/small of the current directory."""
    monkeypatch.chdir(tmp_path)
    return Run(shutil.copytree(drifted.path, "runs/small", symlinks=True))


def weights_at(run: Run, step: int) -> dict[str, torch.Tensor]:
    return dict(Checkpoint(run.checkpoint_path(step)).weights())


def test_the_mean_is_that_of_plain_torch(trunk, forescale):
    out = forescale.prints("average", "small")
    assert "mean of the weights of runs/small at steps 4, 8, 12" in out
    every = [weights_at(trunk, step) for step in (4, 8, 12)]
    weights = weights_at(Run("runs/small-average"), 0)
    assert weights.keys() == every[0].keys()
    for name, mean in weights.items():
        expected = torch.stack([each[name] for each in every]).double().mean(0).float()
        assert torch.equal(mean, expected), name
        assert not torch.equal(mean, every[1][name])


def test_one_checkpoint_is_itself(trunk, forescale):
    for words, step in ((["last=1"], 12), (["steps=[8]"], 8)):
        name = f"run.name=of-{step}"
        out = forescale.prints("average", "runs/small", *words, name, "--json")
        facts = json.loads(out)
        assert facts["steps"] == [step]
        weights, expected = weights_at(Run(facts["path"]), 0), weights_at(trunk, step)
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
        assert facts["parameters"] == sum(t.numel() for t in expected.values())


def test_the_newest_of_the_history_are_chosen(trunk):
    assert chosen_steps(trunk) == [4, 8, 12]
    assert chosen_steps(trunk, last=2) == [8, 12]
    assert chosen_steps(trunk, steps=[12, 4]) == [4, 12]
    trunk.new_attempt().start_from(Parent(4, str(trunk.checkpoint_path(4))), trunk)
    assert chosen_steps(trunk, last=1) == [4]  # the others are of a former attempt


def test_it_is_known_where_an_average_comes_from(trunk, forescale):
    before = {p: p.read_bytes() for p in trunk.path.rglob("*") if p.is_file()}
    assert forescale("average", "small", "last=2", "run.name=mean")[0] == 0
    assert before == {p: p.read_bytes() for p in trunk.path.rglob("*") if p.is_file()}
    mean = Run("runs/mean")
    source, identity = read_json(mean.averaged), read_json(mean.identity)
    assert source["run"] == str(trunk.path.resolve())
    assert source["checkpoints"] == [
        {
            "step": step,
            "attempt": 1,
            "table": hash_file(trunk.checkpoint_path(step) / "files.json").sha256,
        }
        for step in (8, 12)
    ]
    assert identity["dataset"] == read_json(trunk.identity)["dataset"]
    assert identity["wandb_id"] != source["wandb_id"] == read_json(trunk.identity)["wandb_id"]
    code, out, _ = forescale("status", "mean")
    assert code == 0
    assert f"averaged, the mean of {trunk.path.resolve()} at steps 8, 12;" in " ".join(out.split())
    assert forescale("check", "mean")[0] == 0
    mean.averaged.write_text(mean.averaged.read_text().replace("12", "13"))
    for verb in ("check", "status"):
        assert "averaged.json: was changed" in forescale.refuses(verb, "mean")


def test_an_average_serves_every_verb(trunk, forescale):
    """On the data of its run, whose held-out text it is scored on as a plain loop over the mean."""
    assert forescale("average", "small")[0] == 0
    name = "small-average"
    view = open_run(f"runs/{name}")
    assert view.config.model == open_run("runs/small").config.model
    (score,) = view.evaluate(windows=4).values()
    expected = build_model(view.config, view.identity["dataset"]["vocab_size"]).eval()
    with torch.no_grad():
        for weight, tensor in expected.named_parameters():
            weights = [weights_at(trunk, step)[weight] for step in (4, 8, 12)]
            tensor.copy_(sum(w.double() for w in weights) / 3)
    tokens = torch.arange(32)[None] % 300
    assert torch.equal(view.model()(tokens), expected(tokens))
    code, out, err = forescale("eval", name, "windows=4", "--json")
    assert code == 0, err
    assert json.loads(out)["loss"] == score.loss
    for words in (
        ("generate", name, "prompt=def", "num_tokens=3", "temperature=0"),
        ("export", name, "to=exported"),
        ("inspect", name, "tokens=8"),
        ("status",),
        ("prune", name),
    ):
        forescale.prints(*words)
    for verb in ("train", "plan"):
        err = forescale.refuses(verb, name)
        assert "holds averaged weights, which no training changes" in err
        assert f"run.from.run=runs/{name} run.from.load=weights" in err
    assert "has one checkpoint, of step 0" in forescale.refuses("average", name)


def test_runs_begin_with_an_average(trunk, forescale):
    average(trunk, [8, 12], Run("runs/mean"))
    data = read_json(trunk.identity)["dataset"]["path"]
    job = make_job(Path(data), Path("runs"), "new", *MODEL, "run.from.run=mean")
    with pytest.raises(UserError, match="holds averaged weights alone"):
        start(job)
    words = ["run.name=new", "run.from.run=mean", "run.from.load=weights", f"data.path={data}"]
    begun = start(job_of(TrainJob, [*words, "train.sequence_length=32", "train.steps=4"]))
    assert begun.job.model == open_run("runs/mean").config.model
    assert not begun.run.averaged.exists()
    assert begun.run.weights_alone is None


def test_whole_numbers_are_those_of_the_last_checkpoint(small_data, tmp_path, forescale):
    """A mean of the steps of an expert's bias is no number of steps."""
    moe = ("mlp=moe", "mlp.experts=4", "mlp.top_k=2", "mlp.scores=sigmoid")
    words = [*MODEL, *(f"model.{key}" for key in moe), "model.mlp.bias_speed=0.001"]
    begun = start(make_job(small_data, tmp_path, "moe", *words))
    module, attempt = build_model(begun.job, begun.sources.vocab_size), begun.run.new_attempt()
    attempt.start_from(Parent(0), begun.run)
    steps = {name: b for name, b in module.named_buffers() if name.endswith("bias_steps")}
    for step in (4, 7):
        with torch.no_grad():
            for p in module.parameters():
                p += step
        for buffer in steps.values():
            buffer.copy_(torch.tensor([step, -step, 2**20 + 1, 0]))
        save(begun.run, attempt, step, Named({**dict(module.named_parameters()), **steps}))
    out = forescale.prints("average", begun.run.path, f"run.root={tmp_path}")
    assert "Not averaged, but as at step 7: whole numbers (blocks.0.mlp.bias_steps and 1 more)" in (
        out
    )
    model = open_run(tmp_path / "moe-average").model()
    for name, buffer in model.named_buffers():
        if name in steps:
            assert buffer.tolist() == [7, -7, 2**20 + 1, 0]
    router = "blocks.0.mlp.router.weight"
    mean = dict(model.named_parameters())[router]
    assert torch.allclose(mean, dict(module.named_parameters())[router] - 3.5)


class Named:
    def __init__(self, tensors):
        self.tensors = tensors

    def named_parameters(self):
        return self.tensors.items()


def test_what_a_run_keeps_beside_its_weights_goes_with_them(trunk, forescale):
    write_checked_json(trunk.chat, {"chat_template": "{{ messages[0].content }}"})
    assert forescale("average", "small")[0] == 0
    assert Run("runs/small-average").chat.read_bytes() == trunk.chat.read_bytes()
    trunk.chat.write_text(trunk.chat.read_text().replace("messages[0]", "messages[1]"))
    assert "chat.json: was changed" in forescale.refuses("average", "small", "run.name=other")
    assert [path.name for path in sorted(Path("runs").iterdir())] == ["small", "small-average"]


def test_one_tensor_is_held_at_a_time(trunk, monkeypatch):
    held, most, merged = [0], [0], Checkpoint.merged

    def counted(self, name):
        weight = merged(self, name)
        held[0] += weight.nbytes
        most[0] = max(most[0], held[0])
        weakref.finalize(weight, lambda size: held.__setitem__(0, held[0] - size), weight.nbytes)
        return weight

    monkeypatch.setattr(Checkpoint, "merged", counted)
    average(trunk, [4, 8, 12], Run("runs/mean"))
    assert most[0] == max(t.nbytes for t in weights_at(trunk, 4).values())


def test_a_kill_leaves_nothing_that_looks_like_a_run(trunk, monkeypatch, forescale):
    read, count = averaging._mean, [0]

    def killed(*words):
        count[0] += 1
        if count[0] == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(*words)

    if (child := os.fork()) == 0:
        monkeypatch.setattr(averaging, "_mean", killed)
        forescale("average", "small")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [run.name for run in runs_under(Path("runs"))] == ["small"]
    assert len([*Path("runs").iterdir()]) == 2  # what it had written so far
    assert forescale("average", "small")[0] == 0
    assert {path.name for path in Path("runs").iterdir()} == {"small", "small-average"}


def flipped(run):
    path = run.checkpoint_path(8) / "rank-00001.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


def alone(run):
    for step in (4, 8):
        shutil.rmtree(run.checkpoint_path(step))


def gone(run):
    shutil.rmtree(run.checkpoints)


REFUSED = {
    "run": (["nowhere"], None, "nowhere: no run has this name or path"),
    "step": (["small", "steps=[4,9]"], None, "step-00000009: no such checkpoint; choose of these"),
    "twice": (["small", "steps=[4,4]"], None, "steps: 4, 4 has a step twice"),
    "both": (["small", "steps=[4]", "last=1"], None, "last: excludes steps"),
    "many": (["small", "last=4"], None, "at steps 4, 8, 12 alone; write last=3"),
    "none": (["small", "last=0"], None, "last: "),
    "name": (["small", "run.name=small"], None, "runs/small: exists already"),
    "no name": (["small", "run.name=a/b"], None, "can't be the name of a directory"),
    "damaged": (["small"], flipped, "step-00000008: damaged"),
    "table": (
        ["small"],
        lambda run: (run.checkpoint_path(4) / "files.json").unlink(),
        "files.json",
    ),
    "alone": (["small"], alone, "has one checkpoint, of step 12, and an average needs two"),
    "gone": (["small"], gone, "this run has no checkpoint yet"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cant_be_averaged_is_a_sentence(case, trunk, forescale):
    words, change, message = REFUSED[case]
    if change:
        change(trunk)
    err = forescale.refuses("average", *words)
    assert message in err
    assert err.count("\n") == 1
    assert [path.name for path in Path("runs").iterdir()] == ["small"]


@pytest.mark.parametrize("after", ["_parts", "_source"])
def test_a_checkpoint_that_is_deleted_meanwhile_is_a_sentence(trunk, monkeypatch, forescale, after):
    """As a run that trains on deletes it."""
    real = getattr(averaging, after)

    def then_deleted(*words):
        result = real(*words)
        shutil.rmtree(trunk.checkpoint_path(4))
        return result

    monkeypatch.setattr(averaging, after, then_deleted)
    err = forescale.refuses("average", "small")
    assert "step-00000004: was deleted meanwhile" in err
    assert err.count("forescale: ") == 1
    assert [path.name for path in Path("runs").iterdir()] == ["small"]
