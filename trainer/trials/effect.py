"""What a gain is worth: the factor by which the base would need more compute, seconds or memory.

    compute   exp(gain / slope): how much longer the base would train for the loss of the change;
              slope: of log loss over log compute, from the base and the base at half its compute
    seconds   that factor, times the seconds of a base run over those of a change run
    memory    the memory of a base run over that of a change run

Invariant: from the pairs in the log and the runs of the base alone. The factor of compute is that
of longer training at the base's size, not of a larger model. Its interval holds the ends of the
gain's confidence sequence and of the slope's t interval together, so it is wider than its level.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from forescale.trials.verdict import LEVEL, Verdict

_MOST = 1e3  # a factor beyond it is told as infinite: the base's curve is too flat


@dataclass(frozen=True)
class Factor:
    """A factor with its interval; above 1 the change needs less."""

    value: float
    ends: tuple[float, float]

    def __str__(self) -> str:
        return f"{self.value:.3g} ({LEVEL:.0%}: {self.ends[0]:.3g} to {self.ends[1]:.3g})"


def slope_of(full: Sequence[float], half: Sequence[float]) -> tuple[float, float]:
    """Return by how much log loss falls as log compute rises, and its half interval. full, half:
    losses of the base at its compute and at half of it, two or more each."""
    a, b = np.log(full), np.log(half)
    variance = ((len(a) - 1) * a.var(ddof=1) + (len(b) - 1) * b.var(ddof=1)) / (len(a) + len(b) - 2)
    error = math.sqrt(variance * (1 / len(a) + 1 / len(b))) / math.log(2)
    wide = float(student.ppf((1 + LEVEL) / 2, len(a) + len(b) - 2)) * error
    return float(b.mean() - a.mean()) / math.log(2), wide


def compute_factor(v: Verdict, slope: tuple[float, float]) -> Factor | None:
    """Return the factor of compute; None where the base's loss doesn't fall with compute."""
    middle, wide = slope
    if middle <= 0:
        return None
    steep, flat = middle + wide, middle - wide
    low, high = v.ends

    def factor(gain: float, by: float) -> float:
        power = gain / by if by > 0 else math.copysign(math.inf, gain)
        value = math.exp(min(power, math.log(_MOST) + 1))
        return value if value < _MOST else math.inf

    ends = factor(low, steep if low > 0 else flat), factor(high, flat if high > 0 else steep)
    return Factor(factor(v.gain, middle), ends)


def ratio(pairs: Sequence[dict[str, Any]], name: str) -> Factor | None:
    """Return base over change of a fact of their runs, by the t interval of its log over pairs;
    None without two pairs that have it."""
    logs = [
        math.log(pair["base"][name] / pair["change"][name])
        for pair in pairs
        if pair["base"].get(name) and pair["change"].get(name)
    ]
    if len(logs) < 2:
        return None
    wide = float(student.ppf((1 + LEVEL) / 2, len(logs) - 1)) * np.std(logs, ddof=1)
    middle, half = float(np.mean(logs)), float(wide) / math.sqrt(len(logs))
    return Factor(math.exp(middle), (math.exp(middle - half), math.exp(middle + half)))


def product(a: Factor, b: Factor) -> Factor:
    """Return the product of two factors, with the widest ends."""
    return Factor(a.value * b.value, (a.ends[0] * b.ends[0], a.ends[1] * b.ends[1]))
