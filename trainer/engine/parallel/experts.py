"""Expert parallelism: groups of successive ranks that have the experts of a layer between them.

With `engine.expert_parallel` e, ranks [k e, (k + 1) e) exchange rows
(models/parallel/expert_exchange.py), and ranks i, i + e, i + 2 e, ... have the same experts.
DeepSpeed reduces the gradients of experts over the latter, divides their states among them (at
stage 3 their weights too), and divides the sum by as many ranks as that of all other parameters: so
Engine.backward needs no other factor.

Invariant: all ranks draw the experts of a layer in the same order and keep their own, so the
initial model depends on no number of ranks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from forescale.engine.world import World
from forescale.models.mlps.moe_module import MixtureOfExperts
from forescale.models.parallel.expert_exchange import ExpertGroup


def group_name(parallel: int) -> str:
    """Return DeepSpeed's name of the ranks that have the same experts."""
    return f"ep_size_{parallel}"


def join_experts(world: World) -> ExpertGroup:
    """Return the ranks that exchange rows with this one; and name to DeepSpeed those that have the
    same experts, over which it reduces."""
    from deepspeed.utils import groups

    name, rank = group_name(world.mesh.experts), world.rank
    groups._EXPERT_PARALLEL_GROUP[name] = world.experts.group
    groups._EXPERT_PARALLEL_GROUP_RANKS[name] = world.mesh.expert_peers(rank)
    groups._EXPERT_DATA_PARALLEL_GROUP[name] = world.expert_data.group
    groups._EXPERT_DATA_PARALLEL_GROUP_RANKS[name] = world.mesh.expert_data_peers(rank)
    return ExpertGroup(world.experts.group, world.experts.rank, world.experts.size)


def divide(module: nn.Module, group: ExpertGroup) -> nn.Module:
    """Let each layer of experts inside of `module` keep this rank's; return `module`.

    The marks tell DeepSpeed that an expert's parameter is reduced over the ranks that have it too;
    and stage 3 that it is divided among them, but the sum of its gradients by as many ranks as that
    of others (read in stage3.py of 0.19.8, which knows the experts of its own AutoEP by them).
    """
    from deepspeed.utils import groups

    ranks = group_name(group.size)
    for layer in module.modules():
        if isinstance(layer, MixtureOfExperts) and layer.expert_group is None:
            layer.divide(group)
            experts: list[Any] = [p for p in layer.parameters() if hasattr(p, "whole")]
            for p in experts:
                p.allreduce, p.group_name = False, ranks
                p.ds_zero_placement_family = "autoep_expert"
                p.ds_zero_partition_group_name = ranks
                p.ds_zero_partition_process_group = groups._EXPERT_DATA_PARALLEL_GROUP[ranks]
    return module


def is_expert(param: Any) -> bool:
    """True for a parameter of experts that ranks divide."""
    return not getattr(param, "allreduce", True)


@contextmanager
def visible_to_deepspeed(model: nn.Module, param_groups: list[dict[str, Any]]) -> Iterator[None]:
    """While DeepSpeed builds its engine, let it see that there are experts: it looks for modules of
    its own class, and takes the name of a group of parameters for the name of their ranks. At stage
    3 it refuses such modules, and needs none: there the marks of a parameter say all."""
    expert_groups = [(group, group["name"]) for group in param_groups if group.get("moe")]
    if not expert_groups or hasattr(expert_groups[0][0]["params"][0], "ds_id"):
        yield
        return
    model.add_module("_experts", _layer())
    for group, _ in expert_groups:
        group["name"] = group["params"][0].group_name
    try:
        yield
    finally:
        del model._modules["_experts"]
        for group, name in expert_groups:
            group["name"] = name


def _layer() -> nn.Module:
    from deepspeed.moe.layer import MoE

    class Mark(MoE):
        """A module without parameters that DeepSpeed takes for a layer of experts."""

        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.num_experts = 1  # DeepSpeed notes it for its own checkpoints

        def set_deepspeed_parallelism(self, *args: Any, **kwargs: Any) -> None:
            """Do nothing: the groups of ranks are there."""

    return Mark()
