"""Latent attention against DeepSeek-V3's module; both of its forms; its cache, costs and config."""

import pytest
import torch

from forescale.models import Transformer
from forescale.models.memory import cache_bytes
from forescale.models.mixers.context import Context
from forescale.models.mixers.latent_module import PerHead
from forescale.models.positions.position import positions_of, rotation
from tests.models.configs import changed, model_config

CONFIG = model_config(
    num_layers=2, width=64, num_heads=4, vocab_size=32, max_sequence_length=64, mixer="latent",
    mixer__rank=24,
)  # fmt: skip


def peer(config, local, interleaved):
    """DeepSeek-V3's module with our weights. It has the rotating part of a head last, keys and
    values of a head together and, interleaved, the two coordinates of a rotation side by side."""
    hf = pytest.importorskip("transformers.models.deepseek_v3.modeling_deepseek_v3")
    s, (rank, query_rank), T = config.sizes, config.mixer.ranks(config), config.rotary_width
    known = hf.DeepseekV3Config(
        hidden_size=s.width, num_attention_heads=s.num_heads, num_key_value_heads=s.num_heads,
        q_lora_rank=query_rank or None, kv_lora_rank=rank, qk_rope_head_dim=T,
        qk_nope_head_dim=s.head_dim - T, v_head_dim=s.head_dim, rope_interleave=interleaved,
        attention_bias=False, num_hidden_layers=1, max_position_embeddings=64,
    )  # fmt: skip
    known._attn_implementation = "eager"
    order = torch.arange(T).view(2, -1).T.flatten() if interleaved else torch.arange(T)
    heads = local.query.weight.unflatten(0, (s.num_heads, -1))
    last = torch.cat([heads[:, T:], heads[:, :T][:, order]], 1).flatten(0, 1)
    pair = [m.weight.unflatten(0, (s.num_heads, -1)) for m in (local.key, local.value)]
    state = {
        "kv_a_proj_with_mqa.weight": torch.cat([local.latent.weight, local.rope_key.weight[order]]),
        "kv_a_layernorm.weight": local.latent_norm.weight,
        "kv_b_proj.weight": torch.cat(pair, 1).flatten(0, 1),
        "o_proj.weight": local.output.weight,
        "q_b_proj.weight" if query_rank else "q_proj.weight": last,
    }
    if query_rank:
        state["q_a_proj.weight"] = local.query_latent.weight
        state["q_a_layernorm.weight"] = local.query_norm.weight
    module = hf.DeepseekV3Attention(known, 0)
    module.load_state_dict(state)
    return module, hf.DeepseekV3RotaryEmbedding(known)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("query_rank", [None, 20])
def test_it_equals_deepseek_v3(query_rank, interleaved):
    torch.manual_seed(0)
    config = changed(CONFIG, mixer__query_rank=query_rank, init_std=0.2)
    local, x = config.mixer.build(config), torch.randn(2, 11, 64)
    torch.nn.init.normal_(local.latent_norm.weight, 1, 0.1)
    other, rotary = peer(config, local, interleaved)
    at = positions_of(11, x.device)
    visible = torch.full((11, 11), -torch.inf).triu(1)[None, None]
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    got = local(one, Context(rotation(at, config)))
    expected, _ = other(two, rotary(two, at[None]), visible)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    got.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("position", ["rotary", "alibi", "none"])
def test_absorbed_matrices_give_the_same_as_expanded_keys(position, bias, monkeypatch):
    torch.manual_seed(0)
    config = changed(CONFIG, position=position, bias=bias, init_std=0.2)
    model, tokens = Transformer(config).eval(), torch.randint(0, 32, (2, 40))
    for module in model.modules():
        if isinstance(module, PerHead) and bias:
            module.bias.normal_()
    used, forward = [], PerHead.forward

    def counted(module, x, form="expand"):
        if form == "score":
            used.append(module)
        return forward(module, x, form)

    monkeypatch.setattr(PerHead, "forward", counted)
    real = torch.ones(2, 40, dtype=torch.bool)
    real[1, :3] = False
    whole, cache = model(tokens, padding_mask_BL=real), model.new_cache()
    assert not used
    pieces = zip(tokens.split([20, 1, 5, 14], 1), real.split([20, 1, 5, 14], 1), strict=True)
    got = [model(piece, padding_mask_BL=mask, cache=cache) for piece, mask in pieces]
    assert len(used) == 2 * 3, "not for the first 20 tokens, which are more than a head is wide"
    torch.testing.assert_close(torch.cat(got, 1)[real], whole[real], rtol=1e-4, atol=1e-5)


def test_the_cache_holds_the_latent_and_one_key_alone():
    published = model_config(
        num_layers=1, width=8192, num_heads=64, vocab_size=32, max_sequence_length=64,
        mixer="latent",
    )  # fmt: skip
    assert published.mixer.ranks(published) == (512, 0), "DeepSeek-V2's width for heads of 128"
    assert cache_bytes(published, 10) == (512 + 64) * 10 * 2
    plain = changed(published, mixer="attention")
    assert cache_bytes(plain, 10) / cache_bytes(published, 10) > 28
    assert changed(CONFIG, mixer__rank=None).sized().mixer.rank == 32, "half of all heads, for few"


def test_keys_and_values_start_as_large_as_attentions():
    torch.manual_seed(0)
    config = changed(CONFIG, width=512, num_heads=8, mixer__rank=64, mixer__query_rank=128)
    mixer, x = config.mixer.build(config), torch.randn(1, 200, 512)
    latent = mixer.latent_norm(mixer.latent(x))
    plain = Transformer(changed(config, mixer="attention", num_layers=1)).blocks[0].mixer
    expected = plain.value(x).std().item()
    assert mixer.value(latent).std().item() == pytest.approx(expected, rel=0.1)
    assert mixer.key(latent).std().item() == pytest.approx(expected, rel=0.1)
    queries = mixer.query(mixer.query_norm(mixer.query_latent(x)))
    assert queries.std().item() == pytest.approx(expected, rel=0.1)
