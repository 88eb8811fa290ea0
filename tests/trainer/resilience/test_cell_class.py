"""Classes that cells define become modules which compute the same."""

import importlib
import linecache
import sys
from types import ModuleType

import pytest
import torch

from forescale.config.job import overrides_of, words_of
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.resilience.cell_class import dotted_name, with_names
from forescale.run.command import job_of

CELLS = [
    """
import functools, torch
from torch import nn, float32
from torch.nn.functional import silu as activation
SCALE, NAMES = 2.0, ("a", "b")
def twice(function):
    return functools.wraps(function)(lambda x, *rest: function(function(x, *rest), *rest))
@twice
def scaled(x, depth=2):
    return scaled(x, depth - 1) * SCALE if depth else x
@functools.cache
def dtype():
    return float32
""",
    """
class Base(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in NAMES)
Root = Base
@torch.compiler.disable
class Model(Base):
    parts = staticmethod(lambda layers: list(layers))
    @property
    def kind(self):
        assert isinstance(self, Root)
        return dtype()
    @torch.no_grad()
    def forward(self, x):
        for layer in self.parts(self.layers):
            x = activation(scaled(layer(x.to(self.kind))))
        return x
""",
]


@pytest.fixture
def cells(tmp_path, monkeypatch):
    """Runs cells as a kernel does: in the module __main__, their sources in linecache."""
    monkeypatch.chdir(tmp_path)
    module = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", module)

    def run(*texts: str) -> ModuleType:
        for i, text in enumerate(texts):
            name = f"/tmp/cell-{id(text)}-{i}.py"
            linecache.cache[name] = (len(text), None, text.splitlines(keepends=True), name)
            exec(compile(text, name, "exec"), vars(module))
        return module

    return run


def test_a_class_of_cells_computes_the_same_as_a_module(cells, monkeypatch, tmp_path):
    module = cells(*CELLS)
    path, _, class_name = dotted_name(module.Model).rpartition(".")
    monkeypatch.syspath_prepend(tmp_path)
    twin = getattr(importlib.import_module(path), class_name)
    assert twin is not module.Model
    x = torch.randn(3, 8)
    torch.manual_seed(1)
    expected = module.Model()(x)
    torch.manual_seed(1)
    assert torch.equal(twin()(x), expected)


def test_the_name_follows_the_source(cells):
    first = dotted_name(cells(*CELLS).Model)
    assert dotted_name(cells(*CELLS).Model) == first  # the cells run again
    assert dotted_name(cells("unrelated = 3").Model) == first
    assert dotted_name(cells("SCALE = 3.0").Model) != first
    assert dotted_name(cells(CELLS[1].replace("x = act", "x = -act")).Model) != first


def test_values_that_are_classes_reach_the_job(cells):
    module = cells(*CELLS)
    keys = dict(
        model={"_target_": module.Model, "width": 16},
        optimizer={"_target_": torch.optim.SGD, "arguments": {"momentum": 0.9}},
        objective=dict,
        callbacks=[module.Base],
    )
    job = job_of(TrainJob, overrides_of(TrainJob, words_of(with_names(keys))))
    assert job.model.target == dotted_name(module.Model)
    assert job.model.arguments == {"width": 16}
    assert job.optimizer.target == "torch.optim.sgd.SGD"
    assert job.optimizer.arguments == {"momentum": 0.9}
    assert job.objective.target == "builtins.dict"
    assert job.callbacks[0].target == dotted_name(module.Base)
    assert with_names(dict(optimizer="adamw", train=dict(steps=3))) == {
        "optimizer": "adamw", "train": {"steps": 3}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cell", "sentence"),
    [
        ("class Mine(Base):\n def forward(self, x):\n  return table", "table: is <object"),
        (
            "bare = scaled.__wrapped__\nclass Mine:\n f = property(lambda self: bare)",
            "bare: differs from its definition",
        ),
        ("class Mine(Base): pass", "Mine: is not defined at the top of a cell, or has no method"),
        ("def make():\n class Mine:\n  def f(self): pass\n return Mine\nMine = make()", "Mine: is"),
        ("class Mine(Base):\n def f(self): pass\nMine.g = lambda self: 3", "a method, g, that"),
    ],
    ids=[
        "a value",
        "without its decorator",
        "no method",
        "inside a function",
        "a method from elsewhere",
    ],
)
def test_a_class_that_its_source_does_not_tell_is_refused(cells, cell, sentence, tmp_path):
    module = cells(*CELLS, "table = object()", cell)
    with pytest.raises(UserError, match=sentence):
        dotted_name(module.Mine)
    assert not any(tmp_path.iterdir())
