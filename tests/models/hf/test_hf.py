"""Other people's implementations as oracles: same weights, same logits, same gradients."""

import contextlib
import json
import math
import re

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from forescale.config.schema import plain
from forescale.config.tree import build
from forescale.models import Transformer
from forescale.models.config import ModelConfig
from forescale.models.hf import family_of, from_hf, to_hf
from forescale.models.hf.config_json import config_to_hf
from forescale.models.hf.pieces import config_of
from tests.models.configs import changed, model_config

transformers = pytest.importorskip("transformers")

SIZES = dict(num_layers=2, width=32, num_heads=4, vocab_size=61, max_sequence_length=24)
LLAMA = model_config(
    **SIZES, num_kv_heads=2, mixer__qk_norm="none", position__theta=500.0, norm__eps=1e-5
)
QWEN3 = model_config(**SIZES, num_kv_heads=2, mixer__qk_norm="head", mlp_width=48)
OLMO2 = changed(QWEN3, norm__placement="post", mixer__qk_norm="layer")
GEMMA3 = changed(
    QWEN3, norm__placement="sandwich", mlp="geglu", scale_embedding=True, tie_embeddings=True
)
GPT2 = model_config(
    **SIZES,
    position="learned",
    norm="layernorm",
    mlp="gelu",
    bias=True,
    mixer__qk_norm="none",
    tie_embeddings=True,
    norm__eps=1e-3,
)
MIXTRAL = changed(LLAMA, mlp="moe", mlp_width=48, mlp__experts=5)
QWEN3_MOE = changed(QWEN3, mlp="moe", mlp__experts=6, mlp__top_k=3, mlp__expert_width=20)
STILL = dict(mixer_pattern=[*["attention"] * 3, {"kind": "attention", "theta": 0.0}])
MIXED = dict(mixer_pattern=[{"kind": "window", "window": 5, "theta": 300.0}, "attention"])
OLMO3 = changed(OLMO2, **MIXED, mixer__qk_norm="layer")
NEOX = changed(
    GPT2,
    position="rotary",
    position__fraction=0.25,
    norm__placement="parallel",
    mlp="gelu_exact",
    tie_embeddings=False,
)
ORACLES = {
    "llama": LLAMA,
    "llama-bias-tied": changed(LLAMA, bias=True, tie_embeddings=True),
    "llama-yarn": changed(LLAMA, position__scaling="yarn", position__scaling__factor=3.0),
    "llama-3.1": changed(
        LLAMA,
        position__scaling="llama3",
        position__scaling__factor=3.0,
        position__scaling__original_length=11,
        position__theta=1e4,
    ),
    "qwen2": changed(LLAMA, mixer__qkv_bias=True, tie_embeddings=True),
    "qwen3": QWEN3,
    "qwen3-wide-heads": changed(QWEN3, head_dim=14),
    "qwen3-tied": changed(QWEN3, tie_embeddings=True),
    "arcee": changed(LLAMA, mlp="relu2"),
    "apertus": changed(QWEN3, mlp="relu2"),
    "apertus-yarn": changed(
        QWEN3, mlp="relu2", position__scaling="yarn", position__scaling__factor=1.5
    ),
    "olmo2": OLMO2,
    "gemma3": GEMMA3,
    "gemma3-capped": changed(GEMMA3, head__softcap=2.0, tie_embeddings=False),
    "mixtral": MIXTRAL,
    "qwen3-moe": QWEN3_MOE,
    "qwen3-moe-dense-raw": changed(QWEN3_MOE, mlp__dense_layers=1, mlp__renormalise=False),
    "mistral": changed(LLAMA, mixer="window", mixer__window=5),
    "smollm3": changed(LLAMA, num_layers=4, **STILL, mixer__qk_norm="none", bias=True),
    "olmo": changed(LLAMA, norm="layernorm", norm__gain=False),
    "olmo3": OLMO3,
    "olmo3-yarn": changed(OLMO3, position__scaling="yarn", position__scaling__factor=3.0),
    "gemma": changed(LLAMA, mlp="geglu", scale_embedding=True, tie_embeddings=True, head_dim=14),
    "gemma3-windows": changed(
        GEMMA3,
        num_layers=3,
        mixer_pattern=[{"kind": "window", "window": 5, "theta": 300.0}] * 2 + ["attention"],
        mixer__score_dim=20.0,
        position__scaling="linear",
        position__scaling__factor=8.0,
    ),
    "olmoe": changed(QWEN3_MOE, mixer__qk_norm="layer", mlp_width=60),
    "neox": NEOX,
    "neox-in-turn": changed(NEOX, norm__placement="pre", mlp="gelu", tie_embeddings=True),
    "phi": changed(
        NEOX, norm__placement="shared", mlp="gelu", head__bias=True, num_kv_heads=2, norm__eps=1e-5
    ),
    "gpt2": GPT2,
    "gpt2-untied": changed(GPT2, tie_embeddings=False),
}
PADDINGS = {"none": (0, 0), "left": (7, 0), "right": (0, 5), "both": (3, 2)}


