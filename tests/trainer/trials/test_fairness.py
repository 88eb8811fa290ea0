"""A change may touch nothing that decides what is measured."""

import pytest

from forescale.ground.errors import UserError
from forescale.trials.fairness import changed_side, changes_of, side, unfair, unwritten

WORDS = ["data=bytes", "train.steps=40", "train.sequence_length=32", "model.width=32"]


@pytest.fixture(scope="module")
def base():
    return side(WORDS)


@pytest.mark.parametrize("word", [
    "data.path=/tmp", "data=dataset", "validation.every=3", "train.seed=7", "train.init_seed=7",
    "train.tokens=99999", "train.steps=500", "train.sequence_length=64", "objective=masked",
    "run.name=x", "callbacks=[]", "outer.members=2",
])  # fmt: skip
def test_a_change_of_what_is_measured_is_refused_by_its_key(base, word):
    with pytest.raises(UserError, match=word.partition("=")[0].partition(".")[0]):
        changed_side(base, [word], "flops")


def test_a_change_has_the_compute_of_the_base(base):
    changed = changed_side(base, ["model.num_layers=9"], "flops")
    assert changed.tokens < base.tokens
    assert 1 - 1 / changed.job.total_steps < changed.flops / base.flops < 1.001, "within a step"
    assert changed_side(base, ["model.num_layers=9"], "tokens").tokens == base.tokens


def test_a_larger_batch_brings_no_more_tokens(base):
    changed = changed_side(base, ["train.global_batch=16"], "flops")
    assert changed.tokens == base.tokens
    assert changed.job.total_steps == base.job.total_steps / 2


@pytest.mark.parametrize("equal", ["flops", "tokens"])
@pytest.mark.parametrize("words", [
    ["train.global_batch=100"], ["train.global_batch=12"],
    ["train.first_batch=4", "train.batch_ramp=50 %"],
])  # fmt: skip
def test_no_batch_trains_longer_than_the_base(base, words, equal):
    changed = changed_side(base, words, equal)
    assert changed.tokens == changed.job.total_tokens
    assert 0.7 < changed.tokens / base.tokens <= 1.001


def test_what_a_change_changes_is_named_and_nothing_is_refused(base):
    changed = changed_side(base, ["model.mlp=gelu"], "flops")
    assert changes_of(base, changed)["model.mlp.kind"] == ["swiglu", "gelu"]
    with pytest.raises(UserError, match="changes nothing"):
        changed_side(base, ["model.mlp=swiglu"], "flops")


def test_another_choice_does_without_the_keys_of_the_one_it_replaces():
    words = [*WORDS, "optimizer=muon", "optimizer.momentum=0.9", "optimizer.beta2=0.99"]
    changed = changed_side(side(words), ["optimizer=adamw"], "flops")
    assert "optimizer.momentum=0.9" not in changed.words
    assert changed.job.optimizer.beta2 == 0.99, "which adamw has too, as the base's"
    others = unwritten(changes_of(side(words), changed), ["optimizer=adamw"])
    assert others == "optimizer.learning_rate 0.02 -> 0.004, optimizer.weight_decay 0.0 -> 0.1"
    with pytest.raises(UserError, match=r"optimizer\.nonsense"):
        changed_side(side(words), ["optimizer.nonsense=1"], "flops")


FACTS = {
    "data": "a", "seed": 1, "batch": 256, "tokens": 10240, "order": "x", "flops": 1e9,
    "scored": ["validation", 7, 7, 7],
}  # fmt: skip


@pytest.mark.parametrize(("fact", "word"), [
    ({"data": "b"}, "text"), ({"seed": 2}, "seed"), ({"order": "y"}, "order"),
    ({"scored": ["validation", 6, 7, 7]}, "held-out"), ({"flops": 1.02e9}, "flops"),
])  # fmt: skip
def test_a_pair_that_differs_beside_the_change_is_named(fact, word):
    assert not unfair(FACTS, FACTS, "flops")
    assert not unfair(FACTS, FACTS | {"flops": 0.98e9}, "flops"), "less, by rounding to steps"
    assert word in " ".join(unfair(FACTS, FACTS | fact, "flops"))
