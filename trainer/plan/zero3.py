"""The parameters that ZeRO-3 gathers in a step, and how many exist whole at the same time.

Follows DeepSpeed 0.19.8's coordinator (zero/partitioned_param_coordinator.py): a module's
parameters are gathered before it runs, in forward and backward, and released after it, unless one
of the next modules, within stage3_max_reuse_distance elements, uses them again. Invariant: only
counts elements; tests/distributed/test_real_costs.py compares them with the collectives of real
ranks.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GatherTrace:
    """Elements that one micro-batch gathers.

    forward, backward: gathered in each pass. most: maximum that exists whole at the same time.
    """

    forward: int
    backward: int
    most: int


@dataclass(frozen=True)
class _Call:
    module: str
    is_backward: bool = False
    is_kept: bool = False  # its parameters are not released after it


def trace_gathers(
    parameters: Sequence[Any],
    resident: Collection[str],
    reuse: int,
    recompute: bool,
    world: int = 1,
) -> GatherTrace:
    """Return what ZeRO-3 gathers in one micro-batch.

    parameters: with `name` and `numel`, in the order of the forward pass. resident: names of those
    that are never released. reuse: elements, stage3_max_reuse_distance. recompute: with activation
    checkpointing. world: each gathered parameter is padded to a multiple of it.
    """
    held: dict[str, dict[str, int]] = {}
    for p in parameters:
        held.setdefault(p.name.rpartition(".")[0], {})[p.name] = p.numel
    calls = _calls(_in_order(held), recompute)
    free = {m: {n: k for n, k in of.items() if n not in resident} for m, of in held.items()}
    sizes = {module: sum(of.values()) for module, of in held.items()}
    soon = _soon(calls, sizes, reuse)
    here: dict[str, int] = {}
    gathered, most, standing = [0, 0], 0, 0
    for at, call in enumerate(calls):
        for name, numel in free[call.module].items():
            if name not in here:
                here[name] = numel
                standing += numel
                gathered[call.is_backward] += -(-numel // world) * world
        most = max(most, standing)
        if free[call.module] and not call.is_kept and not soon[at]:
            for name in free[call.module]:
                standing -= here.pop(name, 0)
    return GatherTrace(gathered[0], gathered[1], most)


def _soon(calls: Sequence[_Call], sizes: dict[str, int], reuse: int) -> list[bool]:
    """Return for each call whether its module is called again within the next `reuse` elements."""
    found: list[bool] = []
    later: dict[str, int] = {}  # elements from the module's next call to the end
    rest = 0  # elements behind the call
    for call in reversed(calls):
        again = later.get(call.module)
        # Between the two calls lies what is behind this one, without the next one and its rest.
        found.append(again is not None and rest - again < reuse)
        rest += sizes[call.module]
        later[call.module] = rest
    return found[::-1]


def _in_order(held: Collection[str]) -> list[str]:
    """Return the modules in the order of the forward pass, which ends with a tied embedding."""
    order = list(held)
    known = [m for m in order if m.startswith("blocks.")]
    if known and "embedding" in order and "head" not in order:
        order.append("embedding")
    return order


def _calls(order: Sequence[str], recompute: bool) -> list[_Call]:
    calls = [_Call(module) for module in order]
    for block in reversed(_blocks(order)):
        if recompute and block[0].startswith("blocks."):
            # The backward of the last module needs activations, so the other modules run again.
            calls.append(_Call(block[-1], True, is_kept=True))
            calls += [_Call(module, True) for module in block[:-1]]
        calls += [_Call(module, True) for module in reversed(block)]
    return calls


def _blocks(order: Sequence[str]) -> list[list[str]]:
    """Return the modules grouped by block; each module outside the blocks is its own group."""
    found: list[list[str]] = []
    for module in order:
        key = module.split(".")[:2] if module.startswith("blocks.") else [module]
        if found and found[-1][0].split(".")[:2] == key and module.startswith("blocks."):
            found[-1].append(module)
        else:
            found.append([module])
    return found
