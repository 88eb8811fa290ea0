"""Adapters: small matrices A and B beside frozen ones, and where they are and what they cost.

A frozen matrix W (out, in) with an adapter of rank r computes x W^T + scale (x A^T) B^T, A (r, in),
B (out, r): LoRA (Hu et al. 2021, arXiv 2106.09685). So W + scale B A is the same without an
adapter. Invariant: a parameter has the name in checkpoints and plans that it has without adapters;
those of the adapter of `m.weight` are `m.lora_A.weight` and `m.lora_B.weight`. Imports no torch.
"""

from collections.abc import Sequence
from itertools import groupby
from math import prod

from forescale.models.config import ModelConfig
from forescale.models.flops import (
    count,
    flops_forward,
    flops_per_token,
    flops_recomputed,
    in_chunks,
    matrices,
    parts_of,
    shapes,
    stacked,
)
from forescale.models.part import Shapes

_INSIDE = ("blocks.", "transform.", "mtp.")
_WEIGHT, _DOWN, _UP = ".weight", ".lora_A.weight", ".lora_B.weight"


def stored_name(name: str) -> str:
    """Return the name in checkpoints of a parameter of the library peft, which puts the frozen
    module into a wrapper, and names each adapter."""
    return name.replace(".base_layer.", ".").replace(".default.", ".")


def is_adapter(name: str) -> bool:
    """Return True for the name in a checkpoint of a parameter of an adapter."""
    return name.endswith((_DOWN, _UP))


def adapter_of(name: str) -> tuple[str, str]:
    """Return the names of A and B of the adapter that the matrix of this name may have."""
    module = name.removesuffix(_WEIGHT)
    return module + _DOWN, module + _UP


def is_target(module: str, targets: Sequence[str]) -> bool:
    """Return True if `targets` name a module of a block, such as mixer.query: by its whole name, by
    its last part (query), or by the part of the block that it is in (mixer). None name all."""
    names = (module, module.rpartition(".")[2], module.partition(".")[0])
    return not targets or any(name in targets for name in names)


def candidates(config: ModelConfig) -> list[str]:
    """Return the names inside of a block of all that can have an adapter, of any block."""
    every = matrices(config) - stacked(config)
    names = (n.split(".", 2)[2] for n in shapes(config) if n in every and n.startswith("blocks."))
    return [*dict.fromkeys(name.removesuffix(_WEIGHT) for name in names)]


def with_adapters(config: ModelConfig, rank: int, targets: Sequence[str]) -> Shapes:
    """Return the shapes by name of all parameters in their order; those of adapters too, if rank is
    not 0."""
    parameters, every = Shapes(), matrices(config) - stacked(config)
    for module, inside in groupby(shapes(config).items(), lambda item: item[0].rpartition(".")[0]):
        parameters |= inside
        weight = module + _WEIGHT
        is_in = rank and weight in every and module.startswith("blocks.")
        if is_in and is_target(module.split(".", 2)[2], targets):
            (out, into), (down, up) = parameters[weight], adapter_of(weight)
            parameters |= {down: (rank, into), up: (out, rank)}
    return parameters


def largest_rank(config: ModelConfig, targets: Sequence[str]) -> int:
    """Return the largest rank that a matrix with an adapter has: no higher one learns more."""
    parameters = with_adapters(config, 1, targets)
    modules = [name.removesuffix(_DOWN) for name in parameters if name.endswith(_DOWN)]
    return max((min(parameters[module + _WEIGHT]) for module in modules), default=0)


def num_adapters(config: ModelConfig, rank: int, targets: Sequence[str]) -> int:
    """Return the number of parameters that are trained."""
    return sum(_sizes(config, rank, targets).values())


def _sizes(config: ModelConfig, rank: int, targets: Sequence[str]) -> dict[str, int]:
    """Return the numbers of parameters of the adapters by name."""
    parameters = with_adapters(config, rank, targets).items()
    return {name: prod(shape) for name, shape in parameters if is_adapter(name)}


def flops_with_adapters(
    config: ModelConfig,
    sequence_length: int,
    rank: int,
    targets: Sequence[str],
    causal: bool = False,
) -> float:
    """Return forward and backward FLOPs of one token as flops_per_token does, where all weights are
    frozen but those of adapters.

    A frozen matrix has a gradient of its input, and none of its own: twice the FLOPs of its forward
    pass in place of three times. Adapters have all three. Nothing is taken off for the inputs of
    the first layer, which need no gradient either.
    """
    frozen = 2 * _multiplied(config)
    of_adapters = 6 * num_adapters(config, rank, targets)
    return flops_per_token(config, sequence_length, causal) - frozen + of_adapters


def flops_forward_with_adapters(
    config: ModelConfig, sequence_length: int, rank: int, targets: Sequence[str]
) -> float:
    """Return the FLOPs of one token in evaluation as flops_forward does, with those of adapters."""
    return flops_forward(config, sequence_length) + 2 * num_adapters(config, rank, targets)


def flops_recomputed_with_adapters(
    config: ModelConfig, sequence_length: int, rank: int, targets: Sequence[str], ranks: int = 1
) -> float:
    """Return the recomputed FLOPs of one token as flops_recomputed does, with those of adapters:
    full checkpointing makes their products again, and an MLP in chunks those of its own. Selective
    checkpointing keeps the results of all matrices."""
    config, again = in_chunks(config, sequence_length // ranks), 0
    for name, size in _sizes(config, rank, targets).items():
        layer, part = name.split(".")[1:3]
        is_in_chunks = part == "mlp" and parts_of(config, int(layer)).mlp.recomputed(config, 1)
        again += size * ((config.activation_checkpointing == "full") + bool(is_in_chunks))
    return flops_recomputed(config, sequence_length, ranks) + 2 * again


def flops_6n_with_adapters(config: ModelConfig, rank: int, targets: Sequence[str]) -> int:
    """Return 4N FLOPs of one token for the frozen N = blocks + head, and 6 for each of an
    adapter."""
    of_adapters = 6 * num_adapters(config, rank, targets)
    return 4 * count(config).active_blocks_and_head + of_adapters


def _multiplied(config: ModelConfig) -> int:
    """Return the elements of the matrices that a token is multiplied by."""
    inside = (shape for name, shape in shapes(config).items() if name.startswith(_INSIDE))
    every = sum(prod(shape) for shape in inside if len(shape) > 1)
    last = parts_of(config, config.num_blocks - 1).values()
    idle = count(config).total - count(config).mtp - count(config).active
    idle += config.mtp_layers * sum(part.idle(config) for part in last)
    head = config.sizes.vocab_size * config.sizes.width * (1 + config.mtp_layers)
    return every - idle + head
