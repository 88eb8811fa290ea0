"""Tensor parallelism: ranks that divide matrices compute what one rank computes."""

import pytest

from tests.distributed import ranks

pytestmark = pytest.mark.distributed

MODELS = [
    {"qk_norm": True, "bias": True, "mlp": "gelu"},
    {"mixer": "window", "window": 8, "attention_gate": "head", "z_loss": 1e-3, "loss_chunk": 16},
    {"mixer": "latent", "head": "dense", "qk_norm": False},
    {"activation_checkpointing": True, "value_residual": 0.5, "tie_embeddings": True},
    {"vocab_size": 97, "logit_softcap": 5.0, "norm_placement": "sandwich"},
]


def test_losses_and_gradients_are_those_of_the_whole_model():
    cases = [[words, compiled] for words in MODELS for compiled in (False, True)]
    found = ranks.run("tensor_scenarios:parts", 2, cases=cases)
    assert len(found) == len(cases)
    assert max(found) < 1e-5, list(zip(cases, found, strict=True))
