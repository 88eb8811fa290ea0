"""Integers that training forward passes count, for metrics and for what follows an update.

The engine zeroes the counts before a step, adds them up over ranks, and says when the update is
made (the protocol of trainer/train/model.py). Invariant: counts are integers, so sums don't depend
on ranks, micro-batches or their order.
"""

from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from forescale.models.config import ModelConfig
from forescale.models.flops import layers_of

UNIT = 1e-6  # nats: those are counted in whole units, whose sum has no rounding


class Tallies(nn.Module):
    """The counts of each part of a model, int64, by the part's name. shapes: of each part's.

    All lie in one tensor, `counts`, so that the engine sums them in one all-reduce.
    """

    counts: Tensor

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        super().__init__()
        self._places: dict[str, tuple[slice, tuple[int, ...]]] = {}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + prod(shape)
            self._places[name] = (slice(start, end), shape)
        self.register_buffer("counts", torch.zeros(end, dtype=torch.int64), persistent=False)
        self.totals: Tensor | None = None  # of the whole step over all ranks, once known

    def of(self, name: str) -> Tensor:
        """Return the counts of a part since the last step; adding to them in place counts."""
        place, shape = self._places[name]
        return self.counts[place].view(shape)

    def total(self, name: str) -> Tensor | None:
        """Return a part's counts of the whole step; None before a step, or if it doesn't count."""
        if self.totals is None or name not in self._places:
            return None
        place, shape = self._places[name]
        return self.totals[place].view(shape)


def tallies_of(config: ModelConfig) -> Tallies | None:
    """Return what a model counts: pairs of each expert, dropped ones and the entropy of each router
    ("experts"), nats and targets of each module for later tokens ("mtp"); None: nothing."""
    is_routed = [parts.mlp.is_routed for parts in layers_of(config)]
    shapes: dict[str, tuple[int, ...]] = {}
    routed = sum(is_routed) + is_routed[-1] * config.mtp_layers
    if config.experts is not None:
        shapes["experts"] = (routed, config.experts.experts + 2)
    if config.mtp_layers:
        shapes["mtp"] = (config.mtp_layers, 2)
    return Tallies(shapes) if shapes else None
