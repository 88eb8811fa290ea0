"""Hugging Face's config.json to and from a ModelConfig, for every family.

Invariant: a value that is not supported is refused by its key and value. Of rotary positions,
transformers 4 and 5 compute from the keys what our model computes.
"""

import json
from dataclasses import replace
from typing import Any

from forescale.models.config import ModelConfig
from forescale.models.hf.families import FAMILIES
from forescale.models.hf.fit import differences
from forescale.models.hf.layers import FULL, SLIDING, layers_from_hf, layers_to_hf
from forescale.models.mixers.attention import Attention
from forescale.models.positions.kinds import Linear, Llama3, Ntk, Rotary, Yarn
from forescale.models.positions.rope_scaling import (
    BETA_FAST,
    BETA_SLOW,
    LEAST,
    MOST,
    ntk_theta,
    yarn_attention,
)

_RATIOS = ("num_kv_heads", "head_dim")  # given in Family.fits as a ratio of sizes
# Keys of sizes in config.json, and our fields.
_SIZES = {
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "intermediate_size": "mlp_width",
}
# Types of the other keys that are read; each may be absent, and where null has a meaning null.
_MORE_SIZES = (
    "vocab_size head_dim max_position_embeddings n_inner num_local_experts num_experts "
    "num_experts_per_tok moe_intermediate_size original_max_position_embeddings sliding_window "
    "sliding_window_pattern no_rope_layer_interval d_model d_kv d_ff num_layers num_decoder_layers "
    "num_heads n_positions relative_attention_num_buckets relative_attention_max_distance"
)
_NUMBERS = (
    "rms_norm_eps layer_norm_epsilon rope_theta resid_pdrop embd_pdrop attn_pdrop "
    "final_logit_softcapping query_pre_attn_scalar factor partial_rotary_factor "
    "rope_local_base_freq dropout_rate hidden_dropout_prob attention_probs_dropout_prob "
    "layer_norm_eps"
)
_TRUE_OR_FALSE = "tie_word_embeddings attention_bias mlp_bias norm_topk_prob use_parallel_residual"
_LISTS = "layer_types mlp_only_layers no_rope_layers"
_OBJECTS = "rope_parameters rope_scaling"
_NULL = (
    "num_key_value_heads head_dim n_inner final_logit_softcapping layer_types mlp_only_layers "
    "rope_parameters rope_scaling original_max_position_embeddings factor sliding_window "
    "no_rope_layers tie_word_embeddings attention_bias mlp_bias num_decoder_layers"
)
_LARGEST = 2**31 - 1  # of a size
MOST_TENSORS = 200_000  # of a model; DeepSeek V3 has 92,000
_GPT2_SIZES = {
    "n_positions": "max_sequence_length",
    "n_embd": "width",
    "n_layer": "num_layers",
    "n_head": "num_heads",
}


