"""Deep models by two shallow ones: what a rank does for each further layer is always the same.

Invariant: a model that is not a repetition of the same layers is rehearsed whole.
"""

from dataclasses import asdict, replace
from typing import Any, cast

from forescale.models.config import ModelConfig
from forescale.models.flops import layers_of
from forescale.plan.bytes.memory import gathers_of
from forescale.rehearsal.config import RehearseJob

_MOST = 80.0  # layers on few ranks: some two minutes of a processor
_SAME_MOST = 0.01  # of the weights that are whole at once: a gather ahead differs a little
_SLOW_RANKS = 64  # as many ranks again take as long as the layer itself


def shallow_depths(job: RehearseJob) -> tuple[int, int] | None:
    """Return two numbers of layers to rehearse in place of all; None: rehearse them all."""
    model = job.model
    if not isinstance(model, ModelConfig) or model.has_encoder or job.rehearse.layers == "all":
        return None
    if job.engine.pipeline_parallel > 1:  # a rank has few of them, which balance the head
        return None
    layers = model.num_layers or 0
    if layers * (1 + job.world_size / _SLOW_RANKS) <= _MOST:
        return None
    kinds = [(*map(id, parts.values()),) for parts in layers_of(model)]
    for period in range(1, layers // 2):
        # A model may begin with other layers than those that it repeats.
        odd = next(
            (i for i in range(layers - period, 0, -1) if kinds[i - 1] != kinds[i - 1 + period]), 0
        )
        least, step = odd + period * max(1, -(-2 // period)), period * max(1, 2 // period)
        for few in range(least, layers - 2 * period, period):
            if (layers - few) % period == 0 and _repeats(job, few, few + step, layers):
                return few, few + step
    return None


def _repeats(job: RehearseJob, few: int, many: int, layers: int) -> bool:
    """Whether further layers gather as much as these do: at stage 3 the weights of a few layers
    may stay whole until the backward pass, those of many do not."""
    if job.engine.stage < 3:
        return True
    first, second, whole = (
        gathers_of(with_layers(job, depth), job.world_size) for depth in (few, many, layers)
    )
    expected = extended(asdict(first), asdict(second), (layers - many) / (many - few))
    gathered = all(expected[name] == getattr(whole, name) for name in ("first", "again"))
    return gathered and abs(expected["most"] / whole.most - 1) < _SAME_MOST


def with_layers(job: RehearseJob, layers: int) -> RehearseJob:
    """Return the job with so many layers."""
    return replace(job, model=replace(cast(ModelConfig, job.model), num_layers=layers))


def extended(few: Any, many: Any, times: float) -> Any:
    """Return the report of a deep model from those of two shallow ones. times: how often their
    difference comes on top of the second."""
    if isinstance(many, bool) or not isinstance(many, int | float | dict | list):
        return many
    if isinstance(many, dict):
        return {
            key: value if key in _SAME else extended(few.get(key, value), value, times)
            for key, value in many.items()
        }
    if isinstance(many, list):
        before = {_name(each): each for each in few}
        return [extended(before.get(_name(each), each), each, times) for each in many]
    value = many + (many - few) * times
    return round(value) if isinstance(many, int) else value


_SAME = {"rank", "graphs", "largest", "ranks", "shared", "registers", "stack"}


def _name(each: Any) -> Any:
    """Return what an entry of a list has in common with that of another depth."""
    if not isinstance(each, dict):
        return each
    return tuple(each.get(key) for key in ("name", "phase", "kind", "place", "ranks"))
