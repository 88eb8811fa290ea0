"""Encoders as BertForMaskedLM, and encoder-decoders as T5ForConditionalGeneration, of transformers.

Invariant: the class computes what our model computes, and has its weights to the bit, but for T5's
queries: T5 doesn't divide scores, so they are multiplied by what ours are.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from forescale.models.config import ModelConfig
from forescale.models.flops import shapes
from forescale.models.hf.families import pairs, plain
from forescale.models.hf.fit import differing
from forescale.models.parametrization import scales
from forescale.models.positions.kinds import Relative

BERT, T5 = "BertForMaskedLM", "T5ForConditionalGeneration"
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
    | {"mlp": tuple(_ACTIVATIONS), "tie_embeddings": True},
}
del _FITS[T5]["mixer.score_dim"], _FITS[BERT]["head.bias"]  # its head has one always


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
    if c.has_encoder:
        return _t5_config(c), _t5_weights(c, state)
    return _bert_config(c), _bert_weights(c, state)


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


def _bert_weights(c: ModelConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    # Ours has no segments.
    yield "bert.embeddings.token_type_embeddings.weight", torch.zeros(2, c.sizes.width)
    for name in shapes(c):
        module, leaf = name.rsplit(".", 1)
        if name in _BERT:
            yield _BERT[name], state[name]
        elif module.startswith("blocks."):
            _, layer, inner = module.split(".", 2)
            yield f"bert.encoder.layer.{layer}.{_BERT[inner]}.{leaf}", state[name]
        else:
            yield f"{_BERT[module]}.{leaf}", state[name]


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
        **{"tie_word_embeddings": False, "is_encoder_decoder": True, "pad_token_id": None},
    }


_T5 = {"query": "q", "key": "k", "value": "v", "output": "o", "down": "wo"}
_T5_PLACES = {"mixer": (0, "SelfAttention"), "cross": (1, "EncDecAttention")}


def _t5_name(c: ModelConfig, name: str) -> str:
    table = "block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    outer = {
        "embedding.weight": "shared.weight",
        "encoder_relative_position.weight": f"encoder.{table}",
        "relative_position.weight": f"decoder.{table}",
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


def _t5_weights(c: ModelConfig, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    width = getattr(c.mixer, "score_dim", None) or c.sizes.head_dim
    scale = scales(c).attention * math.sqrt(c.sizes.head_dim / width)
    for name in shapes(c):
        is_query = name.endswith(".query.weight")
        yield _t5_name(c, name), state[name] * scale if is_query else state[name]
    yield "lm_head.weight", state["embedding.weight"].clone()  # a file holds no tensor twice
