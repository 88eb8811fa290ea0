"""The axes of the static picture: their ends, ticks and texts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forescale.monitor.report.curves import Line

_EARLY = 0.03  # of the x axis: what is higher there may lie above the axis of losses
_DENSE = 60  # points of a line from which on that holds
_TITLES = {"step": "step", "tokens": "tokens", "flops": "compute (FLOPs)"}
_UNITS = ((1.0, "seconds", 180.0), (60.0, "minutes", 10_800.0), (3600.0, "hours", 259_200.0),
          (86_400.0, "days", math.inf))  # fmt: skip
_LARGE = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))
_SUPER = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Axis:
    """A linear axis. size: what its numbers are divided by for people, such as 60 for minutes;
    powers: numbers are written as 2×10¹⁵."""

    low: float
    high: float
    ticks: tuple[float, ...]
    title: str
    size: float = 1.0
    powers: bool = False


def axis_of(x: str, high: float, about: float) -> Axis:
    """Return the x axis from 0 to `high`, with about so many ticks."""
    high = high or 1.0
    if x == "time":
        size, unit, _ = next(found for found in _UNITS if high < found[2])
        title = f"training time ({unit}, kept steps)"
        at = tuple(tick * size for tick in ticks(0.0, high / size, about))
        return Axis(0.0, high, at, title, size)
    return Axis(0.0, high, ticks(0.0, high, about), _TITLES[x], powers=x == "flops")


def loss_axis(lines: Sequence[Line], x: str) -> Axis:
    """Return the axis of losses. The first steps of long lines may lie above it, and one point of
    500 anywhere."""
    values = [np.zeros(0)]
    for line in lines:
        known = np.isfinite(line.y)
        if known.sum() > _DENSE:
            known &= line.x[x] >= _EARLY * np.nanmax(line.x[x])
        values.append(line.y[known])
    seen = np.concatenate(values)
    low, high = (float(seen.min()), float(np.quantile(seen, 0.998))) if len(seen) else (0.0, 1.0)
    room = max(0.07 * (high - low), 1e-3 * abs(high), 1e-9)
    low, high = low - room, high + room
    return Axis(low, high, ticks(low, high, 6), "loss (nats a token)")


def ticks(low: float, high: float, about: float) -> tuple[float, ...]:
    """Return round numbers from `low` to `high`, about so many."""
    raw = (high - low) / max(1.0, about)
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m for m in (1, 2, 5, 10) if m * size >= raw * 0.75) * size
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return tuple(float(f"{i * step:.12g}") for i in range(first, last + 1))


def texts(axis: Axis) -> list[str]:
    """Return the text of each tick."""
    return [_text(value / axis.size, axis.powers) for value in axis.ticks]


def _text(value: float, powers: bool) -> str:
    if value == 0:
        return "0"
    if powers or abs(value) >= 1e15:
        mantissa, power = f"{value:.2e}".split("e")
        mantissa = mantissa.rstrip("0").rstrip(".")
        return f"{'' if mantissa == '1' else mantissa + '×'}10{str(int(power)).translate(_SUPER)}"
    for size, letter in _LARGE:
        if abs(value) >= size * (1 - 1e-9) and abs(value) >= 1e4 * (1 - 1e-9):
            return f"{value / size:.4g}{letter}"
    return f"{value:.6g}" if abs(value) < 1e4 else f"{value:,.0f}"
