"""Convert weights to and from Hugging Face's formats; families.py lists the architectures.

Works on plain dicts; transformers is needed only by whoever loads the result. Weights survive
there and back bit for bit, and so does every architectural field of the config; what only training
knows (z_loss, mtp_layers, loss_chunk, activation_checkpointing, init_std; dropout but for GPT-2)
does not, and ntk comes back as the larger rope_theta that it is.
Their configs have no place for the multipliers of mup and completep, which go into the weights
(parametrization.folds): what comes back is `standard`, and computes the same.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from forescale.models.config import ModelConfig
from forescale.models.hf import experts
from forescale.models.hf.families import FAMILIES, GAINS_BESIDE_ONE
from forescale.models.hf.positions import positions_from_hf, positions_to_hf, require
from forescale.models.parametrization import folds

State = dict[str, Tensor]


def family_of(config: ModelConfig) -> str:
    """Return the family of a resolved config. Raises ValueError with the nearest if none fits."""
    differing: dict[str, dict[str, str]] = {}
    for name, family in FAMILIES.items():
        wanted = dict(family.fits)
        if "num_kv_heads" in wanted:
            wanted["num_kv_heads"] = config.num_heads
        has = {field: getattr(config, field) for field in wanted}
        has["mixer"] = ", ".join(dict.fromkeys(config.mixers))
        differing[name] = {
            key: f"{key}={_typed(wanted[key])} (not {_typed(value)})"
            for key, value in has.items()
            if value != wanted[key]
        }
    # Of families that are equally near, one with the model's own MLP.
    nearest = min(differing, key=lambda name: (len(differing[name]), "mlp" in differing[name]))
    if not differing[nearest]:
        return nearest
    raise ValueError(
        f"No Hugging Face architecture fits this model; the nearest, "
        f"{FAMILIES[nearest].architecture}, has {', '.join(differing[nearest].values())}."
    )


def _typed(value: Any) -> str:
    """Return a value of a config as it is typed."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def to_hf(
    config: ModelConfig, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """config.json's content, and the weights under Hugging Face's names, one at a time: each is
    taken out of `state` when it is asked for, and not held.

    Args: `config`, and the state_dict of its Transformer. Special tokens are left None: the caller
    knows the tokenizer. Raises ValueError where no architecture fits.
    """
    config = config.resolved()
    family = family_of(config)
    dtype = str(state[next(iter(state))].dtype).removeprefix("torch.")
    folded = _Folded(state, folds(config))  # without what serves training alone
    return _hf_config(family, config) | {"dtype": dtype}, _renamed(family, config, folded)


class _Folded(Mapping[str, Tensor]):
    """`state`, with each tensor multiplied by its factor, if any, when it is read."""

    def __init__(self, state: Mapping[str, Tensor], by: dict[str, float]):
        self._state, self._by = state, by
        self._names = [name for name in state if not name.startswith("mtp.")]

    def __getitem__(self, name: str) -> Tensor:
        by, tensor = self._by.get(name, 1.0), self._state[name]
        return tensor if by == 1.0 else tensor * by

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _renamed(
    family: str, config: ModelConfig, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    names = _names(family, config)
    for name, tensor in _FORMS.get(family, _items)(state):
        module, leaf = name.rsplit(".", 1)
        if family in GAINS_BESIDE_ONE and module.endswith("norm"):
            tensor = tensor - 1
        yield f"{names[module]}.{leaf}", tensor


def _items(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, state[name]) for name in state)


