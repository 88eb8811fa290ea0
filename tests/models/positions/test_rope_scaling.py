"""Frequencies of scaled rotary positions equal transformers'; what cannot be scaled."""

import math

import pytest
import torch

from forescale.models import Transformer
from forescale.models.positions.rope_scaling import frequencies
from tests.models.configs import changed, model_config

CPU = torch.device("cpu")
BASE = model_config(num_layers=1, width=256, num_heads=2, vocab_size=50, max_sequence_length=8192)
YARN = {"position__scaling": "yarn", "position__scaling__factor": 4.0}
SHAPES = [
    (4.0, 10_000.0, 2, 2048),
    (8.0, 500_000.0, 4, 4096),
    (1.5, 500.0, 8, 96),
    (32.0, 1e6, 2, 7),
]


def scaled(kind, factor, theta, heads, original):
    config = changed(
        BASE,
        position__scaling=kind,
        position__scaling__factor=factor,
        position__theta=theta,
        num_heads=heads,
    )
    args = {"position__scaling__original_length": original} if kind != "ntk" else {}
    return changed(config, **args).resolved()


def of_transformers(kind, original, config, **parameters):
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    peer = transformers.LlamaConfig(
        hidden_size=256,
        num_attention_heads=config.num_heads,
        max_position_embeddings=original,
        rope_parameters={"rope_type": kind, "rope_theta": config.position.theta, **parameters},
    )
    return lambda **keys: ROPE_INIT_FUNCTIONS[kind](peer, CPU, **keys)


@pytest.mark.parametrize(("factor", "theta", "heads", "original"), SHAPES)
def test_yarn_is_that_of_transformers(factor, theta, heads, original):
    config = scaled("yarn", factor, theta, heads, original)
    got, attention = frequencies(config, CPU)
    lengths = {"factor": factor, "original_max_position_embeddings": original}
    expected, factor_of_theirs = of_transformers("yarn", original, config, **lengths)()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert attention == pytest.approx(factor_of_theirs, rel=1e-6)


@pytest.mark.parametrize(("factor", "theta", "heads", "original"), SHAPES)
def test_llama3_is_that_of_transformers(factor, theta, heads, original):
    config = scaled("llama3", factor, theta, heads, original)
    got, attention = frequencies(config, CPU)
    args = {"factor": factor, "original_max_position_embeddings": original}
    args |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    expected, factor_of_theirs = of_transformers("llama3", original, config, **args)()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert attention == factor_of_theirs == 1


@pytest.mark.parametrize(("factor", "theta", "heads", "original"), SHAPES)
def test_ntk_is_the_dynamic_one_of_transformers_at_the_new_length(factor, theta, heads, original):
    """Theirs, with a factor of 1, at a sequence of `factor` times the original length."""
    config = scaled("ntk", factor, theta, heads, original)
    got, attention = frequencies(config, CPU)
    expected, _ = of_transformers("dynamic", original, config, factor=1.0)(
        seq_len=factor * original
    )
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)
    assert attention == 1


def test_the_original_length_is_the_longest_over_the_factor_unless_given():
    args = scaled("yarn", 4.0, 10_000.0, 2, 2048)
    derived = changed(args, position__scaling__original_length=None)
    assert derived.position.scaling.original(derived) == 2048
    assert torch.equal(frequencies(args, CPU)[0], frequencies(derived, CPU)[0])


@pytest.mark.parametrize("kind", ["ntk", "yarn"])
def test_a_token_does_not_know_how_long_its_sequence_is(kind):
    torch.manual_seed(0)
    model = Transformer(
        changed(BASE, position__scaling=kind, position__scaling__factor=4.0, max_sequence_length=16)
    )
    tokens = torch.randint(0, 50, (1, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[:, :10], model(tokens[:, :10]))


@pytest.mark.parametrize(
    ("args", "field"),
    [
        ({"position__scaling": "ntk"}, "position.scaling.factor"),
        (YARN | {"position__scaling__factor": 0.5}, "position.scaling.factor"),
        (YARN | {"position__scaling__factor": math.nan}, "position.scaling.factor"),
        (YARN | {"position__theta": 1.0}, "position.theta"),
        (YARN | {"position__scaling": "ntk", "num_heads": 128}, "num_heads"),
        (YARN | {"position__scaling__original_length": 0}, "position.scaling.original_length"),
    ],
)
def test_what_cannot_be_scaled_names_its_field(args, field):
    config = changed(BASE, **args)
    assert [problem[0] for problem in config.problems()] == [field]
    with pytest.raises(ValueError, match=rf"^model\.{field}: .*; .*\.$"):
        Transformer(config)
