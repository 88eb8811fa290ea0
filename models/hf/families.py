"""The Hugging Face architectures of our models: the keys that each fixes, and its module names.

Invariant: a config that fits a family computes what the family's model in transformers computes.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from forescale.models.config import ModelConfig

# How the layers of a family differ: not at all; all have one window, or none; each has a window or
# none, and each of the two kinds a base of rotations; some don't rotate.
Layers = Literal["alike", "window", "bases", "rotation"]


@dataclass(frozen=True)
class Family:
    """A Hugging Face architecture.

    fits: the kinds and keys that a config of this family has, by path; a tuple: one of these.
    outer: our module -> the Hugging Face name; layer: name of a block, with {} for its number;
    inner: our module within a block -> the Hugging Face name.
    absent: values of keys that a config.json lacks, where they are not Llama's; from the config
    classes of transformers. aliases: Llama's key -> the family's. constants: keys with the only
    value that is computed. keys: further keys -> our path, and what their values are as ours (None:
    the same number, and null is our default).
    fused: queries, keys and values are one matrix, in thirds, or in thirds of each head.
    gains_less_one: a gain of 1 is stored as 0 in them. The difference is exact for gains from 0.5
    to 2; others are rounded once.
    """

    architecture: str
    fits: dict[str, Any]
    outer: dict[str, str]
    layer: str
    inner: dict[str, str]
    absent: dict[str, Any] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, tuple[str, dict[Any, Any] | None]] = field(default_factory=dict)
    layers: Layers = "alike"
    fused: Literal["", "thirds", "heads"] = ""
    gains_less_one: bool = False


def pairs(text: str) -> dict[str, str]:
    """Return our module -> the Hugging Face name, of pairs."""
    return dict(pair.split("=") for pair in text.split())


_LLAMA_INNER = pairs(
    "mixer_norm=input_layernorm mixer.query=self_attn.q_proj mixer.key=self_attn.k_proj "
    "mixer.value=self_attn.v_proj mixer.output=self_attn.o_proj mlp_norm=post_attention_layernorm "
    "mlp.up=mlp.up_proj mlp.down=mlp.down_proj"
)
_GATE = {"mlp.gate": "mlp.gate_proj"}
_QK_NORM = pairs("mixer.query_norm=self_attn.q_norm mixer.key_norm=self_attn.k_norm")
_LLAMA_OUTER = pairs("embedding=model.embed_tokens norm=model.norm head=lm_head")
# The choices of all families that do not override them.
_PLAIN: dict[str, Any] = {"mixer": "attention", "mixer.qkv_bias": False, "mixer.gate": "none"}
_PLAIN |= {"mixer.value_residual": 0.0, "mixer.token_shift": False, "mixer.score_dim": None}
_PLAIN |= {"causal": True, "encoder_layers": 0, "norm.placement": "pre", "norm.embedding": False}
_PLAIN |= {"head": "linear", "head.softcap": 0.0, "head.bias": False, "scale_embedding": False}
_PLAIN |= {"value_embedding": 0, "bigram_rows": 0}
_ROTARY = _PLAIN | {"position": "rotary", "position.fraction": 1.0, "norm": "rmsnorm"}
_DENSE = {"mlp": "swiglu", "mixer.qk_norm": "none"}
_EXPERTS = {"mlp": "moe", "bias": False, "mlp.scores": "softmax", "mlp.shared": 0}
_RATIOS = {"num_kv_heads": "num_heads", "head_dim": "width / num_heads"}
_POST_NORMS = pairs(
    "mixer_post_norm=post_attention_layernorm mlp_post_norm=post_feedforward_layernorm"
)
_WINDOWS = {"mixer": ("attention", "window")}
_OLMO2 = {"mlp": "swiglu", "norm.placement": "post", "mixer.qk_norm": "layer", "bias": False}
_GEMMA = {"mlp": "geglu", "scale_embedding": True, "bias": False}
_GEMMA_ACT = {"hidden_act": ("mlp", {"gelu_pytorch_tanh": "geglu", "gelu": "geglu"})}
_UNGATED = {"gelu_new": "gelu", "gelu": "gelu_exact", "gelu_fast": "gelu", "relu": "relu"}
_PLAIN_ACT = {"hidden_act": ("mlp", _UNGATED | {"gelu_pytorch_tanh": "gelu"})}
_LAYERNORM = {"norm": "layernorm", "norm.gain": True, "bias": True}
_BIASED = _LAYERNORM | {"mlp": ("gelu", "gelu_exact", "relu")}
_EPS_OF_LAYERNORM = {"rms_norm_eps": "layer_norm_eps"}


def plain(without: str) -> dict[str, Any]:
    """Return the choices that all families share, but for the keys `without`."""
    return {key: value for key, value in _PLAIN.items() if key not in without.split()}


def _llama_like(
    architecture: str,
    fits: dict[str, Any],
    inner: dict[str, str],
    without: str = "",
    **options: Any,
) -> Family:
    """Return a family with Llama's names and `inner`. without: keys that it does not fix, and
    modules that it does not have. options: of Family; outer: those that are not Llama's."""
    names, absent = _LLAMA_INNER | inner, without.split()
    names = {name: of_hf for name, of_hf in names.items() if name not in absent}
    fixed = {k: v for k, v in (_ROTARY | fits).items() if k not in absent}
    outer = _LLAMA_OUTER | options.pop("outer", {})
    return Family(architecture, fixed, outer, "model.layers.{}", names, **options)


