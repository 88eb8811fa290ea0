"""Two things measured side by side: A B A B ..., the ratio of each pair, its median and spread.

Invariant: a ratio is of two neighbours in time on one machine in one run, so whatever else the
machine does meets both. Absolute numbers are told beside it, and prove nothing elsewhere.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class Result:
    """Rows of one value a label; with two labels (A, B) the ratio A / B is what counts.

    asked: what the ratio ought to be, as text; facts: whatever else was learned on the way.
    """

    name: str
    unit: str
    labels: tuple[str, ...]
    rows: Sequence[tuple[float, ...]]
    goal: str = ""
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ratios(self) -> list[float]:
        return [row[0] / row[1] for row in self.rows] if len(self.labels) == 2 else []

    def as_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "medians": [median(column) for column in zip(*self.rows, strict=True)],
            "ratio": spread(self.ratios) if self.ratios else None,
        }

    def __str__(self) -> str:
        columns = list(zip(*self.rows, strict=True))
        values = [
            f"{label} {median(column):,.4g} {self.unit}"
            for label, column in zip(self.labels, columns, strict=True)
        ]
        if self.ratios:
            s = spread(self.ratios)
            values.insert(0, f"{s['median']:.3f} ({s['min']:.3f}–{s['max']:.3f}, {len(self.rows)})")
        else:
            values.append(f"({min(columns[0]):.4g}–{max(columns[0]):.4g}, {len(self.rows)})")
        if self.goal:
            values.append(f"asked {self.goal}")
        lines = [f"{self.name}: " + "; ".join(values)]
        return "\n".join(lines + [f"    {k}: {_spoken(v)}" for k, v in self.facts.items()])


def _spoken(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_spoken(v)}" for k, v in value.items())
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def interleaved(
    rounds: int, a: Callable[[], T], b: Callable[[], T], after_warm_up=lambda: None
) -> list[tuple[T, T]]:
    """What `a` and `b` return, called in turns; the first turn of each warms up and isn't kept."""
    a(), b()
    after_warm_up()
    return [(a(), b()) for _ in range(rounds)]


class Clocks:
    """The wall's clock and this process's processor time, both since the last `rates`."""

    def __init__(self) -> None:
        self._began = self._read()

    @staticmethod
    def _read() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    def begin(self) -> None:
        """Count from now on."""
        self._began = self._read()

    def rates(self, amount: float) -> tuple[float, float]:
        """Return `amount` by a second of each clock, and count from now on."""
        before, self._began = self._began, self._read()
        wall, processor = (now - then for now, then in zip(self._began, before, strict=True))
        return amount / wall, amount / processor


Rates = tuple[float, float]  # of Clocks


def by_both_clocks(
    name: str, labels: tuple[str, str], rows: Sequence[tuple[Rates, Rates]], goal: str = ""
) -> list[Result]:
    """Return tokens/s, and tokens per second of processor time: what others do on the machine
    counts in the first alone, and so does waiting."""
    walls, processors = ([(a[i], b[i]) for a, b in rows] for i in (0, 1))
    return [
        Result(name, "tokens/s", labels, walls, goal),
        Result(f"{name}, by processor time", "tokens/s", labels, processors, goal),
    ]