def config_to_hf(family: str, c: ModelConfig) -> dict[str, Any]:
    """Return the content of config.json. Special tokens are None, as the caller knows them."""
    shared = {
        "architectures": [FAMILIES[family].architecture],
        "model_type": family,
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": c.tie_embeddings,
        "bos_token_id": None,  # each family has defaults that belong to its own tokenizer
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family == "gpt2":
        return shared | {
            **{key: getattr(c, name) for key, name in _GPT2_SIZES.items()},
            # As transformers writes it.
            "n_inner": None if c.mlp_width == 4 * c.sizes.width else c.mlp_width,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": c.norm.eps,
            "resid_pdrop": c.dropout,
            "embd_pdrop": c.dropout,
            "attn_pdrop": c.dropout,
        }
    f, rope = FAMILIES[family], positions_to_hf(c)
    keys: dict[str, Any] = (
        shared
        | rope
        | {
            **{key: getattr(c, name) for key, name in _SIZES.items()},
            "head_dim": c.sizes.head_dim,
            "hidden_act": _activation(c),
            "rms_norm_eps": c.norm.eps,
            "attention_bias": c.bias,
            "mlp_bias": c.bias,
        }
        | {key: value for key, value in f.constants.items() if value is not None}
        | _experts_to_hf(family, c)
        | layers_to_hf(family, c, rope["rope_parameters"])
    )
    if "position.fraction" not in f.fits:
        assert isinstance(c.position, Rotary)
        part = {"partial_rotary_factor": c.position.fraction}
        keys |= part | {"rope_parameters": keys["rope_parameters"] | part}
    for key, (path, names) in f.keys.items():
        keys[key] = _to_key(c, path, names)
    return {f.aliases.get(key, key): value for key, value in keys.items()}


def _to_key(c: ModelConfig, path: str, names: dict[Any, Any] | None) -> Any:
    """Return the value of a key of Family.keys."""
    field, _, inner = path.partition(".")
    value = c.mixers[0] if field == "mixer" else getattr(c, field)
    value = getattr(value, inner) if inner else value.kind
    if names is not None:
        return next(key for key, choice in names.items() if choice == value)
    value = c.sizes.head_dim if path == "mixer.score_dim" and value is None else value
    is_whole = path == "mixer.score_dim" and value % 1 == 0
    return int(value) if is_whole else value or None  # transformers takes no 256.0


def _activation(c: ModelConfig) -> str:
    return {"relu2": "relu2", "geglu": "gelu_pytorch_tanh"}.get(c.mlp.kind, "silu")


def config_from_hf(family: str, hf: dict[str, Any]) -> ModelConfig:
    """Return our config with every size. Raises ValueError for a variant that is not supported, and
    KeyError for a missing size."""
    f = FAMILIES[family]
    for key, alias in f.aliases.items():
        hf = {key: hf[alias]} | hf if alias in hf else hf
    check_types(hf)
    only(hf, "quantization_config")
    # SmolLM3 and others name the kinds of layers, although all have the same.
    kinds = {*(hf.get("layer_types") or [])} - {FULL, *[SLIDING] * (f.layers == "bases")}
    require(not kinds, "layer_types", sorted(map(str, kinds)))
    for key, value in f.constants.items():
        only(hf, key, value)
    fits = {k: v for k, v in f.fits.items() if k not in _RATIOS}
    hf = f.absent | hf
    tied = bool(hf.get("tie_word_embeddings", False))
    base = replace(of_paths(fits), vocab_size=hf["vocab_size"], tie_embeddings=tied)
    if family == "gpt2":
        return _from_gpt2(base, hf)
    for key, (path, names) in f.keys.items():
        base = _from_key(base, hf, key, path, names)
    if "hidden_act" not in f.keys:
        only(hf, "hidden_act", _activation(base))
    only(hf, "use_sliding_window", False)
    only(hf, "attention_dropout", 0)
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    per_head = hf.get("head_dim") or width // heads
    bias = bool(hf.get("attention_bias", fits.get("bias", False)))
    require(bias == bool(hf.get("mlp_bias", fits.get("bias", False))), "attention_bias", bias)
    require(bias == fits.get("bias", bias), "attention_bias", bias)
    hf = hf | {"num_key_value_heads": hf.get("num_key_value_heads") or heads}
    sizes: dict[str, Any] = {name: hf[key] for key, name in _SIZES.items()}
    sizes |= {
        "norm": replace(base.norm, eps=fits.get("norm.eps", hf.get("rms_norm_eps", 1e-6))),
        "head_dim": per_head if per_head * heads != width else None,
    }
    for name in _OBJECTS.split():
        check_types(hf.get(name) or {})
    assert isinstance(base.mixer, Attention)
    mixer = base.mixer
    if mixer.score_dim == per_head:
        mixer = replace(mixer, score_dim=None)
    sizes |= layers_from_hf(family, hf, mixer)
    rope = hf.get("rope_parameters") or {}
    if f.layers == "bases" and FULL in rope:
        check_types(rope[FULL])
        hf = hf | {"rope_parameters": {"rope_theta": hf.get("rope_theta", 1e4)} | rope[FULL]}
    fraction = hf["partial_rotary_factor"] if "position.fraction" not in fits else None
    sizes |= positions_from_hf(hf, fraction) | _experts_from_hf(family, hf)
    config = replace(base, bias=bias, **sizes).resolved()
    for path, difference in differences(family, config).items():
        require(False, path, difference)
    return config


def _from_key(
    base: ModelConfig, hf: dict[str, Any], key: str, path: str, names: dict[Any, Any] | None
) -> ModelConfig:
    """Return the config with the value of a key of Family.keys."""
    field, _, inner = path.partition(".")
    value: Any = hf.get(key)
    if names is not None:
        value = next(iter(names)) if value is None else value
        require(isinstance(value, str | bool) and value in names, key, value)
        value = names[value]
    if inner and value is not None:
        value = value if names else float(value)
        value = replace(getattr(base, field), **{inner: value})
    return base if value is None else replace(base, **{field: value})


class WrongValue(ValueError):
    """A value of config.json that no model has, so that no class computes it either."""


def check_types(hf: dict[str, Any]) -> None:
    """Raise WrongValue for the first key that is read and has a value of another type than its
    own, or a size that no model has."""

    def is_size(value: Any) -> bool:
        return type(value) is int and 0 < value <= _LARGEST

    def is_number(value: Any) -> bool:
        return type(value) in (int, float) and abs(value) < 1e300

    sizes = f"{_MORE_SIZES} {' '.join(_SIZES)} {' '.join(_GPT2_SIZES)}"
    for keys, is_right, kind in (
        (sizes, is_size, f"a whole number from 1 to {_LARGEST:,}"),
        (_NUMBERS, is_number, "a number"),
        (_TRUE_OR_FALSE, lambda value: type(value) is bool, "true or false"),
        (_LISTS, lambda value: type(value) is list, "a list"),
        (_OBJECTS, lambda value: type(value) is dict, "an object"),
    ):
        for key in keys.split():
            if key in hf and not is_right(hf[key]) and not (hf[key] is None and key in _NULL):
                raise WrongValue(f"its {key} is {as_text(hf[key])}, not {kind}.")


def of_paths(values: dict[str, Any]) -> ModelConfig:
    """Return the config with these kinds and keys by path, such as mixer and mixer.qk_norm."""
    tree: dict[str, Any] = {}
    for path, choices in values.items():
        field, _, inner = path.partition(".")
        value = choices[0] if isinstance(choices, tuple) else choices
        is_part = any(other.startswith(f"{path}.") for other in values)
        if inner or is_part:
            tree.setdefault(field, {})[inner or "kind"] = value
        else:
            tree[field] = value
    return ModelConfig(**tree)


def _from_gpt2(base: ModelConfig, hf: dict[str, Any]) -> ModelConfig:
    dropout = hf.get("resid_pdrop", 0.1)
    only(hf, "activation_function", "gelu_new")
    only(hf, "scale_attn_by_inverse_layer_idx", False)
    only(hf, "scale_attn_weights", True)
    only(hf, "add_cross_attention", False)
    for name in ("attn_pdrop", "embd_pdrop"):
        require(hf.get(name, 0.1) == dropout, f"{name} beside resid_pdrop", hf.get(name, 0.1))
    return replace(
        base,
        **{name: hf[key] for key, name in _GPT2_SIZES.items()},
        mlp_width=hf.get("n_inner") or 4 * hf["n_embd"],
        norm=replace(base.norm, eps=hf.get("layer_norm_epsilon", 1e-5)),
        dropout=dropout,
    ).resolved()


def _experts_to_hf(family: str, c: ModelConfig) -> dict[str, Any]:
    """Return the keys of experts in config.json; none for a model without experts."""
    experts = c.experts
    if experts is None:
        return {}
    if family == "mixtral":
        return {
            "num_local_experts": experts.experts,
            "num_experts_per_tok": experts.top_k,
            "intermediate_size": experts.width(c),
            "sliding_window": None,
        }
    keys = {"num_experts": experts.experts, "num_experts_per_tok": experts.top_k}
    keys |= {"norm_topk_prob": experts.renormalise}
    if family == "olmoe":
        return keys | {"intermediate_size": experts.width(c)}
    return keys | {
        "moe_intermediate_size": experts.width(c),
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(experts.dense_layers)),
    }


