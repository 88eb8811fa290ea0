"""An MLP that computes some columns at a time, against the whole."""

import pytest
import torch

from forescale.models import Transformer
from forescale.models.flops import flops_per_token, flops_recomputed
from forescale.models.memory import activations
from tests.models.checks import assert_one_graph
from tests.models.configs import changed, model_config

CONFIG = model_config(
    num_layers=2, width=32, num_heads=2, mlp_width=48, vocab_size=50, max_sequence_length=24
)


def losses_and_gradients(config):
    torch.manual_seed(0)
    model = Transformer(config)
    tokens = torch.randint(0, 50, (2, 24))
    total = model(tokens, tokens).sum()
    total.backward()
    return [total.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("kind", ["swiglu", "gelu_exact"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_chunks_compute_what_the_whole_does(kind, checkpointing):
    config = changed(CONFIG, mlp=kind, activation_checkpointing=checkpointing)
    whole = losses_and_gradients(config)
    for chunk in (5, 24, 1000):
        got = losses_and_gradients(changed(config, mlp__chunk=chunk))
        torch.testing.assert_close(got, whole, rtol=1e-5, atol=1e-6)


def test_a_long_row_keeps_less_and_computes_more():
    chunked = changed(CONFIG, mlp__chunk=4, max_sequence_length=4096)
    config = changed(chunked, mlp__chunk=None)
    saved, whole = (activations(c, 1, 4096).total for c in (chunked, config))
    assert whole - saved == 2 * 4 * 2 * 48 * 4096 - 4 * 2 * 48 * 4  # of 2 layers, but for a chunk
    keys = flops_recomputed(chunked, 4096) - flops_recomputed(config, 4096)
    assert keys == 2 * 2 * 3 * 32 * 48  # the three matrices of 2 layers, once
    assert flops_per_token(chunked, 4096) == flops_per_token(config, 4096)
    # 512 ranks have 8 columns each, two chunks; 1,024 have 4, which are one: nothing is made again.
    assert flops_recomputed(chunked, 4096, 512) - flops_recomputed(config, 4096, 512) == keys
    assert flops_recomputed(chunked, 4096, 1024) == flops_recomputed(config, 4096, 1024)


@pytest.mark.slow  # seconds
def test_a_block_with_chunks_is_one_graph():
    torch.manual_seed(0)
    model = Transformer(changed(CONFIG, mlp__chunk=5))
    tokens = torch.randint(0, 50, (2, 24))
    assert_one_graph(model, lambda run: run(tokens, tokens).sum())
