"""The rate of tables and head follows from the model's width, unless it is given."""

import pytest

from forescale.config.compose import ConfigError, compose
from forescale.config.frozen import plain
from forescale.config.train import TrainJob

TWO_HEADS = "model.num_heads=2"


def rate(*words, find=None):
    return getattr(compose(TrainJob, words, find=find).optimizer, "adam_learning_rate", None)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], 0.04),  # a width of 128
        (["model.width=64", TWO_HEADS], 0.04),  # never faster
        (["model.width=256", TWO_HEADS], 0.02),
        (["model=depth", "model.depth=12"], 0.00667),
        (["model=depth", "model.depth=12", "model.parametrization=mup"], 0.02),  # tuned at 256
        (["model.width=256", TWO_HEADS, "optimizer.adam_learning_rate=0.01"], 0.01),
        (["optimizer=adamw"], None),
        (["model._target_=mypackage.Mine", "model.width=256"], 0.004),  # means what the class says
    ],
)
def test_the_rate_of_tables_falls_with_the_width_of_larger_models(words, expected):
    assert rate(*words) == expected


def test_keys_of_another_optimizer_are_refused_if_they_are_typed_and_fall_away_in_a_recipe():
    with pytest.raises(ConfigError, match=r"^optimizer\.momentum: is a key of optimizer=muon"):
        compose(TrainJob, ["optimizer=adamw", "optimizer.momentum=0.9"])
    words = ["recipe=gpt2-124m", "optimizer=lion"]  # the recipe sets AdamW's eps
    assert compose(TrainJob, words).optimizer.learning_rate == 6e-4


def test_a_branch_has_the_rate_of_its_origins_width():
    wide = plain(compose(TrainJob, ["model.width=256", TWO_HEADS, "run.name=wide"]))
    configs = {"runs/wide": wide}
    assert rate("run.from.run=wide", "run.name=new", find=lambda p: configs.get(str(p))) == 0.02


def test_a_run_keeps_the_rate_that_it_began_with():
    before = plain(compose(TrainJob, ["optimizer.adam_learning_rate=0.004", "run.name=before"]))
    assert rate("run.name=before", find=lambda path: before) == 0.004
