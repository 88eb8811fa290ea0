"""Experts in Hugging Face's formats, Mixtral and Qwen3-MoE, to and from ours.

Invariant: the files have a tensor for each expert, as the published ones, which transformers 4 and
5 load; ours has all experts of a layer in one.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from forescale.models.config import ModelConfig
from forescale.models.hf.positions import only, require

_EXPERTS = {"mlp": "moe", "bias": False, "mlp.scores": "softmax", "mlp.shared": 0}
FITS: dict[str, dict[str, Any]] = {
    "mixtral": _EXPERTS | {"mixer.qk_norm": "none", "mlp.renormalise": True, "mlp.dense_layers": 0},
    "qwen3_moe": _EXPERTS | {"mixer.qk_norm": "head"},
}
_MATRICES = ("gate", "up", "down")


def names(family: str, config: ModelConfig, layer: int) -> dict[str, str]:
    """Return our name -> theirs for the modules of a layer's MLP, each expert a module."""
    assert config.experts is not None
    if not config.mlp.of_layer(layer).is_routed:
        return {f"mlp.{matrix}": f"mlp.{matrix}_proj" for matrix in _MATRICES}
    is_mixtral = family == "mixtral"
    inside = "block_sparse_moe" if is_mixtral else "mlp"
    names = ("w1", "w3", "w2") if is_mixtral else ("gate_proj", "up_proj", "down_proj")
    return {"mlp.router": f"{inside}.gate"} | {
        f"mlp.{matrix}.{e}": f"{inside}.experts.{e}.{name}"
        for e in range(config.experts.experts)
        for matrix, name in zip(_MATRICES, names, strict=True)
    }


def unstacked(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights, the matrix of each expert under a name of its own."""
    for name in state:
        tensor = state[name]
        if tensor.dim() != 3:
            yield name, tensor
            continue
        module, _, leaf = name.rpartition(".")
        for e, matrix in enumerate(tensor):
            yield f"{module}.{e}.{leaf}", matrix.clone()  # a file holds no views


def experts_to_hf(family: str, c: ModelConfig) -> dict[str, Any]:
    """Return the keys of experts in config.json; none for a family without."""
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
    return {
        "num_experts": experts.experts,
        "num_experts_per_tok": experts.top_k,
        "moe_intermediate_size": experts.width(c),
        "norm_topk_prob": experts.renormalise,
        "decoder_sparse_step": 1,
        "mlp_only_layers": list(range(experts.dense_layers)),
    }


def experts_from_hf(family: str, hf: dict[str, Any]) -> dict[str, Any]:
    """Return the block of experts and its fields: the inverse of experts_to_hf.

    mlp_width, which Mixtral has no place for and does not use, follows the rule for expert_width.
    Raises ValueError for a variant that we don't compute.
    """
    if family not in FITS:
        return {}
    top_k = hf.get("num_experts_per_tok", 2 if family == "mixtral" else 8)
    number = hf.get("num_experts", hf.get("num_local_experts", 8 if family == "mixtral" else 128))
    block: dict[str, Any] = {"kind": "moe", "experts": number, "top_k": top_k}
    if family == "mixtral":
        only(hf, "sliding_window")
        width = hf["intermediate_size"]
        return {"mlp": block | {"expert_width": width}, "mlp_width": top_k * width}
    dense = list(hf.get("mlp_only_layers") or [])
    only(hf, "decoder_sparse_step", 1)
    require(dense == list(range(len(dense))), "mlp_only_layers", dense)
    block |= {
        "expert_width": hf["moe_intermediate_size"],
        "renormalise": hf.get("norm_topk_prob", False),
        "dense_layers": len(dense),
    }
    return {"mlp": block}
