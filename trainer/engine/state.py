"""Parameters and moments as portable fragments (portable/): from DeepSpeed to files, and back.

Invariant: the fragments of all ranks together hold every element exactly once, at any stage and
world size, so every other stage and world size can read its own ranges from them. No collective
moves tensor data: each rank writes what it owns, and reads what it needs.

The state is exact, with one exception: stages 1 to 3 keep Muon's momentum in the number format
of the gradients, which may be bf16, all others in fp32, so moving it from fp32 to bf16 rounds it.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from forescale.engine.layout import Layout, Piece, Unit
from forescale.engine.portable.fragments import WEIGHT, Fragment
from forescale.engine.step import Engine
from forescale.models.parallel.whole import whole_of

MOMENTUM = "momentum_buffer"
# Of a run on several clusters (outer.py), laid out as the masters; deltas of an exchange under way.
OUTER_WEIGHT, OUTER_MOMENTUM, OUTER_DELTA = "outer_weight", "outer_momentum", "outer_delta"


class Fills(Protocol):
    """A reader of a checkpoint, or of one member's deltas; see FragmentReader."""

    def states(self, name: str) -> list[str]: ...

    def fill(self, fragment: Fragment) -> None: ...


def num_parameters(engine: Engine) -> int:
    """Return the number of the model's parameters, frozen ones too."""
    return sum(map(math.prod, engine.shapes.values()))


def _held(engine: Engine, unit: Unit, piece: Piece, state: str, tensor: Tensor) -> Fragment:
    """Return everything of a piece's `state` that the unit's `tensor` holds."""
    slot = (piece.start, piece.at, piece.size)
    if state == MOMENTUM:
        slot = engine.layout.momentum_slot(unit, piece) or slot
    start, at, size = slot
    part = tensor.detach().view(-1)[at : at + size]
    return fragment_of(engine, piece.param, state, start, part)


def fragment_of(engine: Engine, param: Any, state: str, start: int, data: Tensor) -> Fragment:
    """Return `data` as a fragment of the whole parameter; `start`: in the part that is here."""
    whole = whole_of(param)
    return Fragment(engine.names[param], whole.shape, state, whole.start + start, data, whole.cut)


