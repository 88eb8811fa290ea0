"""The user's own classes are tried before a run is made, and their certain errors end it at once.

The classes are in a module in the working directory, as a user's are.
"""

import json
import sys
import types

import pytest
import torch

from forescale.config.schema import TargetConfig
from forescale.ground.errors import UserError
from forescale.train.probe import as_users, examine, examine_apart
from tests.trainer.small_run import make_job

MODULE = """
import torch
from torch import nn


class Model(nn.Module):
    def __init__(self, vocab_size: int, width: int = 8):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.head = nn.Linear(width, vocab_size)

    def losses(self, tokens, targets):
        logits = self.head(self.embedding(tokens)).float().mT
        return nn.functional.cross_entropy(logits, targets, reduction="none").sum(1)

    def forward(self, tokens_BL, targets_BL=None):
        return self.losses(tokens_BL, targets_BL)


class Penalty(Model):
    def forward(self, tokens_BL, targets_BL=None):
        return self.losses(tokens_BL, targets_BL), torch.zeros(())


class Mean(Model):
    def forward(self, tokens_BL, targets_BL=None):
        return self.losses(tokens_BL, targets_BL).mean()


class Logits(Model):
    def forward(self, tokens_BL, targets_BL=None):
        return self.head(self.embedding(tokens_BL))


class Wide(Model):
    def forward(self, tokens_BL, targets_BL=None):
        return self.head(torch.zeros(3, 5, device=tokens_BL.device))


class Text(Model):
    def forward(self, tokens_BL, targets_BL=None):
        return tokens_BL + None


class NoTargets(Model):
    def forward(self, tokens_BL):
        return tokens_BL


class Negative(Model):
    def __init__(self, vocab_size: int):
        super().__init__(vocab_size, -3)


class Looks(Model):
    def __init__(self, vocab_size: int):
        super().__init__(vocab_size)
        self.scale = self.head.weight.std().item()

    def forward(self, tokens_BL, targets_BL=None):
        return self.losses(tokens_BL, targets_BL)


class LooksLater(Model):
    def forward(self, tokens_BL, targets_BL=None):
        if tokens_BL.sum().item() < 0:
            raise ValueError("negative")
        return self.losses(tokens_BL, targets_BL)


class Callback:
    def __init__(self, factor: float = 1.0, engine=None):
        pass

    def see(self, step, summary):
        pass


class OfRows(torch.optim.SGD):
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.data -= p.grad / p.grad.norm()

class NoOptimizer:
    def __init__(self, groups, lr):
        pass
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with MODULE as `ownclasses`."""
    (tmp_path / "ownclasses.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    sys.modules.pop("ownclasses", None)


@pytest.fixture
def job_with(place, small_data):
    """Make a job of the user's own classes: own("Model", "key=value", ...)."""

    def make(name, *overrides):
        named = (f"model._target_=ownclasses.{name}", "optimizer=adamw", *overrides)
        return make_job(small_data, place / "runs", "mine", *named)

    return make


DATA = types.SimpleNamespace(vocab_size=300)


@pytest.mark.parametrize("name", ["Model", "Penalty", "Looks", "LooksLater"])
def test_a_class_that_works_is_taken_and_so_is_one_that_needs_values(job_with, name):
    examine(job_with(name), DATA)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Mean", r"returns a loss of shape \(\) for 4 windows, not \(4,\); return each window's"),
        ("Logits", r"a loss of shape \(4, 32, 300\)"),
        (
            "Wide",
            r"its forward fails on 4 windows of 32 tokens \(RuntimeError: .*ownclasses.py, li",
        ),
        ("Text", r"its forward fails .*\(TypeError: "),
        ("NoTargets", r"its forward fails .*takes 2 positional arguments but 3 were given"),
        ("Negative", r"can't be built \(RuntimeError: .*negative dimension"),
        ("Nothing", r"can't be imported"),
    ],
)
def test_a_class_that_can_not_train_is_one_sentence(job_with, name, message):
    with pytest.raises(UserError, match=rf"model\._target_=ownclasses\.{name}: .*{message}"):
        examine(job_with(name), DATA)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.widht=3"], r"can't be instantiated .*'widht'.*check the keys of section model"),
        (["callbacks=[{_target_: ownclasses.Callback, fctor: 2}]"], r"callbacks\.0.*'fctor'"),
        (
            ["optimizer=own", "optimizer._target_=ownclasses.NoOptimizer"],
            r"this builds a NoOptimizer, which is not an optimizer",
        ),
        (
            ["optimizer=own", "optimizer._target_=torch.optim.Adafactor"],
            r"keeps row_var of shape \[2, 1\] for a weight of \[2, 2\]; keep tensors",
        ),
        (
            ["optimizer=own", "optimizer._target_=ownclasses.OfRows"],
            r"updates parts of a weight otherwise than the whole; .* each element by itself",
        ),
        (["optimizer=own", "optimizer._target_=torch.optim.Muon"], "takes no vector; ZeRO cuts"),
        (["optimizer=own", "optimizer._target_=torch.optim.LBFGS"], "argument: 'closure'; name"),
    ],
)
def test_misspelt_arguments_and_wrong_classes_are_found(job_with, overrides, message):
    with pytest.raises(UserError, match=message):
        examine(job_with("Model", *overrides), DATA)