def _experts_from_hf(family: str, hf: dict[str, Any]) -> dict[str, Any]:
    """Return the block of experts and its fields: the inverse of _experts_to_hf.

    Mixtral and OLMoE have no mlp_width and do not use one; here it follows the rule for
    expert_width. Raises ValueError for a variant that is not supported.
    """
    if FAMILIES[family].fits["mlp"] != "moe":
        return {}
    top_k = hf.get("num_experts_per_tok", 2 if family == "mixtral" else 8)
    usual = {"mixtral": 8, "olmoe": 64}.get(family, 128)
    number = hf.get("num_experts", hf.get("num_local_experts", usual))
    require(number * hf["num_hidden_layers"] <= MOST_TENSORS, "number of experts", number)
    block: dict[str, Any] = {"kind": "moe", "experts": number, "top_k": top_k}
    if family == "mixtral":
        only(hf, "sliding_window")
    if family in ("mixtral", "olmoe"):
        width = hf["intermediate_size"]
        block |= {"expert_width": width}
        block |= {"renormalise": family == "mixtral" or hf.get("norm_topk_prob", False)}
        return {"mlp": block, "mlp_width": top_k * width}
    dense = list(hf.get("mlp_only_layers") or [])
    only(hf, "decoder_sparse_step", 1)
    require(dense == list(range(len(dense))), "mlp_only_layers", dense)
    block |= {
        "expert_width": hf["moe_intermediate_size"],
        "renormalise": hf.get("norm_topk_prob", False),
        "dense_layers": len(dense),
    }
    return {"mlp": block}


