"""The files of conf/model have the sizes that were published, counted without building a weight."""

from dataclasses import replace

import pytest

from forescale.config.compose import CONF, compose
from forescale.config.train import TrainJob
from forescale.models.flops import count

# Trainable parameters as published, or as the authors' own weights have them; None: of no paper.
PUBLISHED = {
    "gpt2-124m": 124_439_808,
    "gpt2-350m": 354_823_168,  # called 345M in the paper, 355M by those who count
    "llama-160m": 162_417_408,  # JackFram/llama-160m of the hub
    "llama-1b": 1_100_048_384,  # TinyLlama
    "llama-3b": 3_212_749_824,  # Llama 3.2
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-70b": 68_976_648_192,  # Llama 2
    "llama-405b": 405_853_388_800,  # Llama 3.1
    "mixtral-8x7b": 46_702_792_704,
    "bert-base": 109_514_298,  # with the head for masked tokens, without the pooler
    "t5-small": 60_506_624,
}
# What ours leaves out: the table of two segments.
LEFT_OUT = {"bert-base": 2 * 768}
OBJECTIVES = {"bert-base": "masked", "t5-small": "seq2seq"}
OF_NO_PAPER = {
    "tiny",
    "fast-learner",
    "depth",
    "custom",
    "transformers",
    "deepseek-v3",
}  # or only nearly


def test_every_size_is_here():
    assert PUBLISHED.keys() | OF_NO_PAPER == {path.stem for path in (CONF / "model").glob("*.yaml")}


@pytest.mark.parametrize("name", PUBLISHED)
def test_it_has_the_parameters_that_were_published(name):
    words = [f"model={name}", "train.sequence_length=512", "train.steps=100"]
    job = compose(TrainJob, [*words, f"objective={OBJECTIVES.get(name, 'next_token')}"])
    assert not job.problems()
    config = replace(job.model, source_length=256 if name == "t5-small" else None)
    counts = count(config.resolved(sequence_length=512))
    assert counts.total == PUBLISHED[name] - LEFT_OUT.get(name, 0)
    if name == "mixtral-8x7b":
        assert round(counts.active / 1e9, 1) == 12.9
