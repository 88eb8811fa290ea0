"""Gated DeltaNet against Qwen3-Next's module; its convolution, its start, its costs, its config."""

import pytest
import torch
import torch.nn.functional as F

from forescale.models import Transformer
from forescale.models.flops import flops_per_token
from forescale.models.memory import cache_bytes
from forescale.models.mixers import delta_rule
from forescale.models.mixers.context import Context
from forescale.models.mixers.gated_deltanet_module import ShortConvolution
from tests.models.configs import changed, model_config

CONFIG = model_config(num_layers=2, width=64, num_heads=4, vocab_size=32, max_sequence_length=256,
                     mixer="gated_deltanet", mixer__value_dim=24)  # fmt: skip


def peer(config, local):
    """Qwen3-Next's module with our weights."""
    hf = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    s, V = config.sizes, config.mixer.value_dim
    module = hf.Qwen3NextGatedDeltaNet(
        hf.Qwen3NextConfig(
            hidden_size=s.width, linear_num_value_heads=s.num_heads, num_hidden_layers=1,
            linear_num_key_heads=s.num_heads, linear_key_head_dim=s.head_dim,
            linear_value_head_dim=V, linear_conv_kernel_dim=config.mixer.conv,
            rms_norm_eps=config.norm.eps, hidden_act="silu", layer_types=["linear_attention"],
        ), 0)  # fmt: skip
    rows = [getattr(local, name).weight for name in ("query", "key", "value", "gate")]
    heads = [w.unflatten(0, (s.num_heads, -1)) for w in rows]
    pair = torch.stack([local.beta.weight, local.decay.weight], 1)
    state = {
        "dt_bias": local.decay_bias, "A_log": local.log_rate,
        "conv1d.weight": local.convolution.weight,
        "in_proj_qkvz.weight": torch.cat(heads, 1).flatten(0, 1),
        "in_proj_ba.weight": pair.flatten(0, 1),
        "norm.weight": local.output_norm.weight, "out_proj.weight": local.output.weight,
    }  # fmt: skip
    module.load_state_dict(state)
    return module


@pytest.mark.parametrize("length", [5, 64, 150])
def test_it_equals_qwen3_next(length):
    torch.manual_seed(0)
    local = CONFIG.mixer.build(CONFIG)
    torch.nn.init.normal_(local.output_norm.weight, 1, 0.1)
    other, x = peer(CONFIG, local), torch.randn(2, length, 64)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    got, expected = local(one, Context()), other(two)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    got.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-5)
    for name, theirs_name in (("log_rate", "A_log"), ("decay_bias", "dt_bias")):
        pair = getattr(local, name).grad, getattr(other, theirs_name).grad
        torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)
    pair = local.convolution.weight.grad, other.conv1d.weight.grad
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lags", [1, 4])
def test_the_convolution_equals_torchs_own_and_reads_its_document_alone(lags):
    torch.manual_seed(0)
    module, x = ShortConvolution(6, lags).double(), torch.randn(2, 9, 6, dtype=torch.float64)
    keep = torch.ones(1, 9, dtype=torch.float64)

    def alone(x):
        padded = F.pad(x.mT, (lags - 1, 0))
        return F.silu(F.conv1d(padded, module.weight, groups=6)).mT

    torch.testing.assert_close(module(x, keep), alone(x))
    keep[:, [2, 3, 7]] = 0
    pieces = [alone(x[:, a:b]) for a, b in ((0, 2), (2, 3), (3, 7), (7, 9))]
    torch.testing.assert_close(module(x, keep), torch.cat(pieces, 1))
    x.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: module(x, keep), (x, module.weight))


def test_heads_begin_with_short_and_long_memories():
    torch.manual_seed(0)
    config = changed(CONFIG, width=1024, num_heads=512)
    mixer = config.mixer.build(config)
    step = F.softplus(mixer.decay_bias)
    assert 0.001 <= step.min() < 0.0012
    assert 0.08 < step.max() < 0.1001
    memory = 1 / (mixer.log_rate.exp() * step)  # tokens
    assert memory.min() < 1
    assert memory.max() > 1000


