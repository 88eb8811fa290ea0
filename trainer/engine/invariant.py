"""Sums of gradients, norms and losses whose bits depend neither on the number of ranks nor on the
order of additions: `train.invariant`.

Invariant: no addition rounds. The gradient that a micro-batch has of a parameter is rounded once,
to whole multiples of a unit: a power of two, so large that M micro-batches add up to 2^24 units at
most. fp32 holds every partial sum of such numbers exactly, in any order, and so does each
collective. A unit follows from the largest elements of the gradients of the last steps, which all
ranks know alike. A step whose gradients are too large for their units is computed again.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from forescale.engine.digits import MOST_SLOTS, Digits, number_of
from forescale.engine.ranks import Ranks

_BITS = 24  # of the significand of fp32
_ROOM = 2  # powers of two by which the largest element may grow from one step to the next
_LEAST = -100  # exponent of the bound of a gradient that is 0: its units are normal numbers
_CHUNK = 1 << 24  # elements whose squares are added at once


@dataclass(frozen=True)
class Sums:
    """Of a step, over all ranks. losses: of each micro-batch, in their order, or of many their sum;
    norm: of the gradient; fits: False if the gradient was too large for its units, and has no norm.
    """

    losses: list[float]
    norm: float
    fits: bool


class Grid:
    """The units of a model's parameters.

    exponents: no element of a gradient of parameter i is larger than its bound, 2^exponents[i],
    which is 4 to 8 times the largest element of the last step, or half of the last bound. A unit is
    2^(ceil(log2 M) - 24) bounds, for M micro-batches; each rounding is by half a unit at most.
    """

    def __init__(self, params: Iterable[nn.Parameter], device: torch.device):
        self.params = [p for p in params if p.requires_grad]
        self.exponents = [_LEAST] * len(self.params)
        self._largest = torch.zeros(len(self.params), device=device)
        self._index = {p: i for i, p in enumerate(self.params)}
        self._coarser = 0
        self._digits = Digits(device)
        for i, p in enumerate(self.params):
            p.register_hook(partial(self._rounded, i))

    def begin(self, micro_batches: int) -> None:
        """Begin the backward passes of a step of so many micro-batches, over all ranks."""
        self._coarser = (micro_batches - 1).bit_length() - _BITS
        self._largest.zero_()

    def _unit(self, i: int) -> float:
        return 2.0 ** (self.exponents[i] + self._coarser)

    def _rounded(self, i: int, gradient: Tensor) -> Tensor:
        """Return the gradient of parameter i of a micro-batch in whole units."""
        largest, unit = self._largest[i], self._unit(i)
        most = torch.linalg.vector_norm(gradient, math.inf)
        torch.maximum(largest, most.float(), out=largest)
        # Only round() rounds, also in bf16: products with powers of two are exact. Where it makes
        # -0, the sum is +0: else the sign of a sum of zeros would depend on their number.
        return (gradient / unit).round_().mul_(unit).add_(0.0)

    def sums(
        self,
        parts: Iterable[tuple[nn.Parameter, Tensor]],
        losses: Tensor,
        slots: slice,
        count: int,
        ranks: Ranks,
    ) -> Sums:
        """Return what `ranks` know of a step together. parts: of the summed gradient, of which no
        other rank counts an element. losses: of this rank's micro-batches, fp32, which stand at
        `slots` of `count`; 0 where another rank has the same."""
        # Some libraries lose a NaN in a maximum.
        squares, largest = self._squares(parts), self._largest.nan_to_num_(math.inf, math.inf)
        # Integers add exactly. A slot has one term that isn't 0, and is an integer by its bits.
        if as_digits := count > MOST_SLOTS:
            digits = self._digits.of(losses)
            of_losses = torch.cat([digits.nan_to_num(0.0, 0.0, 0.0), digits[:1].isfinite()]).long()
        else:
            of_losses = torch.zeros(count, dtype=torch.float64, device=losses.device)
            of_losses[slots] = losses.double()
            of_losses = of_losses.view(torch.int64)
        packed = torch.cat([squares.flatten(), of_losses])
        ranks.sum(packed)
        if ranks.size > 1:
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=ranks.group)
        host = torch.cat([packed, largest.double().view(torch.int64)]).cpu()  # waits once
        squares, of_losses, maxima = host.split([squares.numel(), len(of_losses), len(largest)])
        maxima = maxima.view(torch.float64).tolist()
        if as_digits:
            *digits, finite = of_losses.tolist()
            of_each = [number_of(digits) if finite == ranks.size else math.nan]
        else:
            of_each = of_losses.view(torch.float64).tolist()
        if not all(map(math.isfinite, maxima)):
            return Sums(of_each, math.inf, True)
        fits = all(m <= 2.0**e for m, e in zip(maxima, self.exponents, strict=True))
        norm = self._norm(squares.view(-1, 2).tolist()) if fits else math.inf
        self._follow(maxima)
        return Sums(of_each, norm, fits)

    def _follow(self, maxima: list[float]) -> None:
        """Set the bounds for the next backward passes from the largest elements of these."""
        for i, largest in enumerate(maxima):
            exponent = math.frexp(largest)[1] + _ROOM if largest else _LEAST
            self.exponents[i] = max(exponent, self.exponents[i] - 1, _LEAST)

    def bounds(self, names: Mapping[nn.Parameter, str]) -> dict[str, int]:
        """Return the exponents by the parameters' names."""
        return {names[p]: e for p, e in zip(self.params, self.exponents, strict=True)}

    def restore(self, names: Mapping[nn.Parameter, str], bounds: Mapping[str, int]) -> None:
        """Set the exponents to what `bounds` returned; without them the next step is computed
        twice."""
        self.exponents = [bounds.get(names[p], _LEAST) for p in self.params]

    def _squares(self, parts: Iterable[tuple[nn.Parameter, Tensor]]) -> Tensor:
        """Return the sum of squares of each parameter's parts, in squared units, (n, 2), int64:
        as multiples of 2^24, and what is left."""
        device = self._largest.device
        sums = torch.zeros(len(self.params), 2, dtype=torch.int64, device=device)
        for param, gradient in parts:
            i = self._index[param]
            for chunk in gradient.reshape(-1).split(_CHUNK):
                square = chunk.double().div_(self._unit(i)).square_()  # at most 2^48: exact
                high = (square * 2.0**-_BITS).floor_()
                low = square.sub_(high, alpha=2.0**_BITS)
                sums[i] += torch.stack([high.sum(), low.sum()]).long().to(device)
        return sums

    def _norm(self, squares: list[list[int]]) -> float:
        """Return the square root of the exact sum, rounded."""
        exponents = [2 * (e + self._coarser) for e in self.exponents]
        least = min(exponents)
        total = sum(
            ((high << _BITS) + low) << (exponent - least)
            for (high, low), exponent in zip(squares, exponents, strict=True)
        )
        digits = (total.bit_length() - 128) // 2  # so that the integer's root has 64 bits
        scaled = total >> 2 * digits if digits > 0 else total << -2 * digits
        return math.ldexp(math.isqrt(scaled), digits + least // 2)
