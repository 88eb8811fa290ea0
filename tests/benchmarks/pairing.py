"""Two things measured side by side: A B A B ..., the ratio of each pair, its median and spread.

Invariant: a ratio is of two neighbours in time on one machine in one run, so whatever else the
machine does meets both. Absolute numbers are told beside it, and prove nothing elsewhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any


@dataclass
class Result:
    """Rows of one value a label; with two labels (A, B) the ratio A / B is what counts.

    asked: what the ratio ought to be, as text; facts: whatever else was learned on the way.
    """

    name: str
    unit: str
    labels: tuple[str, ...]
    rows: Sequence[tuple[float, ...]]
    asked: str = ""
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
        if self.asked:
            values.append(f"asked {self.asked}")
        lines = [f"{self.name}: " + "; ".join(values)]
        return "\n".join(lines + [f"    {k}: {_spoken(v)}" for k, v in self.facts.items()])


def _spoken(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_spoken(v)}" for k, v in value.items())
    return f"{value:,.4g}" if isinstance(value, float) else str(value)


def spread(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def interleaved(
    rounds: int, a: Callable[[], float], b: Callable[[], float], after_warm_up=lambda: None
) -> list[tuple[float, float]]:
    """What `a` and `b` return, called in turns; the first turn of each warms up and isn't kept."""
    a(), b()
    after_warm_up()
    return [(a(), b()) for _ in range(rounds)]