def from_hf(hf_config: dict[str, Any], hf_state: State) -> tuple[ModelConfig, State]:
    """The inverse of to_hf, also for models that others trained.

    Raises ValueError for another architecture, for a variant that we don't compute (rotary
    positions scaled otherwise than by yarn as we do it, sliding windows, heads that don't add up to
    the width), and for unknown or missing weights.
    """
    family = hf_config.get("model_type", "")
    if family not in FAMILIES:
        raise ValueError(f"model_type {family!r} is not one of {', '.join(FAMILIES)}.")
    config = _our_config(family, hf_config)
    ours = {theirs: name for name, theirs in _names(family, config).items()}
    state = {}
    for name, tensor in hf_state.items():
        if re.search(r"\.attn\.(masked_)?bias$|rotary_emb\.inv_freq$", name):
            continue  # constants in older files
        if family == "gpt2" and not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"  # OpenAI's own files leave it out
        module, _, leaf = name.rpartition(".")
        if module == "lm_head" and config.tie_embeddings:
            continue
        if module not in ours:
            raise ValueError(f"unexpected weight {name!r} in a {family} model.")
        if family in GAINS_BESIDE_ONE and ours[module].endswith("norm"):
            tensor = tensor + 1
        state[f"{ours[module]}.{leaf}"] = tensor
    if missing := set(ours.values()) - {name.rpartition(".")[0] for name in state}:
        raise ValueError(f"the weights of {', '.join(sorted(missing))} are missing.")
    if family in experts.FITS:
        return config, experts.stacked(state)
    return config, _split(state) if family == "gpt2" else state


def _names(family: str, config: ModelConfig) -> dict[str, str]:
    """Return our name -> theirs for every module that has weights."""
    f = FAMILIES[family]
    outer = dict(f.outer)
    if config.tie_embeddings:
        del outer["head"]
    return outer | {
        f"blocks.{i}.{ours}": f"{f.layer.format(i)}.{theirs}"
        for i in range(config.sizes.num_layers)
        for ours, theirs in _inner(family, config, i).items()
    }


def _inner(family: str, config: ModelConfig, layer: int) -> dict[str, str]:
    """Return our module within a block -> theirs, for one layer."""
    inner = FAMILIES[family].inner
    if family not in experts.FITS:
        return inner
    own = {ours: theirs for ours, theirs in inner.items() if not ours.startswith("mlp.")}
    return own | experts.names(family, config, layer)


def _is_gpt2_matrix(name: str, tensor: Tensor) -> bool:
    return name.startswith("blocks.") and tensor.dim() == 2


def _fused(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights in GPT-2's format: matrices (in, out); query, key and value in one."""
    for name in state:
        if ".key." in name or ".value." in name:
            continue
        tensor = state[name]
        if ".query." in name:
            parts = [state[name.replace(".query.", f".{part}.")] for part in ("key", "value")]
            name, tensor = name.replace(".query.", ".qkv."), torch.cat([tensor, *parts])
        yield name, tensor.T.contiguous() if _is_gpt2_matrix(name, tensor) else tensor


_FORMS = {"gpt2": _fused} | dict.fromkeys(experts.FITS, experts.unstacked)


def _split(state: State) -> State:
    """The inverse of _fused."""
    split: State = {}
    for name, tensor in state.items():
        tensor = tensor.T.contiguous() if _is_gpt2_matrix(name, tensor) else tensor
        if ".qkv." in name:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                split[name.replace(".qkv.", f".{part}.")] = rows.clone()
        else:
            split[name] = tensor
    return split


def _hf_config(family: str, c: ModelConfig) -> dict[str, Any]:
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
            "n_positions": c.max_sequence_length,
            "n_embd": c.width,
            "n_layer": c.num_layers,
            "n_head": c.num_heads,
            "n_inner": c.mlp_width,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": c.norm_eps,
            "resid_pdrop": c.dropout,
            "embd_pdrop": c.dropout,
            "attn_pdrop": c.dropout,
        }
    found = (
        shared
        | positions_to_hf(c)
        | {
            "hidden_size": c.width,
            "num_hidden_layers": c.num_layers,
            "num_attention_heads": c.num_heads,
            "num_key_value_heads": c.num_kv_heads,
            "head_dim": c.sizes.head_dim,
            "intermediate_size": c.mlp_width,
            "hidden_act": _activation(c),
            "rms_norm_eps": c.norm_eps,
            "attention_bias": c.bias,
            "mlp_bias": c.bias,
        }
        | experts.experts_to_hf(family, c)
    )
    return found | _gemma_config(c, found) if family == "gemma3_text" else found