def converted(config, state):
    """to_hf's config.json and all of its weights."""
    hf_config, tensors = to_hf(config, state)
    return hf_config, dict(tensors)


def scrambled(config):
    """A model none of whose weights is at a special value, so that a swapped one shows."""
    torch.manual_seed(1)
    model = Transformer(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def exported(model, folder):
    """The model as a user of transformers loads it."""
    hf_config, hf_state = converted(model.config, model.state_dict())
    (folder / "config.json").write_text(json.dumps(hf_config))
    save_file(hf_state, folder / "model.safetensors", metadata={"format": "pt"})
    peer, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return peer.eval()


def in_memory(tensors):
    """transformers 5 joins the experts of a file, and the gates with the matrices beside them."""
    joined, stacks = {}, {}
    for name, tensor in tensors.items():
        name = name.replace("block_sparse_moe", "mlp").replace("embed_out", "lm_head")
        if got := re.fullmatch(r"(.*\.experts)\.\d+\.(\w+)\.weight", name):
            stacks.setdefault(got[1], {}).setdefault(got[2], []).append(tensor)
        else:
            joined[name] = tensor
    for where, stack in stacks.items():
        gate, up, down = (
            ("w1", "w3", "w2") if "w1" in stack else ("gate_proj", "up_proj", "down_proj")
        )
        both = [torch.stack(stack[name]) for name in (gate, up)]
        joined[f"{where}.gate_up_proj"] = torch.cat(both, 1)
        joined[f"{where}.down_proj"] = torch.stack(stack[down])
    return joined


@pytest.mark.parametrize("name", ORACLES)
def test_logits_and_gradients_equal_transformers(name, tmp_path):
    local = scrambled(ORACLES[name])
    peer = exported(local, tmp_path)
    tokens = torch.randint(0, 61, (3, 20), generator=torch.Generator().manual_seed(2))
    for left, right in PADDINGS.values():
        mask = torch.ones_like(tokens)
        mask[0, :left] = 0
        mask[0, 20 - right :] = 0
        real = mask.bool()
        targets = tokens.roll(-1, 1).masked_fill(~real, -100)

        logits = local(tokens, padding_mask_BL=real)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        expected = peer(tokens, attention_mask=mask, position_ids=positions).logits
        assert expected.abs().max() > 1  # not a comparison of zeros
        assert (logits - expected)[real].abs().max() < 1e-5

        local.zero_grad()
        peer.zero_grad()
        local(tokens, targets, real).sum().backward()
        F.cross_entropy(expected.flatten(0, 1), targets.flatten(), reduction="sum").backward()
        _, gradients = converted(local.config, {n: p.grad for n, p in local.named_parameters()})
        gradients = in_memory(gradients)
        for n, p in peer.named_parameters():
            if "gemma" in name and "norm" in n:  # what is stored of a gain is the gain less 1
                gradients[n] = gradients[n] + 1
            torch.testing.assert_close(gradients[n], p.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2"])
def test_documents_equal_transformers_under_their_mask_and_positions(name, tmp_path):
    """What Hugging Face computes with position_ids that start again and a mask of four axes."""
    local = scrambled(ORACLES[name])
    peer = exported(local, tmp_path)
    tokens = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(2))
    lengths = ((5, 1, 14), (9, 11))
    documents = torch.stack(
        [torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in lengths]
    )
    positions = torch.tensor([[t for n in row for t in range(n)] for row in lengths])
    visible = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
    least = torch.finfo(torch.float32).min
    with torch.no_grad():
        logits = local(tokens, documents_BL=documents)
        expected = peer(
            tokens,
            attention_mask=torch.zeros(visible.shape).masked_fill(~visible, least),
            position_ids=positions,
        ).logits
        assert (logits - expected).abs().max() < 1e-5
        assert (local(tokens) - expected).abs().max() > 1e-2  # the documents do matter


@pytest.mark.parametrize("name", ORACLES)
def test_there_and_back_is_exact(name):
    model = scrambled(ORACLES[name])
    config, state = from_hf(*converted(model.config, model.state_dict()))
    assert changed(config, mixer=model.config.mixer) == model.config  # beside a pattern any
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())
    Transformer(config).load_state_dict(state)


