"""The config.json and weights of a model that is no architecture of transformers, for the file
modeling_forescale.py, which stands beside this one and which an export brings."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from forescale.config.schema import plain
from forescale.models.config import ModelConfig
from forescale.models.flops import layers_of, shapes
from forescale.models.mixers.attention import Softmax
from forescale.models.parametrization import scales
from forescale.models.part import Part
from forescale.models.positions.biases import slopes
from forescale.models.positions.rope_scaling import frequencies

MODELING = "modeling_forescale.py"
# The class of the file that each class of transformers loads.
CLASSES = {"AutoModelForCausalLM": "ForescaleForCausalLM"}
CLASSES |= {"AutoModelForMaskedLM": "ForescaleForMaskedLM"}


def as_code(
    config: ModelConfig, state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], Iterator[tuple[str, Tensor]]]:
    """Return the content of config.json, and the tensors by name, each read when it is needed."""
    c = replace(config.resolved(), mtp_layers=0)  # they serve training alone
    sizes, scale = shapes(c), asdict(scales(c))
    is_scaled = c.scale_embedding or c.position.kind == "sinusoidal"
    names = [name for name in state if not name.startswith("mtp.")]
    loads = "AutoModelForCausalLM" if c.causal else "AutoModelForMaskedLM"
    auto = {"AutoConfig": "ForescaleConfig", loads: CLASSES[loads]}
    return {
        **{"architectures": [CLASSES[loads]], "model_type": "forescale"},
        "auto_map": {name: f"{MODELING.removesuffix('.py')}.{of}" for name, of in auto.items()},
        **{"vocab_size": c.vocab_size, "hidden_size": c.width, "num_hidden_layers": c.num_layers},
        "max_position_embeddings": c.max_sequence_length,
        "tie_word_embeddings": False,  # the file itself takes the one table for both
        "forescale": {
            "mixers": [_keys(c, parts.mixer) for parts in layers_of(c)],
            "mlps": [_keys(c, parts.mlp) for parts in layers_of(c)],
            "position": _keys(c, c.position) | {"causal": c.causal},
            **{"norm": _keys(c, c.norm), "softcap": c.head.softcap, "head_dim": c.sizes.head_dim},
            "scales": scale | ({} if is_scaled else {"embedding": 1.0}),
            # Buffers are the steps of experts' biases.
            "tensors": {n: [[*(sizes.get(n) or state[n].shape)], n in sizes] for n in names},
        },
    }, ((name, state[name]) for name in names)


def _keys(c: ModelConfig, part: Part) -> dict[str, Any]:
    """Return the kind and keys of a part, and of a mixer what follows from the model's."""
    keys: dict[str, Any] = {"kind": part.kind, **plain(part)}
    if isinstance(part, Softmax):
        ratio = c.sizes.head_dim / (getattr(part, "score_dim", None) or c.sizes.head_dim)
        keys["scale"], keys["rotation"] = scales(c).attention * math.sqrt(ratio), [[], 1.0]
        theta = getattr(part, "theta", None)
        if c.rotates and theta != 0:
            by, length = frequencies(c, torch.device("cpu"), theta)
            keys["rotation"] = [by.tolist(), length]
    if part.kind == "alibi":
        keys["slopes"] = slopes(c.sizes.num_heads)
    return keys
