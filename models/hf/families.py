"""The Hugging Face architectures of our models: the keys that each fixes, and its module names.

Invariant: a config that fits a family computes what the family's model in transformers computes.
"""

from dataclasses import dataclass
from typing import Any

from forescale.models.config import ModelConfig


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture."""

    architecture: str
    fits: dict[str, Any]  # the kinds and keys that a config of this family has, by path
    outer: dict[str, str]  # our module -> the Hugging Face name
    layer: str  # name of a block, with {} for its number
    inner: dict[str, str]  # our module within a block -> the Hugging Face name


_LLAMA_INNER = {
    "mixer_norm": "input_layernorm",
    "mixer.query": "self_attn.q_proj",
    "mixer.key": "self_attn.k_proj",
    "mixer.value": "self_attn.v_proj",
    "mixer.output": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_GATE = {"mlp.gate": "mlp.gate_proj"}
_QK_NORM = {"mixer.query_norm": "self_attn.q_norm", "mixer.key_norm": "self_attn.k_norm"}
_LLAMA_OUTER = {"embedding": "model.embed_tokens", "norm": "model.norm", "head": "lm_head"}
# The choices of all families that do not override them.
_PLAIN = {
    "mixer": "attention",
    "mixer.qkv_bias": False,
    "mixer.gate": "none",
    "mixer.value_residual": 0.0,
    "mixer.token_shift": False,
    "causal": True,
    "encoder_layers": 0,
    "norm.placement": "pre",
    "norm.embedding": False,
    "head": "linear",
    "head.softcap": 0.0,
    "value_embedding": 0,
    "bigram_rows": 0,
    "scale_embedding": False,
}
_ROTARY = _PLAIN | {"position": "rotary", "position.fraction": 1.0, "norm": "rmsnorm"}
_EXPERTS = {"mlp": "moe", "bias": False, "mlp.scores": "softmax", "mlp.shared": 0}
_POST_NORMS = {"mixer_post_norm": "post_attention_layernorm"}
_POST_NORMS |= {"mlp_post_norm": "post_feedforward_layernorm"}


def _llama_like(
    architecture: str, fits: dict[str, Any], inner: dict[str, str], without: tuple[str, ...] = ()
) -> Family:
    """Return a family with Llama's names and `inner`. without: keys that it does not fix, and
    modules that it does not have."""
    names = {name: of_hf for name, of_hf in (_LLAMA_INNER | inner).items() if name not in without}
    fixed = {k: v for k, v in (_ROTARY | fits).items() if k not in without}
    return Family(architecture, fixed, _LLAMA_OUTER, "model.layers.{}", names)


FAMILIES = {
    "llama": _llama_like("LlamaForCausalLM", {"mlp": "swiglu", "mixer.qk_norm": "none"}, _GATE),
    "qwen2": _llama_like(
        "Qwen2ForCausalLM",
        {"mlp": "swiglu", "mixer.qk_norm": "none", "bias": False, "mixer.qkv_bias": True},
        _GATE,
    ),
    "qwen3": _llama_like(
        "Qwen3ForCausalLM",
        {"mlp": "swiglu", "mixer.qk_norm": "head", "bias": False},
        _GATE | _QK_NORM,
    ),
    "arcee": _llama_like("ArceeForCausalLM", {"mlp": "relu2", "mixer.qk_norm": "none"}, {}),
    "apertus": _llama_like(
        "ApertusForCausalLM",
        {"mlp": "relu2", "mixer.qk_norm": "head", "bias": False},
        _QK_NORM | {"mixer_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"},
    ),
    "olmo2": _llama_like(
        "Olmo2ForCausalLM",
        {"mlp": "swiglu", "norm.placement": "post", "mixer.qk_norm": "layer", "bias": False},
        _GATE | _QK_NORM | _POST_NORMS,
        without=("mixer_norm", "mlp_norm"),
    ),
    "gemma3_text": _llama_like(
        "Gemma3ForCausalLM",
        {
            "mlp": "geglu",
            "norm.placement": "sandwich",
            "mixer.qk_norm": "head",
            "scale_embedding": True,
            "bias": False,
        },
        _GATE | _QK_NORM | _POST_NORMS | {"mlp_norm": "pre_feedforward_layernorm"},
        without=("head.softcap",),
    ),
    "mixtral": _llama_like(
        "MixtralForCausalLM",
        _EXPERTS | {"mixer.qk_norm": "none", "mlp.renormalise": True, "mlp.dense_layers": 0},
        {},
    ),
    "qwen3_moe": _llama_like("Qwen3MoeForCausalLM", _EXPERTS | {"mixer.qk_norm": "head"}, _QK_NORM),
    "gpt2": Family(
        "GPT2LMHeadModel",
        _PLAIN
        | {
            "position": "learned",
            "norm": "layernorm",
            "mlp": "gelu",
            "bias": True,
            "mixer.qk_norm": "none",
            "num_kv_heads": "num_heads",
            "head_dim": "width / num_heads",
        },
        {
            "embedding": "transformer.wte",
            "position": "transformer.wpe",
            "norm": "transformer.ln_f",
            "head": "lm_head",
        },
        "transformer.h.{}",
        {
            "mixer_norm": "ln_1",
            "mixer.qkv": "attn.c_attn",
            "mixer.output": "attn.c_proj",
            "mlp_norm": "ln_2",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
        },
    ),
}

# A gain of 1 is stored as 0 in these. The difference is exact for gains from 0.5 to 2; others are
# rounded once.
GAINS_BESIDE_ONE = ("gemma3_text",)


def module_names(family: str, config: ModelConfig) -> dict[str, str]:
    """Return our name -> the Hugging Face name for every module with weights."""
    f = FAMILIES[family]
    names = dict(f.outer)
    if config.tie_embeddings:
        del names["head"]
    for i in range(config.sizes.num_layers):
        inner = f.inner
        if config.experts is not None:
            outside = {name: of_hf for name, of_hf in inner.items() if not name.startswith("mlp.")}
            inner = outside | _mlp_names(family, config, i, config.experts.experts)
        block = f.layer.format(i)
        names |= {f"blocks.{i}.{name}": f"{block}.{of_hf}" for name, of_hf in inner.items()}
    return names


def _mlp_names(family: str, config: ModelConfig, layer: int, experts: int) -> dict[str, str]:
    """Return our name -> the Hugging Face name for the modules of an MLP in a model with experts.

    Files have a tensor for each expert, as published ones do, and transformers 4 and 5 load them;
    our parameter has all experts of a layer.
    """
    matrices = ("gate", "up", "down")
    if not config.mlp.of_layer(layer).is_routed:
        return {f"mlp.{matrix}": f"mlp.{matrix}_proj" for matrix in matrices}
    is_mixtral = family == "mixtral"
    inside = "block_sparse_moe" if is_mixtral else "mlp"
    names = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    return {"mlp.router": f"{inside}.gate"} | {
        f"mlp.{matrix}.{e}": f"{inside}.experts.{e}.{name}"
        for e in range(experts)
        for matrix, name in zip(matrices, names, strict=True)
    }