@pytest.mark.parametrize(
    "name",
    ["llama-bias-tied", "qwen3", "olmo2", "gemma3", "gemma3-capped", "qwen3-moe", "gpt2-untied"],
)
def test_multipliers_go_into_the_weights(name, tmp_path):
    """Heads of 8, width and depth off their base: attention, branches and logits are all scaled."""
    away = {
        "parametrization": "completep",
        "parametrization__base_width": 8,
        "parametrization__base_depth": 3,
    }
    local = scrambled(changed(ORACLES[name], **away))
    tokens = torch.randint(0, 61, (2, 20), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert (exported(local, tmp_path)(tokens).logits - local(tokens)).abs().max() < 1e-5
        config, state = from_hf(*converted(local.config, local.state_dict()))
        assert config.parametrization.kind == "standard"
        back = Transformer(config).eval()
        back.load_state_dict(state)
        assert (back(tokens) - local(tokens)).abs().max() < 1e-5


def test_the_nearest_of_equals_has_the_models_own_mlp():
    experts = dict(mlp="moe", mlp__experts=4, mlp__expert_width=16, mlp__scores="sigmoid")
    text = r"nearest, Qwen3MoeFor\w*, has mlp.scores=softmax \(not sigmoid\)"
    with pytest.raises(ValueError, match=text):
        family_of(model_config(**SIZES, **experts).resolved())


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "gemma2"}, "gemma2.*needs a softcap"),
        ({"model_type": "mamba"}, "mamba"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": True}, "use_sliding_window"),
    ],
)
def test_a_variant_that_we_do_not_compute_is_refused(change, word):
    hf_config, hf_state = converted(QWEN3, Transformer(QWEN3).state_dict())
    with pytest.raises(ValueError, match=word):
        from_hf(hf_config | change, hf_state)


ALIEN = ("2", [1], [[]], {"a": 1}, 3.5, -1, 2**31, 10**400, math.nan, math.inf, True, 1e-300)


@pytest.mark.parametrize("name", ["llama-3.1", "gemma3-capped", "qwen3-moe-dense-raw", "gpt2"])
def test_a_value_of_another_kind_is_refused_or_one_that_train_takes(name):
    hf_config = config_to_hf(family_of(ORACLES[name].resolved()), ORACLES[name].resolved())
    changes = [{key: value} for key in hf_config for value in ALIEN]
    for key in (rope := hf_config.get("rope_parameters", {})):
        changes += [{"rope_parameters": rope | {key: value}} for value in ALIEN]
    for change in changes:
        with contextlib.suppress(ValueError):
            config = config_of(hf_config | change)
            values = build(ModelConfig, plain(config))[2]
            assert all("close to 0" in problem for _, problem, _ in values), change
            assert not config.problems(), change


def test_a_switch_that_is_null_is_off():
    hf_config = config_to_hf("llama", ORACLES["llama-3.1"].resolved())
    switches = ("tie_word_embeddings", "attention_bias", "mlp_bias")
    off, null = (config_of(hf_config | dict.fromkeys(switches, v)) for v in (False, None))
    assert off == null


def test_unknown_and_missing_weights_are_named():
    hf_config, hf_state = converted(QWEN3, Transformer(QWEN3).state_dict())
    with pytest.raises(ValueError, match=r"model\.extra\.weight"):
        from_hf(hf_config, hf_state | {"model.extra.weight": torch.zeros(1)})
    del hf_state["model.norm.weight"]
    with pytest.raises(ValueError, match="norm"):
        from_hf(hf_config, hf_state)
