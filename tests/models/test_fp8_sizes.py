"""Which matrices are multiplied in fp8, and which sizes of a model and a batch are refused."""

import re

import pytest

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.models.fp8 import fp8_matrices
from forescale.run.feed import resolved_model
from tests.models.configs import model_config

FP8 = ["precision=bf16", "precision.fp8=tensorwise"]
SIZES = dict(num_layers=2, width=64, num_heads=4, mlp_width=96, vocab_size=50)


def matrices(tensor=1, **keys):
    config = model_config(**SIZES | dict(max_sequence_length=32) | keys).resolved()
    got = fp8_matrices(config, tensor)
    return {name.removeprefix("blocks.1."): shape for name, shape in got.items() if ".1." in name}


def test_those_of_a_block_but_for_one_number_a_head():
    attention = ["mixer.query.weight", "mixer.key.weight", "mixer.value.weight"]
    attention += ["mixer.output.weight"]
    mlp = ["mlp.gate.weight", "mlp.up.weight", "mlp.down.weight"]
    assert [*matrices()] == attention + mlp
    assert [*matrices(mixer__gate="head")] == attention + mlp
    assert "mixer.gate.weight" in matrices(mixer__gate="channel")
    deltas = matrices(mixer="gated_deltanet")
    assert "mixer.query.weight" in deltas
    assert not {"mixer.decay.weight", "mixer.beta.weight"} & {*deltas}
    # Neither experts nor their router, but the MLP of a mixture's first layer, which is dense.
    assert [*matrices(mlp="moe", mlp__expert_width=32)] == attention
    assert not any("head" in name or "embedding" in name for name in matrices(tie_embeddings=False))


def test_a_rank_has_its_part():
    whole, part = matrices(), matrices(2)
    assert whole["mlp.up.weight"] == (96, 64)
    assert part["mlp.up.weight"] == (48, 64)
    assert part["mlp.down.weight"] == (64, 48)


def refusal(*words):
    """What a job with these overrides is refused for; None if it is not."""
    job = ["train.steps=9", "model.width=64", "model.num_heads=4", "model.num_layers=2", *FP8]
    try:
        resolved_model(compose(TrainJob, [*job, *words]), 4096)
    except UserError as e:
        return str(e)
    return None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["model.mlp_width=40"], "40 x 64, and fp8 takes multiples of 16; change model.mlp_width"),
        (["model.num_heads=8", "model.num_kv_heads=1"], "8 x 64.*model.num_kv_heads"),
        (["model.mlp_width=48", "engine.tensor_parallel=2", "optimizer=adamw"], "part of.*24 x 64"),
        (["train.sequence_length=250", "train.micro_batch=2"], "2 x 250 = 500 tokens at once"),
        (["model.mlp.chunk=100", "train.micro_batch=2"], "2 x 56 = 112|2 x 100 = 200 tokens"),
        (["train.sequence_length=24", "train.micro_batch=1"], "1 x 24 = 24.*train.micro_batch or"),
        (["precision=fp32"], "bf16 on GPUs that multiply fp8, and this is fp32"),
        (["precision=fp16"], "and this is fp16; write precision=bf16"),
        (["model=custom", "model._target_=a.B"], "this is another class; leave it out"),
    ],
)
def test_what_tensor_cores_do_not_take_is_refused_with_the_key(words, says):
    got = refusal(*words)
    assert got.startswith("precision.fp8")
    assert re.search(says, got), got


def test_what_they_take_is_not():
    assert refusal() is None
    assert refusal("train.sequence_length=8", "train.micro_batch=2") is None
    assert refusal("engine.sequence_parallel=2", "launch.processes=2") is None
    assert refusal("model.mlp_width=40", "precision.fp8=none") is None


def test_each_half_of_an_encoder_decoders_row_counts():
    words = ["model.encoder_layers=1", "objective=prefix", "train.sequence_length=48"]
    assert "1 x 24 = 24 tokens" in refusal(*words, "train.micro_batch=1")
    assert refusal(*words, "train.micro_batch=2") is None
