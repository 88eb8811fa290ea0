"""Details of current recipes that no family of the exports has, against others' code and by hand.

(OLMo 2's and Gemma 3's are compared whole in hf/test_hf.py.)
"""

import pytest
import torch

from forescale.models import Transformer
from forescale.models.mixers.context import Context
from forescale.models.positions.position import rotate, rotation
from tests.models.configs import changed, model_config

BASE = model_config(
    num_layers=2,
    width=64,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=50,
    max_sequence_length=32,
    init_std=0.3,
)


def test_a_gate_and_partial_rotation_equal_those_of_qwen3_next():
    """Its attention with our weights: query and gate are one matrix, head by head."""
    module = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = changed(BASE, mixer__gate="channel", position__fraction=0.25).resolved()
    peer = module.Qwen3NextAttention(
        module.Qwen3NextConfig(
            hidden_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            rms_norm_eps=config.norm.eps,
            attn_implementation="eager",
        ),
        0,
    )
    local = config.mixer.build(config)
    both = torch.stack([m.weight.view(4, 16, 64) for m in (local.query, local.gate)], 1)
    state = {"q_proj": both.reshape(128, 64), "k_proj": local.key.weight}
    state |= {"v_proj": local.value.weight, "o_proj": local.output.weight}
    state |= {"q_norm": torch.zeros(16), "k_norm": torch.zeros(16)}  # it stores a gain less 1
    peer.load_state_dict({f"{name}.weight": weight for name, weight in state.items()})
    x_BLD = torch.randn(2, 12, 64)
    cos, sin = rotation(torch.arange(12), config)
    angles = [torch.cat([turn, turn], -1)[:, 0][None] for turn in (cos, sin)]
    mask = torch.full((12, 12), -torch.inf).triu(1)[None, None]
    expected, _ = peer(x_BLD, tuple(angles), mask)
    got = local(x_BLD, Context((cos, sin)))
    assert cos.shape[-1] == 2, "a quarter of 16 turns, in 2 pairs"
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_gate_of_a_head_multiplies_all_of_its_channels():
    config = changed(BASE, mixer__gate="head").resolved()
    local = config.mixer.build(config)
    x_BLD = torch.randn(2, 12, 64)
    with torch.no_grad():
        local.output.weight.copy_(torch.eye(64))
        gated, gate_BLH = local(x_BLD, Context()), local.gate(x_BLD).sigmoid()
        local.gate = None
        plain = local(x_BLD, Context())
    expected = plain.view(2, 12, 4, 16) * gate_BLH[..., None]
    torch.testing.assert_close(gated.view(2, 12, 4, 16), expected)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "full"])
def test_later_layers_attend_to_values_mixed_with_those_of_the_first(checkpointing):
    """Against a loop over layers that keeps the first values in a variable, with gradients."""
    sizes = dict(num_layers=3, mixer__value_residual=0.25)
    model = Transformer(changed(BASE, **sizes, activation_checkpointing=checkpointing))
    tokens, starts = (
        torch.arange(24).view(2, 12),
        torch.tensor([0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 2]),
    )
    documents = starts.expand(2, 12)
    mask_LL = (starts[:, None] == starts) & torch.ones(12, 12, dtype=torch.bool).tril()
    turn = rotation(torch.tensor([0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 4]), model.config)
    x_BLD, first = model.embedding(tokens), None
    for block in model.blocks:
        mixer, y_BLD = block.mixer, block.mixer_norm(x_BLD)
        heads = (
            linear(y_BLD).unflatten(-1, (-1, 16))
            for linear in (mixer.query, mixer.key, mixer.value)
        )
        q_BLHK, k_BLGK, v_BLGK = heads
        q_BLHK, k_BLGK = mixer.query_norm(q_BLHK), mixer.key_norm(k_BLGK)
        first = v_BLGK if first is None else first
        v_BLGK = 0.75 * v_BLGK + 0.25 * first
        k_BLHK, v_BLHK = (x.repeat_interleave(2, 2) for x in (rotate(k_BLGK, turn), v_BLGK))
        scores = torch.einsum("blhk,bshk->bhls", rotate(q_BLHK, turn), k_BLHK) / 4
        shares = scores.masked_fill(~mask_LL, -torch.inf).softmax(-1)
        y_BLD = torch.einsum("bhls,bshk->blhk", shares, v_BLHK).flatten(2)
        x_BLD = x_BLD + mixer.output(y_BLD)
        x_BLD = x_BLD + block.mlp(block.mlp_norm(x_BLD))
    expected, got = model.head(model.norm(x_BLD)), model(tokens, documents_BL=documents)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    parameters = list(model.parameters())
    for local, peer in zip(
        torch.autograd.grad(got.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(local, peer, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("placement", ["post", "sandwich"])
def test_norms_after_a_part_keep_each_layer_s_share_of_the_stream(placement):
    """What each part adds has a root mean square of 1, whatever its weights."""
    model, added = Transformer(changed(BASE, norm__placement=placement)), []
    for block in model.blocks:
        for norm in (block.mixer_post_norm, block.mlp_post_norm):
            norm.register_forward_hook(lambda module, args, out: added.append(out))
    model(torch.arange(12).view(1, 12))
    assert len(added) == 4
    for out in added:
        torch.testing.assert_close(out.square().mean(-1), torch.ones(1, 12), rtol=1e-3, atol=1e-3)


def test_a_fraction_of_a_head_need_not_be_exact_in_binary():
    """50 * 0.28 is 14.000000000000002."""
    config = changed(BASE, width=200, position__fraction=0.28)
    assert not config.problems()
    assert config.rotary_width == 14
