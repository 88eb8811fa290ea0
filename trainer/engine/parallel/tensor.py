"""Tensor parallelism: ranks that divide the matrices of each block (Shoeybi et al. 2019, Megatron,
arXiv 1909.08053, section 3).

Each rank of a group has some heads of attention and some channels of the MLP: rows of the matrices
that read the residual stream, columns of those that write to it (BlockPart.divided);
some rows of the tables of tokens; the columns of its heads of value embeddings; and the biases that
its heads add to scores. All ranks of a group are fed the same windows and hold the same stream. Two
all-reduces a part keep it so: of the part's output in the forward pass, of its input's gradient in
the backward pass.

Dropout of the stream draws the same on all ranks of a group, that of the weights of attention other
numbers on each (TensorGroup.drawing_apart).

Invariant: every rank draws whole matrices and keeps its part, so that the initial model depends on
no number of ranks; and the gradients of what is not divided are the same on all ranks of a group.
"""

from collections.abc import Iterator
from typing import Any

from torch import nn

from forescale.engine.world import World
from forescale.models.block import Block
from forescale.models.heads.vocabulary import Vocabulary
from forescale.models.init import Linear
from forescale.models.mlps.moe_module import MixtureOfExperts
from forescale.models.parallel.groups import TensorGroup
from forescale.models.parallel.whole import Whole, whole_of
from forescale.models.positions.biases import RelativePosition
from forescale.models.tables import ValueEmbedding
from forescale.models.transformer import Transformer


def group_of(world: World, chunks: int) -> TensorGroup:
    """Return the ranks that divide matrices with this one. chunks: engine.tensor_chunks."""
    peers = world.tensor
    return TensorGroup(peers.rank, peers.size, peers.group.group_name, chunks)


class Mpu:
    """What DeepSpeed asks of the ranks that divide a model: who has the same parameters, over whom
    it divides states and reduces gradients, and who has the others."""

    def __init__(self, world: World):
        self._world = world

    def get_data_parallel_group(self) -> Any:
        return self._world.shard.group

    def get_data_parallel_group_ranks(self) -> list[int]:
        return self._world.mesh.shard_peers(self._world.rank)

    def get_data_parallel_world_size(self) -> int:
        return self._world.shard.size

    def get_data_parallel_rank(self) -> int:
        return self._world.shard.rank

    def get_model_parallel_group(self) -> Any:
        """Return the ranks that have a model between them."""
        return self._world.tensor.group

    def get_model_parallel_world_size(self) -> int:
        return self._world.tensor.size

    def get_model_parallel_rank(self) -> int:
        return self._world.tensor.rank

    # DeepSpeed asks by either name.
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def divide(model: nn.Module, group: TensorGroup) -> nn.Module:
    """Keep this rank's part of the blocks and tables in `model`, those that are still whole; return
    `model`.

    A parameter that is divided has the attribute `whole`. A table whose rows the ranks don't divide
    stays whole.
    """
    if isinstance(model, Transformer):
        model.dividing = group
    for module in model.modules():
        if isinstance(module, Block) and module.divided:
            for name, dimensions in module.divided.items():
                _divide_part(getattr(module, name), dimensions, module.heads[name], group)
            module.divided = {}
        if isinstance(module, Vocabulary) and module.group is None and module.divides(group.size):
            module.group = group
            for p in module.parameters():
                _keep(p, 0, group)
        if isinstance(module, ValueEmbedding) and not hasattr(module.weight, "whole"):
            _keep(module.weight, 1, group)
        if isinstance(module, RelativePosition) and not hasattr(module.weight, "whole"):
            module.first = group.rank * (module.weight.shape[1] // group.size)
            _keep(module.weight, 1, group)
    return model


def _keep(p: nn.Parameter, dim: int, group: TensorGroup) -> None:
    """Keep this rank's part of a parameter."""
    p.whole = Whole(tuple(p.shape), group.rank, group.size, dim)  # type: ignore[attr-defined]
    p.data = p.data.chunk(group.size, dim)[group.rank].clone()


def _divide_part(
    part: nn.Module, dimensions: dict[str, int], heads: tuple[str, ...], group: TensorGroup
) -> None:
    if isinstance(part, MixtureOfExperts):
        part.tensor_group = group  # it sums the outputs of shared and other experts at once
    else:
        for linear, name in _linears(part):
            if dimensions.get(f"{name}.weight") == 1:
                linear.sum_of = group.sum_of
    for name, p in part.named_parameters():
        writes = dimensions.get(f"{name.rpartition('.')[0]}.weight") == 1
        if name in dimensions:
            _keep(p, dimensions[name], group)
        elif not writes and whole_of(p).parts == 1:
            # Each rank has the gradient of its heads alone, or of its tokens.
            p.register_hook(group.sum)
    for linear, _ in _linears(part):
        linear.out_features, linear.in_features = linear.weight.shape
    if heads:
        part.dividing = group  # type: ignore[assignment]
    for name in heads:
        owner, _, count = name.rpartition(".")
        module = part.get_submodule(owner)
        setattr(module, count, getattr(module, count) // group.size)
    part.register_forward_pre_hook(lambda _, inputs: (group.copied(inputs[0]), *inputs[1:]))


def _linears(part: nn.Module) -> Iterator[tuple[Linear, str]]:
    return ((m, name) for name, m in part.named_modules() if isinstance(m, Linear))
