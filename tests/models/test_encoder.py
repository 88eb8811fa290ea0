"""An encoder: both sides seen, padding and documents kept apart; a Llama that sees all as the
oracle. BERT: test_bert_and_t5.py."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from forescale.models import Transformer
from forescale.models.flops import flops_per_token
from forescale.models.hf import to_hf
from tests.models.configs import changed, model_config

L, V = 12, 37
SMALL = model_config(
    num_layers=2, width=32, num_heads=4, num_kv_heads=2, mlp_width=24, vocab_size=V,
    max_sequence_length=32, init_std=0.3, loss_chunk=0, causal=False,
)  # fmt: skip
LEARNED = changed(
    SMALL, position="learned", norm="layernorm", mlp="gelu", bias=True, mixer__qk_norm="none",
    num_kv_heads=4, norm__eps=1e-6, mlp_width=48,
)  # fmt: skip
CONFIGS = {
    "rotary": SMALL,
    "learned": LEARNED,
    "sinusoidal": changed(SMALL, position="sinusoidal"),
    "none": changed(SMALL, position="none"),
}
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def build(config, **keys):
    torch.manual_seed(0)
    return Transformer(changed(config, **keys)).eval()


def tokens(rows, length=L):
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@each
def test_a_prediction_depends_on_both_sides_and_a_causal_one_never_on_later_tokens(config):
    for causal in (False, True):
        model, x = build(config, causal=causal), tokens(1)
        for masked in (0, 5, L - 1):
            changed = x.repeat(L, 1)
            changed[torch.arange(L), torch.arange(L)] = (x[0] + 1) % V  # row t differs at t
            difference = (model(changed)[:, masked] - model(x)[:, masked]).abs().amax(-1)
            before, after = difference[:masked], difference[masked + 1 :]
            assert (before > 1e-3).all()
            assert (after < 1e-5).all() if causal else (after > 1e-3).all()


@torch.no_grad()
@each
def test_padding_on_either_side_changes_nothing(config):
    model, row, pad = build(config), tokens(1), 5
    batch = tokens(3, L + pad).roll(1, 0)
    batch[0, pad:], batch[1, :L] = row[0], row[0]
    mask = torch.ones(3, L + pad, dtype=torch.bool)
    mask[0, :pad] = mask[1, L:] = False
    logits, alone = model(batch, padding_mask_BL=mask), model(row)
    torch.testing.assert_close(logits[0, pad:], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[1, :L], alone[0], rtol=1e-4, atol=1e-5)
    assert (model(batch)[1, :L] - alone[0]).abs().max() > 1e-3, "without a mask it would be seen"


@each
@pytest.mark.parametrize("pad", [0, 3])
def test_a_document_is_computed_as_if_it_were_alone(config, pad):
    model, x, cuts = build(config), tokens(1), (0, 3, 4, 9, L)
    numbers = torch.tensor([[i for i in range(4) for _ in range(cuts[i], cuts[i + 1])]])
    alone = torch.cat([model(x[:, a:b]) for a, b in pairwise(cuts)], 1)
    real = F.pad(torch.ones(1, L, dtype=torch.bool), (0, pad))
    padded, same = F.pad(x, (0, pad), value=7), F.pad(numbers, (0, pad), value=3)
    together = model(padded, padding_mask_BL=real if pad else None, documents_BL=same)[:, :L]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    expected = torch.autograd.grad(alone.square().sum(), list(model.parameters()))
    actual = torch.autograd.grad(together.square().sum(), list(model.parameters()))
    for local, peer in zip(actual, expected, strict=True):
        torch.testing.assert_close(local, peer, rtol=1e-3, atol=1e-3)


@each
def test_flops_are_counted_over_the_whole_square(config):
    model, x = build(config), tokens(2, 32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x, x).sum().backward()
    whole = flops_per_token(config, 32)
    assert counter.get_total_flops() == whole * x.numel()
    assert flops_per_token(config, 32, causal=True) == whole, "no key is left out"


def scrambled(config):
    """None of whose weights is at a special value, so that a swapped one shows."""
    model = build(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def test_logits_equal_a_llama_that_is_shown_the_whole_square():
    """Rotary positions, grouped queries and SwiGLU: Llama's weights under a mask of both sides."""
    transformers = pytest.importorskip("transformers")
    local = scrambled(changed(SMALL, mixer__qk_norm="none"))
    causal = changed(local.config, causal=True)
    hf_config, state = to_hf(causal, local.state_dict())
    settings = {k: v for k, v in hf_config.items() if k not in ("architectures", "model_type")}
    config = transformers.LlamaConfig(**settings, attn_implementation="eager")
    peer = transformers.LlamaForCausalLM(config).eval()
    peer.load_state_dict(dict(state))
    x = tokens(2, 20)
    real = torch.arange(20).expand(2, 20) < torch.tensor([[20], [13]])
    labels = torch.zeros(2, 1, 20, 20).masked_fill(~real[:, None, None, :], -1e30)
    with torch.no_grad():
        expected = peer(x, attention_mask=labels).logits
        got = local(x, padding_mask_BL=real)
    torch.testing.assert_close(got[real], expected[real], rtol=1e-5, atol=1e-5)