FAMILIES = {
    "llama": _llama_like("LlamaForCausalLM", _DENSE, _GATE),
    "mistral": _llama_like(
        "MistralForCausalLM",
        _DENSE | _WINDOWS | {"bias": False},
        _GATE,
        absent={"num_key_value_heads": 8, "sliding_window": 4096},
        layers="window",
    ),
    "smollm3": _llama_like(
        "SmolLM3ForCausalLM",
        _DENSE,
        _GATE,
        absent={"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
        layers="rotation",
    ),
    "qwen2": _llama_like(
        "Qwen2ForCausalLM",
        _DENSE | {"bias": False, "mixer.qkv_bias": True},
        _GATE,
        absent={"num_key_value_heads": 32},
    ),
    "qwen3": _llama_like(
        "Qwen3ForCausalLM",
        {"mlp": "swiglu", "mixer.qk_norm": "head", "bias": False},
        _GATE | _QK_NORM,
        absent={"num_key_value_heads": 32, "head_dim": 128},
    ),
    "arcee": _llama_like(
        "ArceeForCausalLM",
        {"mlp": "relu2", "mixer.qk_norm": "none"},
        {},
        absent={"rms_norm_eps": 1e-5, "hidden_act": "relu2"},
    ),
    "apertus": _llama_like(
        "ApertusForCausalLM",
        {"mlp": "relu2", "mixer.qk_norm": "head", "bias": False},
        _QK_NORM | {"mixer_norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"},
        absent={"rope_theta": 12e6, "rms_norm_eps": 1e-5, "hidden_act": "xielu"},
    ),
    "olmo": _llama_like(
        "OlmoForCausalLM",
        _DENSE
        | {"norm": "layernorm", "norm.gain": False, "norm.eps": 1e-5, "bias": False}
        | {"parametrization": "standard"},
        _GATE,
        without="mixer_norm mlp_norm",
        constants={"clip_qkv": None},
    ),
    "olmo2": _llama_like(
        "Olmo2ForCausalLM",
        _OLMO2,
        _GATE | _QK_NORM | _POST_NORMS,
        without="mixer_norm mlp_norm",
        absent={"rms_norm_eps": 1e-5},
    ),
    "olmo3": _llama_like(
        "Olmo3ForCausalLM",
        _OLMO2 | _WINDOWS,
        _GATE | _QK_NORM | _POST_NORMS,
        without="mixer_norm mlp_norm",
        absent={"rms_norm_eps": 1e-5, "rope_theta": 5e5, "sliding_window": 4096}
        | {"sliding_window_pattern": 4},
        layers="bases",
    ),
    "gemma": _llama_like(
        "GemmaForCausalLM",
        _GEMMA | {"mixer.qk_norm": "none"},
        _GATE,
        absent={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
        constants={"use_bidirectional_attention": False},
        keys=_GEMMA_ACT,
        gains_less_one=True,
    ),
    "gemma3_text": _llama_like(
        "Gemma3ForCausalLM",
        _GEMMA | _WINDOWS | {"norm.placement": "sandwich", "mixer.qk_norm": "head"},
        _GATE | _QK_NORM | _POST_NORMS | {"mlp_norm": "pre_feedforward_layernorm"},
        without="head.softcap mixer.score_dim",
        absent={"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True}
        | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window": 4096}
        | {"sliding_window_pattern": 6, "query_pre_attn_scalar": 256},
        aliases={"hidden_act": "hidden_activation"},
        constants={"use_bidirectional_attention": False, "attn_logit_softcapping": None},
        keys=_GEMMA_ACT
        | {"final_logit_softcapping": ("head.softcap", None)}
        | {"query_pre_attn_scalar": ("mixer.score_dim", None)},
        layers="bases",
        gains_less_one=True,
    ),
    "mixtral": _llama_like(
        "MixtralForCausalLM",
        _EXPERTS | {"mixer.qk_norm": "none", "mlp.renormalise": True, "mlp.dense_layers": 0},
        {},
        absent={"num_key_value_heads": 8, "rope_theta": 1e6, "rms_norm_eps": 1e-5},
    ),
    "qwen3_moe": _llama_like(
        "Qwen3MoeForCausalLM",
        _EXPERTS | {"mixer.qk_norm": "head"},
        _QK_NORM,
        absent={"num_key_value_heads": 4},
    ),
    "olmoe": _llama_like(
        "OlmoeForCausalLM",
        _EXPERTS | {"mixer.qk_norm": "layer", "mlp.dense_layers": 0},
        _QK_NORM,
        absent={"rms_norm_eps": 1e-5},
        constants={"clip_qkv": None},
    ),
    "phi": _llama_like(
        "PhiForCausalLM",
        _BIASED
        | {"norm.placement": "shared", "mixer.qk_norm": "none", "head.bias": True}
        | {"tie_embeddings": False},
        {"mixer.output": "self_attn.dense", "mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
        without="position.fraction mlp_norm",
        outer={"norm": "model.final_layernorm"},
        absent={"rms_norm_eps": 1e-5, "partial_rotary_factor": 0.5, "hidden_act": "gelu_new"},
        aliases=_EPS_OF_LAYERNORM,
        constants={"qk_layernorm": False},
        keys=_PLAIN_ACT,
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        {k: v for k, v in _ROTARY.items() if k != "position.fraction"}
        | _BIASED
        | _RATIOS
        | {"norm.placement": ("parallel", "pre"), "mixer.qk_norm": "none"},
        pairs("embedding=gpt_neox.embed_in norm=gpt_neox.final_layer_norm head=embed_out"),
        "gpt_neox.layers.{}",
        pairs(
            "mixer_norm=input_layernorm mixer.qkv=attention.query_key_value "
            "mixer.output=attention.dense mlp_norm=post_attention_layernorm "
            "mlp.up=mlp.dense_h_to_4h mlp.down=mlp.dense_4h_to_h"
        ),
        absent={"rms_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "hidden_act": "gelu"}
        | {"use_parallel_residual": True},
        aliases=_EPS_OF_LAYERNORM
        | {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
        keys=_PLAIN_ACT
        | {"use_parallel_residual": ("norm.placement", {True: "parallel", False: "pre"})},
        fused="heads",
    ),
    "gpt2": Family(
        "GPT2LMHeadModel",
        _PLAIN
        | _RATIOS
        | _LAYERNORM
        | {"position": "learned", "mlp": "gelu", "mixer.qk_norm": "none"},
        pairs(
            "embedding=transformer.wte position=transformer.wpe norm=transformer.ln_f head=lm_head"
        ),
        "transformer.h.{}",
        pairs(
            "mixer_norm=ln_1 mixer.qkv=attn.c_attn mixer.output=attn.c_proj "
            "mlp_norm=ln_2 mlp.up=mlp.c_fc mlp.down=mlp.c_proj"
        ),
        absent={"tie_word_embeddings": True},
        fused="thirds",
    ),
}

# Families of which no part computes something yet.
LACKING = {"gemma2": "a softcap of attention's scores"}
LACKING |= {"qwen3_next": "a gate of shared experts, and DeltaNet with fewer keys than values"}
LACKING |= {"deepseek_v3": "value heads of another width than queries, and groups of experts"}
LACKING |= {"gpt_oss": "learned sinks of attention, and experts with biases"}


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
