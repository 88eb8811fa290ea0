"""What train.invariant can't be combined with, and what it allows."""

import pytest

from forescale.config.compose import compose
from forescale.config.schema import ConfigError
from forescale.config.train import TrainJob

WORDS = ["train.invariant=true", "train.steps=9", "train.micro_batch=2", "train.global_batch=10"]


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("precision=fp16", "precision.kind"),
        ("train.deterministic=false", "train.deterministic"),
        ("precision=bf16 engine.gradient_dtype=precision", "engine.gradient_dtype"),
        ("engine.deepspeed.communication_data_type=bf16", "engine.deepspeed"),
        ("engine.deepspeed.gradient_predivide_factor=3", "engine.deepspeed.gradient"),
        ("engine=zero3 engine.quantized_weights=true", "engine.quantized_weights"),
        ("model.mlp=moe engine.expert_parallel=2", "engine.expert_parallel"),
        ("engine=zero3 engine.hierarchical_partition=2", "engine.hierarchical_partition"),
        ("launch.processes=6", "train.global_batch"),
        ("launch.processes=3 train.first_batch=2 train.global_batch=16 train.batch_ramp=50%", "f"),
    ],
)
def test_what_makes_sums_depend_on_ranks_is_refused(words, key):
    with pytest.raises(ConfigError) as e:
        compose(TrainJob, [*WORDS, "launch.processes=2", *words.split()])
    assert any(problem.key.removeprefix("train.").startswith(key.removeprefix("train."))
               for problem in e.value.problems), e.value  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
def test_any_number_of_ranks_up_to_the_micro_batches_is_allowed_and_adds_in_fp32(ranks):
    job = compose(TrainJob, [*WORDS, f"launch.processes={ranks}", "precision=bf16"])
    assert job.gradient_dtype(ranks) == "fp32"
    assert job.accumulation(ranks) == -(-5 // ranks)