def positions_to_hf(c: ModelConfig) -> dict[str, Any]:
    """Return the keys of rotary positions.

    ntk becomes a larger base without scaling, because transformers' "dynamic" changes with the
    sequence. For yarn, transformers 4 computes the factor from the two lengths and 5 reads the
    factor, so all three must agree. Raises ValueError if the original length is not whole.
    """
    assert isinstance(c.position, Rotary)
    by, theta = c.position.scaling, c.position.theta
    theta = ntk_theta(c) if isinstance(by, Ntk) else theta
    longest = c.max_sequence_length
    scaling: dict[str, Any] | None = None  # Apertus scales unless the key says otherwise
    if isinstance(by, Linear):
        scaling = {"rope_type": "linear", "factor": by.factor}
    if isinstance(by, Yarn | Llama3):
        original = by.original(c)
        last = original * by.factor if isinstance(by, Yarn) else original
        if original % 1 or last % 1:
            raise ValueError(
                f"Hugging Face's config needs whole lengths, not {by.kind} from {original:g} to "
                f"{last:g} tokens; give model.position.scaling.original_length."
            )
        scaling = {
            "rope_type": by.kind,
            "factor": by.factor,
            "original_max_position_embeddings": int(original),
        }
        if isinstance(by, Yarn):
            longest = int(last)
            scaling |= {
                "attention_factor": yarn_attention(by.factor),
                "beta_fast": float(BETA_FAST),
                "beta_slow": float(BETA_SLOW),
            }
        else:
            scaling |= {"low_freq_factor": float(LEAST), "high_freq_factor": float(MOST)}
    return {
        "max_position_embeddings": longest,
        "rope_theta": theta,  # transformers 4 reads this and the next key, 5 the third
        "rope_scaling": scaling,
        "rope_parameters": (scaling or {"rope_type": "default"}) | {"rope_theta": theta},
    }


def positions_from_hf(hf: dict[str, Any], fraction: float | None = None) -> dict[str, Any]:
    """Return max_sequence_length and the block of the position: the inverse of positions_to_hf.

    fraction: of each head that rotates, if rope_parameters doesn't say it; None: all, always.
    Raises ValueError for a scaling that is not supported.
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    longest, scaling = hf["max_position_embeddings"], dict[str, Any](kind="none")
    theta = float(rope.get("rope_theta", hf.get("rope_theta", 10_000.0)))
    kind = rope.get("rope_type", rope.get("type", "default"))
    known = ("default", "linear", "yarn", "llama3")
    require(kind in known, "rope_parameters.rope_type", kind)
    for name, inside in (("", hf), ("rope_parameters.", rope)):
        part = inside.get("partial_rotary_factor")
        require(fraction is not None or part in (None, 1), f"{name}partial_rotary_factor", part)
    if fraction is not None:
        fraction = rope.get("partial_rotary_factor", fraction)
    if kind == "linear" and rope["factor"] != 1:
        scaling = {"kind": "linear", "factor": float(rope["factor"])}
    if kind == "yarn":
        original = rope.get("original_max_position_embeddings") or longest
        factor = float(rope.get("factor") or longest / original)
        usual: dict[str, Any] = {"beta_fast": BETA_FAST, "beta_slow": BETA_SLOW, "truncate": True}
        usual |= {"mscale": None, "mscale_all_dim": None}
        usual["attention_factor"] = yarn_attention(factor)
        for name, value in usual.items():
            require(rope.get(name) in (None, value), f"rope_parameters.{name}", rope.get(name))
        scaling = {"kind": "yarn", "factor": factor}
        if original * factor != longest:
            scaling["original_length"] = original
    if kind == "llama3":
        for name, number in (("low_freq_factor", LEAST), ("high_freq_factor", MOST)):
            require(rope.get(name) == number, f"rope_parameters.{name}", rope.get(name))
        scaling = {"kind": "llama3", "factor": float(rope["factor"])}
        scaling["original_length"] = rope["original_max_position_embeddings"]
    position = {"kind": "rotary", "theta": theta, "scaling": scaling, "fraction": fraction}
    return {"max_sequence_length": longest, "position": position}


def only(hf: dict[str, Any], key: str, *computed: Any) -> None:
    """Raise ValueError with `key` and its value, unless the value is absent, null or `computed`."""
    value = hf.get(key)
    alike = [one for one in computed if isinstance(one, bool) == isinstance(value, bool)]
    require(value in (None, *alike), key, value)  # true is no 1


def require(true: bool, key: str, value: Any) -> None:
    """Raise ValueError with `key` and its `value` unless `true`."""
    if not true:
        raise ValueError(f"its {key} is {as_text(value)}, a variant that is not computed here.")


def as_text(value: Any) -> str:
    """Return a value of a config.json as it stands there, shortened."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