def _gemma_config(c: ModelConfig, found: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that only Gemma 3 has; its positions are given for each kind of layer."""
    kinds = ("full_attention", "sliding_attention")
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": c.sizes.head_dim,
        "final_logit_softcapping": c.logit_softcap or None,
        "layer_types": ["full_attention"] * c.sizes.num_layers,
        "rope_local_base_freq": found["rope_theta"],  # transformers 4
        "rope_parameters": {kind: found["rope_parameters"] for kind in kinds},
    }


def _activation(c: ModelConfig) -> str:
    return {"relu2": "relu2", "geglu": "gelu_pytorch_tanh"}.get(c.mlp, "silu")


def _from_gemma(base: ModelConfig, hf: dict[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """Return the config with what only Gemma 3 has, and theirs with the keys that Llama has."""
    require(set(hf.get("layer_types") or ["?"]) == {"full_attention"}, "layer_types")
    require(not hf.get("attn_logit_softcapping"), "attn_logit_softcapping")
    require(not hf.get("use_bidirectional_attention"), "use_bidirectional_attention")
    require(hf.get("query_pre_attn_scalar", 256) == hf["head_dim"], "query_pre_attn_scalar")
    base = replace(base, logit_softcap=float(hf.get("final_logit_softcapping") or 0))
    rope = (hf.get("rope_parameters") or {}).get("full_attention")
    act = hf.get("hidden_activation", "gelu_pytorch_tanh")
    return base, hf | {"rope_parameters": rope, "hidden_act": act}


def _our_config(family: str, hf: dict[str, Any]) -> ModelConfig:
    fits = {k: v for k, v in FAMILIES[family].fits.items() if k != "num_kv_heads"}
    base = replace(
        ModelConfig(**fits),
        vocab_size=hf["vocab_size"],
        tie_embeddings=hf.get("tie_word_embeddings", family == "gpt2"),
    )
    if family == "gpt2":
        require(hf.get("activation_function", "gelu_new") == "gelu_new", "activation_function")
        require(not hf.get("scale_attn_by_inverse_layer_idx"), "scale_attn_by_inverse_layer_idx")
        return replace(
            base,
            num_layers=hf["n_layer"],
            width=hf["n_embd"],
            num_heads=hf["n_head"],
            mlp_width=hf.get("n_inner") or 4 * hf["n_embd"],
            max_sequence_length=hf["n_positions"],
            norm_eps=hf.get("layer_norm_epsilon", 1e-5),
            dropout=hf.get("resid_pdrop", 0.1),
        ).resolved()
    if family == "gemma3_text":
        base, hf = _from_gemma(base, hf)
    require(hf.get("hidden_act", _activation(base)) == _activation(base), "hidden_act")
    heads, width = hf["num_attention_heads"], hf["hidden_size"]
    require((hf.get("head_dim") or width // heads) * heads == width, "head_dim")
    require(not hf.get("use_sliding_window"), "use_sliding_window")
    bias = bool(hf.get("attention_bias", False))
    require(bias == bool(hf.get("mlp_bias", False)), "attention_bias without mlp_bias")
    sizes = {
        "num_layers": hf["num_hidden_layers"],
        "width": width,
        "num_heads": heads,
        "num_kv_heads": hf.get("num_key_value_heads") or heads,
        "mlp_width": hf["intermediate_size"],
        "norm_eps": hf.get("rms_norm_eps", 1e-6),
    }
    sizes |= positions_from_hf(hf) | experts.experts_from_hf(family, hf)
    return replace(base, bias=bias, **sizes).resolved()
