"""Notes on jobs that are far from published ones: which numbers, and that what they say helps."""

import re
from itertools import pairwise

import pytest

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.plan.published import PUBLISHED, interpolated, published_notes

SIZE = 1.1e9
BATCH, WINDOW, TOKENS = "train.global_batch", "train.sequence_length", "train.tokens"
WARMUP, RATE = "schedule.warmup", "optimizer.learning_rate"
GOOD = ["recipe=llama-1b", "optimizer=adamw", f"{RATE}=4e-4"]


def notes(*words, size=SIZE):
    return published_notes(compose(TrainJob, words), size)


def keys(*words, size=SIZE):
    """What the notes propose to set, in their order."""
    return [re.search(r"set ([\w.]+)=", note)[1] for note in notes(*words, size=size)]


def test_the_defaults_are_absurd_for_a_billion_parameters_and_fine_for_few():
    assert keys("model=llama-1b") == [WINDOW, BATCH, TOKENS]
    assert all("add recipe=llama-1b, or set" in note for note in notes("model=llama-1b")[:2])
    assert keys("model=tiny", size=1.7e6) == []


def test_setting_all_that_the_notes_say_leaves_none():
    words = ["model=llama-1b", "optimizer=adamw", "schedule.warmup=0"]
    for _ in range(3):  # a longer window, then the batch that fits it
        fixes = [re.search(r"set (\S+=(?:'[^']*'|\S+))\.$", n)[1] for n in notes(*words)]
        words += [word.replace("'", "") for word in fixes]
    assert keys(*words) == []
    assert RATE in " ".join(words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train.sequence_length=256", "train.global_batch=8192"], [WINDOW]),
        (["train.global_batch=64"], [BATCH]),
        (["train.global_batch=16384", "train.micro_batch=8"], [BATCH]),
        (["train.global_batch=512"], []),
        (["train.tokens=5e8", "schedule.warmup=10 %"], [TOKENS]),
        (["train.tokens=6e12"], [TOKENS]),
        (["train.tokens=2e9", "schedule.warmup=1 %"], []),
        (["schedule.warmup=0"], [WARMUP]),
        (["schedule.warmup=30 %"], [WARMUP]),
        (["schedule.warmup=10 %"], []),
        (["optimizer.learning_rate=1.1e-3"], []),
        (["optimizer.learning_rate=1.3e-3"], [RATE]),
        (["optimizer=lion", "optimizer.learning_rate=3e-4"], []),
        (["optimizer=lion", "optimizer.learning_rate=5e-4"], [RATE]),
        (["optimizer=muon", "optimizer.learning_rate=0.02"], []),
        (["optimizer=muon", "optimizer.learning_rate=0.1"], [RATE]),
        (["model.parametrization=mup", "model.parametrization.base_width=256", f"{RATE}=1e-2"], []),
    ],
)
def test_each_number_is_compared(words, expected):
    assert keys(*GOOD, *words) == expected


def test_a_run_from_another_s_weights_may_be_short():
    origin = ["run.from.run=trunk", "run.from.step=8", "run.from.load=weights"]
    assert keys(*GOOD, *origin, "train.tokens=5e8", "schedule.warmup=0") == []


def test_the_recipe_that_is_named_fits_the_kind_of_model():
    def named(*words):
        return re.search(r"recipe=(\S+),", notes(*words, "train.global_batch=8", size=100e6)[0])[1]

    assert named("model=llama-160m") == "gpt2-124m"
    assert named("model=bert-base", "objective=masked") == "bert-base"
    assert named("model=t5-small", "objective=seq2seq") == "t5-small"
    assert named("model=depth", "model.mlp=moe") == "mixtral-8x7b"
    lines = notes("model._target_=mine.Model", size=1e9)
    assert lines
    assert "recipe=" not in " ".join(lines)


def test_between_two_published_sizes_a_number_is_between_theirs():
    for low, high in pairwise(PUBLISHED):
        assert low.parameters < high.parameters
        for name in ("step_tokens", "learning_rate"):
            ends = sorted((getattr(low, name), getattr(high, name)))
            middle = interpolated((low.parameters * high.parameters) ** 0.5, name)
            assert middle == pytest.approx((ends[0] * ends[1]) ** 0.5)
            assert interpolated(low.parameters, name) == pytest.approx(getattr(low, name))
    assert interpolated(1e6, "step_tokens") == PUBLISHED[0].step_tokens
    assert interpolated(1e13, "step_tokens") == PUBLISHED[-1].step_tokens
