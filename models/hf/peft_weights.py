"""Adapters in the format of the library peft, for the Hugging Face model of an export.

Invariant: with the weights of to_hf they compute what our adapters compute with our weights. Where
a Hugging Face matrix is several of ours (GPT-2, GPT-NeoX), its adapter has the sum of their ranks:
the matrices A one under another, and B with a block for each.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from forescale.models.adapters import adapter_of, is_adapter
from forescale.models.config import ModelConfig
from forescale.models.flops import shapes
from forescale.models.hf.families import FAMILIES, module_names
from forescale.models.hf.pieces import FUSED
from forescale.models.parametrization import folds


def adapters_to_hf(
    family: str, config: ModelConfig, state: Mapping[str, Tensor], rank: int, alpha: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the keys of adapter_config.json, and the weights under peft's names.

    state: A and B by their names in a checkpoint; rank, alpha: of the run.
    """
    config = config.resolved()
    names, ranks = module_names(family, config), dict[str, int]()
    weights: dict[str, Tensor] = {}
    for module, down, up in _pairs(family, config, state):
        name = names[module]
        weights[f"base_model.model.{name}.lora_A.weight"] = down.contiguous()
        weights[f"base_model.model.{name}.lora_B.weight"] = up.contiguous()
        ranks[name] = len(down)
    others = {name: of_one for name, of_one in ranks.items() if of_one != rank}
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": [*ranks],
        "rank_pattern": others,
        "alpha_pattern": {name: alpha * of_one / rank for name, of_one in others.items()},
        "fan_in_fan_out": family == "gpt2",
        "bias": "none",
    }, weights


def adapters_of_class(
    state: Mapping[str, Tensor], rank: int, alpha: float
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the same for a class of transformers (any_class.py), whose modules have their own
    names."""
    names = {name: name.removeprefix("inner.") for name in state}
    modules = dict.fromkeys(name.partition(".lora_")[0] for name in names.values())
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": [*modules], "bias": "none"}
    return settings, {f"base_model.model.{names[n]}": w.contiguous() for n, w in state.items()}


def _pairs(
    family: str, config: ModelConfig, state: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield our name of each Hugging Face module with an adapter, its A and its B."""
    sizes, by, done = shapes(config), folds(config), set[str]()
    for name in state:
        module = name.removesuffix(".lora_A.weight")
        if not is_adapter(name) or module == name or module in done:
            continue
        block, _, last = module.rpartition(".")
        if not (fused := FAMILIES[family].fused) or last not in FUSED:
            down, up = adapter_of(f"{module}.weight")
            yield module, state[down], state[up] * by.get(f"{module}.weight", 1.0)
            continue
        done |= {f"{block}.{part}" for part in FUSED}
        downs, ups = [], []
        for part in FUSED:
            weight = f"{block}.{part}.weight"
            (down, up), (rows, columns) = adapter_of(weight), sizes[weight]
            downs.append(state.get(down, torch.zeros(0, columns)))
            ups.append(state.get(up, torch.zeros(rows, 0)) * by.get(weight, 1.0))
        whole = torch.block_diag(*ups)
        if fused == "heads":
            of_heads = whole.unflatten(0, (3, config.sizes.num_heads, -1))
            whole = of_heads.transpose(0, 1).flatten(0, 2)
        yield f"{block}.qkv", torch.cat(downs), whole
