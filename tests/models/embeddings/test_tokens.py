"""What else is learned of a token and the one before it, against plain sums, and its rules."""

from dataclasses import replace

import pytest
import torch

from forescale.models import ModelConfig, Transformer
from forescale.models.mixers.attention import Attention
from forescale.models.mixers.context import Context

BASE = ModelConfig(
    num_layers=3,
    width=32,
    num_heads=4,
    num_kv_heads=2,
    mlp_width=24,
    vocab_size=50,
    max_sequence_length=16,
    init_std=0.3,
)
X = torch.randint(0, 50, (2, 12), generator=torch.Generator().manual_seed(0))


def test_a_model_with_them_begins_as_one_without():
    found = []
    for more in ({}, dict(value_embedding=1, bigram_rows=31, token_shift=True)):
        torch.manual_seed(0)
        found.append(Transformer(replace(BASE, **more)).eval()(X))
    assert torch.equal(*found)


def test_value_embeddings_are_of_every_so_manieth_layer_from_the_last():
    layers = [replace(BASE, value_embedding=n).value_layers for n in range(4)]
    assert layers == [[], [0, 1, 2], [0, 2], [2]]


def test_values_have_what_the_token_adds_to_them():
    mixer, x_BLD = Attention(BASE.resolved()), torch.randn(2, 12, 32)
    added_BLD = torch.randn(2, 12, 16)
    plain = mixer(x_BLD, Context())
    found = mixer(x_BLD, Context(token_values=added_BLD))
    # Attention averages values linearly: of zero values it averages the added ones alone.
    mixer.value.weight.data.zero_()
    alone = mixer(x_BLD, Context(token_values=added_BLD))
    torch.testing.assert_close(found, plain + alone, rtol=1e-4, atol=1e-5)
    assert alone.abs().max() > 0.1


@torch.no_grad()
def test_queries_keys_and_values_have_a_part_of_those_before():
    """As if each matrix read the token, and weighed rows of it the token before."""
    config = replace(BASE, token_shift=True).resolved()
    mixer, plain, x_BLD = Attention(config), Attention(BASE.resolved()), torch.randn(2, 12, 32)
    plain.load_state_dict({n: p for n, p in mixer.state_dict().items() if "_shift" not in n})
    for name in ("query", "key", "value"):
        weight, matrix = getattr(mixer, f"{name}_shift").weight.normal_(), getattr(plain, name)

        def whole(x_BLD, matrix=matrix.weight, weight=weight):
            y_BLD = x_BLD @ matrix.T
            for i in range(x_BLD.shape[1] - 1, 0, -1):
                y_BLD[:, i] += weight * y_BLD[:, i - 1]
            return y_BLD

        matrix.forward = whole
    torch.testing.assert_close(mixer(x_BLD, Context()), plain(x_BLD, Context()))


@pytest.mark.parametrize(
    ("more", "field", "message"),
    [
        (dict(bigram_rows=-1), "bigram_rows", "negative"),
        (dict(value_embedding=1, mixer="mingru"), "value_embedding", "without mixer attention"),
        (dict(token_shift=True, mixer="mingru"), "token_shift", "without mixer attention"),
        (
            dict(value_embedding=2, mixer_pattern=["latent", "attention"]),
            "value_embedding",
            "no values of attention",
        ),
        (dict(value_embedding=1, mtp_layers=1), "value_embedding", "later tokens"),
        (dict(bigram_rows=9, encoder_layers=1), "bigram_rows", "alone"),
        (dict(token_shift=True, encoder_layers=1), "token_shift", "alone"),
    ],
)
def test_what_they_need_is_said(more, field, message):
    found = [problem for name, problem, _ in replace(BASE, **more).problems() if name == field]
    assert len(found) == 1
    assert message in found[0]
