"""A class of the user's own: its arguments, and the message if it can't be instantiated."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from forescale.ground.errors import UserError
from forescale.run.feed import feed_of
from forescale.run.start import start
from forescale.train.model import build_model, describe, num_parameters, prices_of
from tests.trainer.small_run import make_job


@pytest.fixture
def job(small_data, tmp_path, monkeypatch):
    """Write a module `theirs` and make a job for a name in it: job(name, *keys, source)."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, *keys, source=""):
        import sys

        sys.modules.pop("theirs", None)
        (tmp_path / "theirs.py").write_text(
            "import torch\nfrom torch import nn\n"
            "class Base(nn.Module):\n"
            "    def forward(self, tokens, targets=None):\n"
            "        raise NotImplementedError\n" + source
        )
        overrides = [f"model._target_=theirs.{name}", *(f"model.{key}" for key in keys)]
        return make_job(small_data, tmp_path, "own", *overrides)

    return make


def expect_error(job, *expected):
    with pytest.raises(UserError) as caught:
        build_model(job, 300)
    text = str(caught.value)
    assert text.startswith("model._target_=")
    assert "\n" not in text
    for part in expected:
        assert part in text


MODEL = (
    "class Model(Base):\n"
    "    def __init__(self, vocab_size, sequence_length, width: int = 4):\n"
    "        super().__init__()\n"
    "        self.given = (vocab_size, sequence_length, width)\n"
    "        self.embedding = nn.Embedding(vocab_size, width)\n"
    "        self.frozen = nn.Linear(3, 3).requires_grad_(False)\n"
)


def test_it_receives_its_keys_and_the_sizes_that_the_data_decide(job):
    model = build_model(job("Model", "width=6", source=MODEL), 300)
    assert model.given == (300, 32, 6)
    assert build_model(job("Model", "vocab_size=512", source=MODEL), 300).given[0] == 512
    weights = build_model(job("Model", source=MODEL), 300).embedding.weight
    assert torch.equal(weights, build_model(job("Model", source=MODEL), 300).embedding.weight)


def test_its_parameters_are_counted_and_priced(job):
    users_job = job("Model", source=MODEL)
    model = build_model(users_job, 300)
    assert num_parameters(model) == describe(users_job, model)["total"] == 300 * 4
    assert prices_of(users_job, model) == dict.fromkeys(("full", "causal", "six_n"), 6 * 1200)
    source_with_flops = (
        MODEL
        + "    def flops_per_token(self, sequence_length):\n        return 1000 + sequence_length\n"
    )
    users_job = job("Model", source=source_with_flops)
    assert prices_of(users_job, build_model(users_job, 300)) == {
        "full": 1032,
        "causal": 1032,
        "six_n": 7200,
    }


def test_a_class_that_cannot_be_imported(job):
    expect_error(
        job("Missing"),
        "can't be imported",
        "'Missing'",
        "run the command in the directory that contains it",
    )
    users_job = job("Model", source=MODEL)
    users_job.model.target = "nowhere.Model"
    expect_error(users_job, "can't be imported (No module named 'nowhere')", "install the package")


def test_a_module_that_fails_while_it_is_imported(job):
    expect_error(job("Model", source="import nowhere\n"), "No module named 'nowhere'")
    expect_error(job("Model", source="def broken(:\n"), "can't be imported", "invalid syntax")


def test_wrong_keys_and_other_errors_of_the_constructor(job):
    expect_error(
        job("Model", "depth=3", source=MODEL),
        "can't be instantiated",
        "'depth'",
        "keys of section model",
    )
    needs = "class Needs(Base):\n    def __init__(self, size):\n        super().__init__()\n"
    expect_error(job("Needs", source=needs), "can't be instantiated", "'size'")
    fussy = (
        "class Fussy(Base):\n    def __init__(self, heads=3):\n        super().__init__()\n"
        "        raise ValueError('heads must be even')\n"
    )
    expect_error(job("Fussy", source=fussy), "can't be instantiated (heads must be even)")


def test_a_class_that_is_no_module(job):
    expect_error(
        job("thing", source="def thing():\n    return 3\n"), "is a int", "name a torch.nn.Module"
    )
    expect_error(
        job("thing", source="thing = 3\n"), "can't be instantiated (3 is not a callable object)"
    )


def test_the_seed_of_the_weights_is_independent_of_that_of_the_data(small_data, tmp_path):
    def begun(name, *overrides):
        sizes = ["model.num_layers=1", "model.width=32", "model.num_heads=2"]
        started = start(make_job(small_data, tmp_path, name, *sizes, *overrides))
        read = feed_of(started.job, started.sources).read([(0, 8)]).hash
        return build_model(started.job, 300).head.weight, read

    weights, tokens = begun("plain")
    other, same_tokens = begun("other", "train.init_seed=7")
    assert not torch.equal(weights, other)
    assert tokens == same_tokens
    same, other_tokens = begun("both", "train.init_seed=7", "train.seed=8")
    assert torch.equal(other, same)
    assert tokens != other_tokens
    assert torch.equal(begun("named", "train.init_seed=1337")[0], weights)


def test_our_model_is_built_from_its_config(small_data, tmp_path):
    started = start(make_job(small_data, tmp_path))
    model = build_model(started.job, 300)
    assert isinstance(model, nn.Module)
    assert describe(started.job, model)["total"] == num_parameters(model)
    prices = prices_of(started.job, model)
    assert prices["causal"] < prices["full"]


def test_a_model_whose_weights_are_read_is_built_without_draws(small_data, tmp_path):
    words = ["model.mixer_pattern=[lstm,gated_deltanet,attention]", "model.num_layers=3"]
    words += ["model.position=learned", "model.mlp=moe", "model.mtp_layers=1"]
    job = make_job(small_data, tmp_path, "read", *words)
    job = replace(job, model=job.model.resolved(300, 32))
    drawn = build_model(job, 300).state_dict()
    after_draws = torch.get_rng_state()
    read = build_model(job, 300, draws=False).state_dict()
    after_none = torch.get_rng_state()
    torch.manual_seed(job.train.seed)
    assert torch.equal(after_none, torch.get_rng_state())
    assert not torch.equal(after_draws, after_none)
    assert {n: p.shape for n, p in read.items()} == {n: p.shape for n, p in drawn.items()}


def test_a_class_of_the_users_own_draws_even_if_its_weights_are_read(job):
    drawn, read = (build_model(job("Model", source=MODEL), 300, draws=d) for d in (True, False))
    assert torch.equal(drawn.embedding.weight, read.embedding.weight)