def test_flops_do_not_grow_with_the_length_nor_does_the_cache():
    short, long = (flops_per_token(CONFIG, length) for length in (64, 64 * 100))
    assert short == long
    assert flops_per_token(CONFIG, 100) <= 1.05 * short, "chunks of 50"
    half, whole = (flops_per_token(CONFIG, 6400, causal=causal) for causal in (True, False))
    assert 0.8 * whole < half < whole
    assert cache_bytes(CONFIG, 3) == cache_bytes(CONFIG, 10_000)


def test_causal_flops_are_the_entries_that_are_not_zero():
    """Counted entry by entry, for 3 chunks of 50 tokens."""
    heads, K, V, C = 4, 16, 24, 50
    later = sum(1 for i in range(C) for j in range(C) if j < i)
    with_own = sum(1 for i in range(C) for j in range(C) if j <= i)
    a_chunk = 2 * (later * K + with_own * K + with_own * (K + V) + with_own * V)
    states = 2 * C * (3 * 2 * K * V)  # 2 of the 3 chunks read a state, 2 make one
    whole = CONFIG.sizes.num_layers * 3 * heads * (3 * a_chunk + states) / 150
    wide = changed(CONFIG, max_sequence_length=150)
    none = flops_per_token(wide, 150) - 2 * 3 * heads * (2 * C * (3 * K + 2 * V) + 6 * K * V)
    assert flops_per_token(wide, 150, causal=True) - none == pytest.approx(whole, abs=6)


@torch.no_grad()
def test_bf16_is_near_fp32():
    torch.manual_seed(0)
    model, tokens = Transformer(CONFIG).eval(), torch.randint(0, 32, (2, 200))
    exact = model(tokens)
    rounded = model.bfloat16()(tokens).float()
    assert (rounded - exact).norm() < 0.05 * exact.norm()


@pytest.mark.slow
def test_it_learns_to_recall():
    """Four pairs of key and value, and the pairs again in another order: what follows a key.

    Any of the four values at random costs 1.39 nats, which minGRU doesn't get far below.
    """
    torch.manual_seed(0)
    model = Transformer(changed(CONFIG, num_heads=2, mixer__value_dim=None))
    update = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95))
    for _ in range(800):
        keys = torch.stack([torch.randperm(16)[:4] for _ in range(32)])
        values, order = torch.randint(16, 32, (32, 4)), torch.rand(32, 4).argsort(1)
        rows = [keys, values], [keys.gather(1, order), values.gather(1, order)]
        tokens = torch.cat([torch.stack(pair, -1).flatten(1) for pair in rows], 1)
        targets = torch.full_like(tokens, -100)
        targets[:, 8::2] = values.gather(1, order)
        loss = model(tokens, targets).mean() / 4
        update.zero_grad()
        loss.backward()
        update.step()
    assert loss < 0.3


@pytest.mark.parametrize("dim", [-1, -2])
def test_sums_in_one_order_are_running_sums(dim):
    """What a GPU does instead of a cumsum that has no fixed order; -inf: the state starts again."""
    x = torch.randn(2, 7, 65, dtype=torch.float64)
    x[0, 3, 5:9] = -torch.inf
    torch.testing.assert_close(delta_rule._summed_in_order(x, dim), x.cumsum(dim))


def test_a_layer_with_sums_in_one_order_has_the_same_gradients(monkeypatch):
    model, x = Transformer(CONFIG).double(), torch.randint(32, (2, 131))

    def gradients():
        return torch.autograd.grad(model(x).square().sum(), [*model.parameters()])

    usual = gradients()
    monkeypatch.setattr(delta_rule, "_summed", delta_rule._summed_in_order)
    torch.testing.assert_close(gradients(), usual)
