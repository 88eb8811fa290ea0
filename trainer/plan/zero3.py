"""Which parameters ZeRO-3 gathers in a step, and how many stand whole at a time.

Follows DeepSpeed 0.19.8's coordinator (zero/partitioned_param_coordinator.py): a module's
parameters are gathered before it runs, forward and backward, and released behind it unless one of
the modules ahead uses them before stage3_max_reuse_distance elements have gone by. Invariant:
counts only; tests/distributed/test_real_costs.py holds them to the collectives of real ranks.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Trace:
    """Of one micro-batch, in elements. forward, backward: gathered there; most: whole at a time."""

    forward: int
    backward: int
    most: int


@dataclass(frozen=True)
class _Call:
    module: str
    is_backward: bool = False
    is_kept: bool = False  # nothing is released behind it


def walk(
    parameters: Sequence[Any],
    resident: Collection[str],
    reuse: int,
    recompute: bool,
    world: int = 1,
) -> Trace:
    """parameters: with `name` and `numel`, in the order of the forward; resident: names of those
    that are never released; reuse: elements; recompute: with activation checkpointing; world: what
    is gathered is padded to a multiple of it."""
    held: dict[str, dict[str, int]] = {}
    for p in parameters:
        held.setdefault(p.name.rpartition(".")[0], {})[p.name] = p.numel
    calls = _calls(_in_order(held), recompute)
    free = {m: {n: k for n, k in of.items() if n not in resident} for m, of in held.items()}
    sizes = {module: sum(of.values()) for module, of in held.items()}
    here: dict[str, int] = {}
    gathered, most, standing = [0, 0], 0, 0
    for at, call in enumerate(calls):
        for name, numel in free[call.module].items():
            if name not in here:
                here[name] = numel
                standing += numel
                gathered[call.is_backward] += -(-numel // world) * world
        most = max(most, standing)
        if free[call.module] and not call.is_kept and not _soon(calls, at, sizes, reuse):
            for name in free[call.module]:
                standing -= here.pop(name, 0)
    return Trace(gathered[0], gathered[1], most)


def _soon(calls: Sequence[_Call], at: int, sizes: dict[str, int], reuse: int) -> bool:
    """Whether the module of call `at` is called again before `reuse` elements have gone by."""
    passed = 0
    for ahead in range(at + 1, len(calls)):
        if passed >= reuse:
            return False
        if calls[ahead].module == calls[at].module:
            return True
        passed += sizes[calls[ahead].module]
    return False


def _in_order(held: Collection[str]) -> list[str]:
    """Modules as the forward calls them. A tied table is called again at the end."""
    order = list(held)
    known = [m for m in order if m.startswith("blocks.")]
    if known and "embedding" in order and "head" not in order:
        order.append("embedding")
    return order


def _calls(order: Sequence[str], recompute: bool) -> list[_Call]:
    calls = [_Call(module) for module in order]
    for block in reversed(_blocks(order)):
        if recompute and block[0].startswith("blocks."):
            # The backward of its last module asks for what was not kept: then the others run again.
            calls.append(_Call(block[-1], True, is_kept=True))
            calls += [_Call(module, True) for module in block[:-1]]
        calls += [_Call(module, True) for module in reversed(block)]
    return calls


def _blocks(order: Sequence[str]) -> list[list[str]]:
    """Runs of modules that belong to one block; others stand alone."""
    found: list[list[str]] = []
    for module in order:
        key = module.split(".")[:2] if module.startswith("blocks.") else [module]
        if found and found[-1][0].split(".")[:2] == key and module.startswith("blocks."):
            found[-1].append(module)
        else:
            found.append([module])
    return found
