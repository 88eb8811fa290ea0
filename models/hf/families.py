"""The architectures of Hugging Face that our models can be: what each fixes, and its names.

Invariant: a config that fits a family computes what the family's model in transformers computes.
"""

from dataclasses import dataclass
from typing import Any

from forescale.models.config import ModelConfig
from forescale.models.hf import experts


@dataclass(frozen=True)
class Family:
    """What a config must be to be one of a Hugging Face architecture, and that one's names."""

    architecture: str
    fits: dict[str, Any]  # the kinds and keys that make a config one of this family, by path
    outer: dict[str, str]  # our module -> theirs
    layer: str  # what a block is called, with {} for its number
    inner: dict[str, str]  # our module within a block -> theirs


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
# The choices that all families share unless their own say otherwise.
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
_POST_NORMS = {"mixer_post_norm": "post_attention_layernorm"}
_POST_NORMS |= {"mlp_post_norm": "post_feedforward_layernorm"}


def _llama_like(
    architecture: str, fits: dict[str, Any], inner: dict[str, str], without: tuple[str, ...] = ()
) -> Family:
    """Return a family with Llama's names, and `inner`; `without`: its free fields and what modules
    it doesn't have."""
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
    "mixtral": _llama_like("MixtralForCausalLM", experts.FITS["mixtral"], {}),
    "qwen3_moe": _llama_like("Qwen3MoeForCausalLM", experts.FITS["qwen3_moe"], _QK_NORM),
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
    """Return our name -> theirs for every module that has weights in a file of theirs. Both
    directions read this table."""
    f = FAMILIES[family]
    outer = dict(f.outer)
    if config.tie_embeddings:
        del outer["head"]
    return outer | {
        f"blocks.{i}.{name}": f"{f.layer.format(i)}.{of_hf}"
        for i in range(config.sizes.num_layers)
        for name, of_hf in _inner(family, config, i).items()
    }


def _inner(family: str, config: ModelConfig, layer: int) -> dict[str, str]:
    """Return our module within a block -> theirs, for one layer."""
    inner = FAMILIES[family].inner
    if family not in experts.FITS:
        return inner
    outside = {name: of_hf for name, of_hf in inner.items() if not name.startswith("mlp.")}
    return outside | experts.names(family, config, layer)