def owned_part(engine: Engine, piece: Piece, held: Fragment) -> Fragment | None:
    """Return the part of a held fragment that this rank writes; None if it writes nothing of it."""
    world, whole = engine.world, whole_of(piece.param)
    count, copy = world.replicas.size, world.replicas.rank
    if engine.layout.replicated:
        in_stage = world.mesh.in_stage
        count, copy = in_stage // whole.parts, world.rank % in_stage // whole.parts
    elif not engine.layout.counts(piece.param):
        return None
    part = -(-piece.size // count)  # the ranks that hold the same elements share the work
    first, end = (whole.start + piece.start + min(piece.size, i * part) for i in (copy, copy + 1))
    if first == end:
        return None
    return replace(held, start=first, data=held.data[first - held.start : end - held.start])


def owned_fragments(engine: Engine) -> Iterator[Fragment]:
    """Yield what this rank writes, as views. The first rank (of each stage of a pipeline)
    writes buffers and frozen parameters; at ZeRO stage 3 each rank its part of the latter."""
    base = engine.layout.base
    for unit in engine.layout.units():
        states = {WEIGHT: unit.master}
        moments = base.state.get(unit.master, {}).items()
        states |= {k: v for k, v in moments if torch.is_tensor(v) and v.dim() > 0}
        states |= engine.outer.states(unit) if engine.outer else {}
        for piece in unit.pieces:
            for state, tensor in states.items():
                if fragment := owned_part(engine, piece, _held(engine, unit, piece, state, tensor)):
                    yield fragment
    yield from engine.outer.under_way() if engine.outer else ()
    yield from _untrained(engine, writing=True)


def _untrained(engine: Engine, writing: bool) -> Iterator[Fragment]:
    """Yield persistent buffers and frozen parameters."""
    rank = engine.world.rank % engine.world.mesh.in_stage
    main = rank == 0 or not writing
    persistent = engine.module.state_dict(keep_vars=True)
    for name, buffer in engine.module.named_buffers():
        if main and name in persistent:
            yield Fragment(name, tuple(buffer.shape), WEIGHT, 0, buffer.detach().view(-1))
    for param in engine.names:
        if param.requires_grad:
            continue
        if hasattr(param, "ds_tensor"):
            part = param.ds_tensor.numel()
            start = engine.world.shard.rank * part
            size = max(0, min(part, param.ds_numel - start))  # type: ignore[attr-defined]
            held = fragment_of(
                engine, param, WEIGHT, start, param.ds_tensor.detach().view(-1)[:size]
            )
            owned = owned_part(engine, Piece(param, start, 0, size), held) if writing else held
            if size and owned:
                yield owned
        elif not writing or rank < whole_of(param).parts:
            yield fragment_of(engine, param, WEIGHT, 0, param.detach().view(-1))


def scalars(engine: Engine) -> dict[str, Any]:
    """Return the state that isn't a tensor: each group's step count, by its name, an fp16 loss
    scale, and the bounds of invariant sums.

    The count is the base optimizer's own, which may differ from the run's step.
    """
    layout, steps = engine.layout, {}
    for unit in layout.units():
        step = layout.base.state.get(unit.master, {}).get("step")
        if step is not None:
            steps[layout.base.param_groups[unit.group]["name"]] = int(step)
    bounds = {"bounds": engine.grid.bounds(engine.names)} if engine.grid else {}
    return {"optimizer_steps": steps, "loss_scaler": _scaler(layout)} | bounds


def _scaler_object(layout: Layout) -> Any:
    optimizer = layout.optimizer
    return getattr(optimizer, "loss_scale_config", None) or getattr(optimizer, "loss_scaler", None)


_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def _scaler(layout: Layout) -> dict[str, Any]:
    """Return the state of the fp16 loss scale that DeepSpeed adapts; {} in every other engine."""
    scaler = _scaler_object(layout)
    fields = {k: getattr(scaler, k) for k in _SCALER if hasattr(scaler, k)} if scaler else {}
    return fields if _adapts(fields) else {}


def _adapts(scaler: dict[str, Any]) -> bool:
    """True for the state of an fp16 loss scale that is adapted. The constant 1.0 of bf16 and fp32,
    which checkpoints may hold too, and a constant scale of the config have no last overflow."""
    return scaler.get("last_overflow_iter") is not None


@torch.no_grad()
def load_fragments(engine: Engine, reader: Fills, stored: dict[str, Any] | None) -> None:
    """Set this rank's part of weights and buffers; and of moments, if `stored` is given.

    stored: what `scalars` returned. With None the optimizer starts anew, as in a branch that takes
    the weights only.
    """
    layout, has_outer = engine.layout, False
    layout.before_load()
    for unit in layout.units():
        tensors = {WEIGHT: unit.master}
        if stored is not None:
            tensors |= _moments(engine, unit, reader, stored["optimizer_steps"])
            names = [engine.names[piece.param] for piece in unit.pieces[:1]]  # or padding alone
            if engine.outer and any(OUTER_WEIGHT in reader.states(name) for name in names):
                tensors |= engine.outer.states(unit)
                has_outer = True
        for piece in unit.pieces:
            for state, tensor in tensors.items():
                reader.fill(_held(engine, unit, piece, state, tensor))
    for held in _untrained(engine, writing=False):
        reader.fill(held)
    layout.after_load()
    engine.weights_changed()
    if engine.outer:
        engine.outer.load(reader) if has_outer else engine.outer.begin()
    if engine.grid:
        engine.grid.restore(engine.names, (stored or {}).get("bounds", {}))
    # The loss scale goes from fp16 to fp16 alone: in bf16 a large scale would make gradients wrong,
    # in fp16 a scale of 1.0 would make them vanish.
    scaler = stored["loss_scaler"] if stored is not None else {}
    for key in _scaler(layout).keys() & scaler.keys() if _adapts(scaler) else ():
        setattr(_scaler_object(layout), key, scaler[key])


def _moments(engine: Engine, unit: Unit, reader: Fills, steps: dict) -> dict[str, Tensor]:
    """Return the unit's moments by state, for the states that the checkpoint holds; those that the
    engine doesn't have yet are created as zeros."""
    layout = engine.layout
    group = layout.base.param_groups[unit.group]
    names = {engine.names[piece.param] for piece in unit.pieces}
    others = (WEIGHT, OUTER_WEIGHT, OUTER_MOMENTUM, OUTER_DELTA)
    keys = {state for name in names for state in reader.states(name) if state not in others}
    if not keys:
        layout.base.state.pop(unit.master, None)
        return {}
    state = layout.base.state[unit.master]
    for key in keys:
        if key not in state:
            size = layout.momentum_size(unit) if key == MOMENTUM else unit.master.numel()
            shape = unit.master.shape if size == unit.master.numel() else (size,)
            state[key] = torch.zeros(shape, dtype=torch.float32, device=unit.master.device)
    if group["name"] in steps:
        # As torch's fused AdamW keeps it: an fp32 scalar on the parameter's device.
        state["step"] = torch.tensor(float(steps[group["name"]]), device=unit.master.device)
    return {key: state[key] for key in keys}
