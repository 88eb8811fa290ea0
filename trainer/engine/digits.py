"""The sum of fp32 numbers as integers, of fixed size: the losses of a step of many micro-batches.

Invariant: no operation rounds, so that neither the order of the terms nor who adds them counts.
"""

import math

import torch
from torch import Tensor

MOST_SLOTS = 1024  # micro-batches of a step; 8 kB. Beyond it, their losses travel as digits
DIGITS = 10
# Digits to the base 2^28, from the least number of fp32 (2^-149) on beyond its greatest.
_DIGIT, _LOWEST_EXPONENT = 28, -152


class Digits:
    def __init__(self, device: torch.device):
        self._device = device
        self._scales: Tensor | None = None

    def of(self, numbers: Tensor) -> Tensor:
        """Return the digits of the sum of fp32 numbers, (DIGITS,), highest first, fp64, each a sum
        of at most 2^25 digits of 28 bits; not finite, if one of them isn't."""
        if self._scales is None:
            scales = [2.0 ** (_LOWEST_EXPONENT + _DIGIT * i) for i in reversed(range(DIGITS))]
            self._scales = torch.tensor(scales, dtype=torch.float64, device=self._device)
        whole = (numbers.double()[:, None] / self._scales).trunc()
        whole[:, 1:] -= whole[:, :-1] * 2.0**_DIGIT
        return whole.sum(0)


def number_of(digits: list[float]) -> float:
    """Return the number that sums of digits describe, rounded once; not finite, if one of the terms
    wasn't."""
    if not all(map(math.isfinite, digits)):
        return digits[0]
    total = 0
    for digit in digits:
        total = (total << _DIGIT) + int(digit)
    return math.ldexp(total, _LOWEST_EXPONENT)
