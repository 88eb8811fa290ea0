"""Length and batch by rule: what follows from the model's layers, and what is refused."""

import pytest

from forescale.config.compose import ConfigError, compose
from forescale.config.frozen import plain
from forescale.config.train import TrainJob
from forescale.models.flops import count

DIAL = ["recipe=depth", "model.depth=4", "run.name=dial"]


def test_one_dial_sets_length_and_batch():
    job = compose(TrainJob, DIAL)
    layers = count(job.model.resolved(50_000, 512)).blocks
    assert job.train.tokens == 20 * layers
    assert job.train.tokens_per_parameter is None, "what is frozen is the length itself"
    assert job.train.global_batch * 512 == pytest.approx(0.58 * job.train.tokens**0.571, rel=0.42)
    assert job.train.global_batch == 32  # a power of two
    deeper = compose(TrainJob, [*DIAL, "model.depth=8"])
    assert deeper.train.tokens == pytest.approx(8 * job.train.tokens, rel=0.01)
    assert deeper.train.global_batch > job.train.global_batch
    assert deeper.optimizer.adam_learning_rate == job.optimizer.adam_learning_rate / 2


def test_the_same_command_resumes_a_run_by_rule():
    frozen = plain(compose(TrainJob, DIAL))
    assert plain(compose(TrainJob, DIAL, find=lambda path: frozen)) == frozen
    assert plain(compose(TrainJob, ["run.name=dial"], find=lambda path: frozen)) == frozen


def test_what_is_typed_takes_the_place_of_a_rule():
    job = compose(TrainJob, [*DIAL, "train.tokens=1e6", "train.global_batch=4"])
    assert (job.train.tokens, job.train.global_batch) == (1e6, 4)
    job = compose(TrainJob, [*DIAL, "train.micro_batch=64"])
    assert job.train.global_batch == 64, "a micro-batch at least"
    job = compose(TrainJob, ["train.tokens_per_parameter=1"])  # in place of the default's tokens
    assert job.train.tokens == count(job.model.resolved(2, 256)).blocks


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.global_batch=0", "train.steps=9"], "global_batch: follows from a length in tok"),
        (["train.tokens=1e6", "train.tokens_per_parameter=2"], "combined with train.tokens; give"),
        (["train.tokens_per_parameter=2", "model._target_=my.Own"], "needs a model of ours"),
    ],
)
def test_a_rule_that_can_not_be_followed_is_one_sentence(words, message):
    with pytest.raises(ConfigError, match=message) as caught:
        compose(TrainJob, words)
    assert len(caught.value.problems) == 1
