"""Values without bounds, as keys take them."""

import pytest

from forescale.config.compose import compose
from forescale.config.schema import ConfigError
from forescale.config.train import TrainJob
from forescale.plan.config import PlanJob
from forescale.scaling.config import StudyJob


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
