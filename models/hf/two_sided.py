"""BERT's and T5's classes of transformers, BertForMaskedLM and T5ForConditionalGeneration, as our
encoders and encoder-decoders, both ways.

Invariant: the class computes what our model computes. What differs goes into the weights: T5
doesn't divide scores, so its queries are ours times what ours are multiplied by; older T5's divide
what the head reads by the root of the width, which an import does to the last norm; BERT's vector
of the first segment is added to its positions.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from forescale.models.config import ModelConfig
from forescale.models.flops import shapes
from forescale.models.hf.config_json import WrongValue, check_types, of_paths, only, require
from forescale.models.hf.families import pairs, plain
from forescale.models.hf.fit import differing
from forescale.models.hf.piece import Piece, exported
from forescale.models.mixers.attention import Attention
from forescale.models.parametrization import scales
from forescale.models.positions.kinds import Relative

BERT, T5 = "BertForMaskedLM", "T5ForConditionalGeneration"
KINDS = {"bert": BERT, "t5": T5, "mt5": T5}  # model_type -> the class that computes it
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_new", "gelu_exact": "gelu"}
_ACTIVATIONS |= {"geglu": "gated-gelu", "swiglu": "gated-silu"}
_SHARED = plain("causal encoder_layers") | {"parametrization": "standard", "mixer.qk_norm": "none"}
_SHARED |= {"num_kv_heads": "num_heads"}
_FITS = {
    BERT: _SHARED
    | {"norm.placement": "residual", "norm.embedding": True, "head": "dense"}
    | {"norm": "layernorm", "norm.gain": True, "bias": True, "mlp": "gelu_exact"}
    | {"position": "learned", "tie_embeddings": True, "head_dim": "width / num_heads"},
    T5: _SHARED
    | {"position": "relative", "norm": "rmsnorm", "norm.gain": True, "bias": False}
    | {"mlp": tuple(_ACTIVATIONS)},
}
del _FITS[T5]["mixer.score_dim"], _FITS[BERT]["head.bias"]  # its head has one always
_SEGMENTS = "bert.embeddings.token_type_embeddings.weight"
# Copies of other weights, constants, and a table that no model reads.
_COPIES = re.compile(
    r"(en|de)coder\.embed_tokens\.weight|cls\.predictions\.decoder\.(weight|bias)"
    r"|bert\.embeddings\.position_ids|.*EncDecAttention\.relative_attention_bias\.weight"
)
_OF_SENTENCES = re.compile(r"bert\.pooler\..*|cls\.seq_relationship\..*")


def architecture(config: ModelConfig) -> str:
    """Return the class of a resolved config that is no decoder alone. Raises ValueError, which says
    how it differs."""
    name = T5 if config.has_encoder else BERT
    if different := differing(_FITS[name], config):
        problem = f"No Hugging Face architecture fits this model; the nearest, {name}, has"
        raise ValueError(f"{problem} {', '.join(different.values())}.")
    return name


def to_hf(
    config: ModelConfig, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """Return the content of config.json and the tensors by their names there, as hf.to_hf does."""
    c = config.resolved()
    architecture(c)  # raises ValueError
    return (_t5_config if c.has_encoder else _bert_config)(c), _weights(c, state)


def _weights(c: ModelConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    factors = dict[str, float]()
    if c.has_encoder:
        width = getattr(c.mixer, "score_dim", None) or c.sizes.head_dim
        by = scales(c).attention * math.sqrt(c.sizes.head_dim / width)
        factors = {name: by for name in shapes(c) if name.endswith(".query.weight") and by != 1}
    else:
        yield _SEGMENTS, torch.zeros(2, c.sizes.width)  # ours has none
    yield from exported(pieces(c), state, factors)
    if c.has_encoder and c.tie_embeddings:
        yield "lm_head.weight", state["embedding.weight"].clone()  # a file holds no tensor twice


def pieces(c: ModelConfig, hf: dict[str, Any] | None = None) -> Iterator[Piece]:
    """Yield the pieces of all parameters. hf: the content of config.json, of an import; None: of an
    export."""
    row, last = _SEGMENTS if hf else "", 1.0
    if hf and c.has_encoder and _is_scaled(hf):
        last = c.sizes.width**-0.5
    for name, shape in shapes(c).items():
        if c.has_encoder:
            times = last if name == "norm.weight" else 1.0
            yield Piece(name, 0, shape, _t5_name(c, name), times=times)
        else:
            is_table = name == "position.weight"
            yield Piece(name, 0, shape, _bert_name(name), row=row if is_table else "")


def _is_scaled(hf: dict[str, Any]) -> bool:
    """Return True if T5 divides what the head reads by the root of the width. transformers 4 does
    if the head is the embedding; 5 writes a key of its own, and `true` for that of 4, always."""
    known = hf.get("tie_word_embeddings") is not False and hf["model_type"] == "t5"
    return bool(hf.get("scale_decoder_outputs", known))


def usual_name(name: str, c: ModelConfig) -> str:
    """Return the name of a tensor in a file as an export gives it; "" if no parameter is in it."""
    if not c.has_encoder:
        name = re.sub("LayerNorm.gamma$", "LayerNorm.weight", name)  # of 2018
        name = re.sub("LayerNorm.beta$", "LayerNorm.bias", name)
    is_copy = _COPIES.fullmatch(name) or (name == "lm_head.weight" and c.tie_embeddings)
    return "" if is_copy or is_of_sentences(name) else name


def is_of_sentences(name: str) -> bool:
    """Return True for a tensor that BERT has for sentences, which our models leave out."""
    return _OF_SENTENCES.fullmatch(name) is not None


def config_from_hf(kind: str, hf: dict[str, Any], names: Collection[str]) -> ModelConfig:
    """Return our config with every size, as config_json.config_from_hf does. names: of the tensors
    in the files, which have a head of its own or none."""
    check_types(hf)
    only(hf, "quantization_config")
    no_choice = ("num_kv_heads", "head_dim", "norm.gain")  # sizes, and a default
    fits = {k: v for k, v in _FITS[KINDS[kind]].items() if k not in no_choice}
    base = replace(of_paths(fits), vocab_size=hf["vocab_size"])
    if kind == "bert":
        return _bert_from_hf(base, hf).resolved()
    is_tied = _is_scaled(hf) or "lm_head.weight" not in names
    return replace(_t5_from_hf(base, hf), tie_embeddings=is_tied).resolved()


def _bert_from_hf(base: ModelConfig, hf: dict[str, Any]) -> ModelConfig:
    for key, value in _BERT_CONSTANTS.items():
        only(hf, key, value)
    dropout = hf.get("hidden_dropout_prob", 0.1)
    other = hf.get("attention_probs_dropout_prob", 0.1)
    require(other == dropout, "attention_probs_dropout_prob beside hidden_dropout_prob", other)
    return replace(
        base,
        **{name: hf[key] for key, name in _BERT_SIZES.items()},
        norm=replace(base.norm, eps=hf.get("layer_norm_eps", 1e-12)),
        dropout=dropout,
        causal=False,
    )


_BERT_SIZES = {
    "hidden_size": "width",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "max_sequence_length",
}
_BERT_CONSTANTS: dict[str, Any] = {"hidden_act": "gelu", "position_embedding_type": "absolute"}
_BERT_CONSTANTS |= {"is_decoder": False, "add_cross_attention": False, "tie_word_embeddings": True}


def _bert_config(c: ModelConfig) -> dict[str, Any]:
    return {
        **{"architectures": [BERT], "model_type": "bert", "vocab_size": c.vocab_size},
        **{"hidden_size": c.width, "num_hidden_layers": c.num_layers},
        **{"num_attention_heads": c.num_heads, "intermediate_size": c.mlp_width},
        **{"hidden_act": "gelu", "layer_norm_eps": c.norm.eps},
        **{"max_position_embeddings": c.max_sequence_length, "type_vocab_size": 2},
        **{"hidden_dropout_prob": c.dropout, "attention_probs_dropout_prob": c.dropout},
        **{"tie_word_embeddings": True, "pad_token_id": None},
    }


_BERT = pairs(
    "embedding.weight=bert.embeddings.word_embeddings.weight "
    "embedding.bias=cls.predictions.bias "
    "position.weight=bert.embeddings.position_embeddings.weight "
    "embedding_norm=bert.embeddings.LayerNorm transform.dense=cls.predictions.transform.dense "
    "transform.norm=cls.predictions.transform.LayerNorm mixer.query=attention.self.query "
    "mixer.key=attention.self.key mixer.value=attention.self.value "
    "mixer.output=attention.output.dense mixer_post_norm=attention.output.LayerNorm "
    "mlp.up=intermediate.dense mlp.down=output.dense mlp_post_norm=output.LayerNorm"
)


def _bert_name(name: str) -> str:
    if name in _BERT:
        return _BERT[name]
    module, leaf = name.rsplit(".", 1)
    if not module.startswith("blocks."):
        return f"{_BERT[module]}.{leaf}"
    _, layer, inner = module.split(".", 2)
    return f"bert.encoder.layer.{layer}.{_BERT[inner]}.{leaf}"


def _t5_config(c: ModelConfig) -> dict[str, Any]:
    assert isinstance(c.position, Relative)
    return {
        **{"architectures": [T5], "model_type": "t5", "vocab_size": c.vocab_size},
        **{"d_model": c.width, "d_kv": c.sizes.head_dim, "d_ff": c.mlp_width},
        **{"num_layers": c.encoder_layers, "num_decoder_layers": c.num_layers},
        **{"num_heads": c.num_heads, "feed_forward_proj": _ACTIVATIONS[c.mlp.kind]},
        "relative_attention_num_buckets": c.position.buckets,
        "relative_attention_max_distance": c.position.distance,
        **{"layer_norm_epsilon": c.norm.eps, "dropout_rate": c.dropout},
        # False: logits are not divided. The head is the same table nevertheless.
        **{"tie_word_embeddings": False, "scale_decoder_outputs": False},
        **{"is_encoder_decoder": True, "pad_token_id": None},
    }


def _t5_from_hf(base: ModelConfig, hf: dict[str, Any]) -> ModelConfig:
    kinds, kind = {v: k for k, v in _ACTIVATIONS.items()}, hf.get("feed_forward_proj", "relu")
    require(isinstance(kind, str) and kind in kinds, "feed_forward_proj", kind)
    only(hf, "is_encoder_decoder", True)
    buckets = hf.get("relative_attention_num_buckets", 32)
    farthest = hf.get("relative_attention_max_distance", 128)
    if buckets < 4:  # T5 of transformers divides by a quarter of them, without its remainder
        problem = f"its relative_attention_num_buckets is {buckets}: too few for near and far ones."
        raise WrongValue(problem)
    if farthest <= buckets // 2:  # T5 of transformers divides by log(farthest / (buckets // 2))
        problem = f"half of its {buckets} buckets are for near distances"
        raise WrongValue(f"its relative_attention_max_distance is {farthest}, and {problem}.")
    width, heads, per_head = hf["d_model"], hf["num_heads"], hf["d_kv"]
    longest = hf.get("n_positions", _T5_LENGTH)
    return replace(
        base,
        **{"width": width, "num_heads": heads, "mlp_width": hf["d_ff"]},
        head_dim=per_head if per_head * heads != width else None,
        encoder_layers=hf["num_layers"],
        num_layers=hf.get("num_decoder_layers") or hf["num_layers"],
        mlp=of_paths({"mlp": kinds[kind]}).mlp,
        mixer=Attention(**vars(base.mixer) | {"score_dim": 1.0}),  # not divided
        position=Relative(buckets, farthest),
        norm=replace(base.norm, eps=hf.get("layer_norm_epsilon", 1e-6)),
        dropout=hf.get("dropout_rate", 0.1),
        max_sequence_length=2 * longest,
        source_length=longest,
    )


_T5_LENGTH = 512  # tokens of a source and of a target, of published ones; any number would do

_T5 = {"query": "q", "key": "k", "value": "v", "output": "o", "down": "wo"}
_T5_PLACES = {"mixer": (0, "SelfAttention"), "cross": (1, "EncDecAttention")}


def _t5_name(c: ModelConfig, name: str) -> str:
    table = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    outer = {
        "embedding.weight": "shared.weight",
        "encoder_relative_position.weight": f"encoder.{table}",
        "relative_position.weight": f"decoder.{table}",
        "head.weight": "lm_head.weight",
        "norm.weight": "decoder.final_layer_norm.weight",
        f"blocks.{c.encoder_layers - 1}.output_norm.weight": "encoder.final_layer_norm.weight",
    }
    if name in outer:
        return outer[name]
    _, index, part, *inner = name.split(".")
    layer, half = int(index), "encoder"
    if layer >= c.encoder_layers:
        layer, half = layer - c.encoder_layers, "decoder"
    last = 1 if half == "encoder" else 2
    place, module = _T5_PLACES.get(part.removesuffix("_norm"), (last, "DenseReluDense"))
    if part.endswith("_norm"):
        return f"{half}.block.{layer}.layer.{place}.layer_norm.weight"
    gated = {"gate": "wi_0", "up": "wi_1"} if c.mlp.is_gated else {"up": "wi"}
    return f"{half}.block.{layer}.layer.{place}.{module}.{(_T5 | gated)[inner[0]]}.weight"