@pytest.mark.parametrize("name", ["AdamW", "SGD", "NAdam", "RMSprop"])
def test_an_optimizer_that_updates_each_element_by_itself_is_taken(job_with, name):
    examine(job_with("Model", "optimizer=own", f"optimizer._target_=torch.optim.{name}"), DATA)


def test_good_arguments_are_taken(job_with):
    examine(job_with("Model", "callbacks=[{_target_: ownclasses.Callback, factor: 2}]"), DATA)


def test_a_missing_tracker_is_found_too(job_with, monkeypatch):
    from forescale.config.sections import trackers

    monkeypatch.setattr(trackers, "_is_installed", lambda package: False)
    with pytest.raises(UserError, match="tensorboard is not installed"):
        examine_apart(job_with("Model", "logging.tensorboard.enabled=true"), DATA)


def test_our_own_models_start_no_process(small_data, place, monkeypatch):
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("a process was started"))
    examine_apart(make_job(small_data, place / "runs"), DATA)


@pytest.mark.slow  # a process that imports torch, twice
def test_a_process_of_its_own_says_the_same_and_leaves_nothing_behind(job_with, capfd):
    with pytest.raises(UserError, match=r"a loss of shape \(\)"):
        examine_apart(job_with("Mean"), DATA)
    assert "ownclasses" not in sys.modules
    (job_with("Model").run.directory.parent.parent / "ownclasses.py").write_text(
        "import os; os._exit(3)"
    )
    examine_apart(job_with("Model"), DATA)  # what ends it otherwise is left to the ranks
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def raised(place):
    """The error that a function of the module raises when it is called."""

    def run(body):
        (place / "ownclasses.py").write_text(f"import torch\n\n\ndef fail():\n    {body}\n")
        sys.modules.pop("ownclasses", None)
        sys.path.append(str(place))
        import ownclasses

        with pytest.raises(Exception) as caught:  # noqa: PT011 (any)
            ownclasses.fail()
        return caught.value

    return run


CLASSES = ["ownclasses.Model"]


@pytest.mark.parametrize(
    "body",
    [
        "return None + 1",
        "return torch.zeros(2, 3) @ torch.zeros(2, 3)",
        "return nothing",
        "return [][3]",
        "assert False, 'odd'",
        "import json; json.loads('{')",
    ],
)
def test_a_certain_error_of_the_users_code_is_a_sentence_with_its_line(raised, place, body):
    error = as_users(raised(body), CLASSES)
    assert error.where == f"{place / 'ownclasses.py'}, line 5"
    assert error.code == 2
    assert "correct it" in str(error)


@pytest.mark.parametrize(
    "body",
    [
        "raise RuntimeError('CUDA error: an illegal memory access, size 3')",
        "raise torch.OutOfMemoryError('tried to allocate a size')",
        "raise RuntimeError('Connection closed by peer')",
        "raise OSError(5, 'I/O error')",
        "raise ConnectionError('shape')",
    ],
)
def test_what_another_try_may_not_meet_is_tried_again(raised, body):
    assert as_users(raised(body), CLASSES) is None


def test_an_error_of_ours_or_of_a_library_keeps_its_traceback():
    with pytest.raises(RuntimeError) as caught:
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    assert as_users(caught.value, CLASSES) is None
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("{")
    assert as_users(caught.value, CLASSES) is None


def test_an_error_of_compiled_code_names_the_line_that_its_text_names():
    text = (
        "Dynamo failed to run FX node: shape mismatch\n\n"
        'from user code:\n   File "/home/me/net.py", line 7, in forward\n    x @ y\n'
    )
    assert as_users(RuntimeError(text), CLASSES).where == "/home/me/net.py, line 7"


def test_a_class_is_named_by_its_package():
    assert as_users(TypeError("no frames"), [TargetConfig("x.Y").target]) is None
