"""Values without bounds, as keys take them."""

import shlex
from dataclasses import fields

import pytest

from forescale.config.compose import _value, compose
from forescale.config.schema import ConfigError, kinds_of, leaves
from forescale.config.train import TrainJob
from forescale.config.tree import convert, example
from forescale.plan.config import PlanJob
from forescale.scaling.config import StudyJob
from forescale.slurm.config import SubmitJob
from forescale.verbs import VERBS, load


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.steps=" + "9" * 400, "is too large"),
        ("train.steps=9223372036854775808", "is too large"),
        ("train.seed=" + "9" * 5000, "can't be read as a value"),
        ("optimizer.eps=1e-300", "is too close to 0"),
        ("optimizer.learning_rate=1e300", "is too large"),
        ("checkpoint.every=1e30 steps", "at most 1e+18 steps"),
        ("checkpoint.every=1.2.3 steps", "'1.2.3' is not a number"),
        ("engine.deepspeed=" + "[" * 3000, "can't be read as a value"),
        ("[" * 3000, "is not KEY=VALUE"),
        ("train.seed=a\nb", "'a\\nb' can't be read"),
        ("train.steps=9e18", "the run reads 1.84e+22 tokens; train on at most 1e+18"),
        ("model.num_layers=1e7", "10000000 layers are too many; give at most 2,048"),
        ("model.depth=1e7", "10000000 layers are too many; give at most 2,048"),
        ("machine.peak_bf16=0", "must be more than 0, got 0"),
        ("machine.peak_fp32=-1", "must be more than 0, got -1"),
    ],
)
def test_numbers_and_texts_without_bounds_are_refused_in_a_line(override, words):
    with pytest.raises(ConfigError) as caught:
        compose(PlanJob, [override])
    line = str(caught.value)
    assert words in line
    assert "\n" not in line
    assert len(line) < 600


def test_a_mapping_of_texts_takes_numbers_as_they_are_typed():
    job = compose(StudyJob, ["rows={seed: 3, warm: true}", "input=[a]"])
    assert job.rows == {"seed": "3", "warm": "true"}
    with pytest.raises(ConfigError, match="rows: expects texts, got"):
        compose(StudyJob, ["rows={seed: [3]}", "input=[a]"])


def test_the_largest_seed_is_one():
    assert compose(TrainJob, ["train.seed=9223372036854775807"]).train.seed == 2**63 - 1


@pytest.mark.parametrize("value", ["[1]", "0", "nan"])
def test_the_value_of_a_section_is_refused_beside_one_of_its_keys(value):
    with pytest.raises(ConfigError, match=r"^train: is a section and takes no value"):
        compose(TrainJob, [f"train={value}", "train.steps=3"])


@pytest.mark.parametrize("word", ["train.seed=[1", "checkpoint.at=[1000", "model.mixer_pattern=[a"])
def test_a_value_that_can_not_be_read_is_answered_with_one_that_can(word):
    with pytest.raises(ConfigError) as refused:
        compose(TrainJob, [word])
    (proposed,) = shlex.split(str(refused.value).rpartition("for example, ")[2].rstrip("."))
    assert compose(TrainJob, [proposed, "train.steps=2000"])


@pytest.mark.parametrize("verb", VERBS)
def test_a_value_that_a_message_proposes_is_accepted(verb):
    """As a shell hands it over: "write, for example, slurm.time='24 h'"."""
    for leaf in leaves(SubmitJob if verb == "submit" else load(verb).JOB).values():
        cls, name = leaf.source
        field = next(f for f in fields(cls) if f.name == name)
        text = example(leaf.type, field)
        (word,) = shlex.split(text)
        value = _value(leaf.path, word, leaf)
        if kinds_of(field):  # a block, or a list of blocks: each by its word
            blocks = value if isinstance(value, list) else [value]
            assert {*blocks} <= {*kinds_of(field)}, (leaf.path, text)
        else:
            convert(leaf.type, value, leaf.bounds)
