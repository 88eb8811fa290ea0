"""The curves of a run: its rows as columns, thinned to what a picture can show.

Invariant: a point stands for consecutive steps that were kept: x is that of the last of them, y
their mean, low and high their extremes. Without thinning each step is a point. Numbers that are not
finite are in no mean; the steps whose loss was not finite are listed.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from forescale.monitor.follow import first_of
from forescale.run.abilities import column_of
from forescale.run.directory import Run
from forescale.run.rows import Row, each_row

Array = NDArray[np.float64]
X = ("step", "tokens", "flops", "time")  # the x axes
_FIELDS = {"loss": "loss", "grad_norm": "grad_norm", "tokens_per_second": "tokens_per_second"}
_FIELDS |= {"mfu": "mfu", "memory": "memory_bytes"}
LAYERS = "layer_norms"
_RATE, _EXTRA, _BAND = "learning_rate.", "extra.", "band."


@dataclass(frozen=True)
class Line:
    """A curve. x: by X, each (n,); y, low, high: (n,), NaN where nothing is known. low and high are
    None if each point is one step."""

    x: dict[str, Array]
    y: Array
    low: Array | None = None
    high: Array | None = None


@dataclass
class Curves:
    """The curves of a run. lines: by name, such as "loss" or "learning_rate.muon"; scores: for each
    held-out dataset its losses, bits per byte and abilities, and for each layer its LAYERS; band:
    that of the loss by its forecast, if it has one; dropped: losses of steps that a rollback or
    restart discarded; broken: steps whose loss was not finite; per_point: steps of a
    point."""

    lines: dict[str, Line] = field(default_factory=dict)
    scores: dict[str, dict[str, Line]] = field(default_factory=dict)
    band: Line | None = None
    dropped: list[Line] = field(default_factory=list)
    broken: list[int] = field(default_factory=list)
    per_point: int = 1
    steps: Array = field(default_factory=lambda: np.zeros(0))
    places: dict[str, Array] = field(default_factory=dict)

    def at(self, step: float) -> dict[str, float]:
        """Return the place of a step on each x axis; between steps by a straight line."""
        if not len(self.steps):
            return {"step": step}
        place = {name: float(np.interp(step, self.steps, x)) for name, x in self.places.items()}
        return {**place, "step": float(step)}


class _Columns:
    """Numbers of train rows by column. A row without a number of a column has NaN there."""

    def __init__(self) -> None:
        self.count, self.seconds = 0, 0.0
        self._all: dict[str, array[float]] = {}

    def add(self, row: Row) -> None:
        self.seconds += sum(row.get("seconds", {}).values())
        numbers = {"step": row["step"], "tokens": row.get("tokens"), "time": self.seconds}
        numbers["flops"] = row.get("flops_causal")
        numbers |= {name: row.get(of) for name, of in _FIELDS.items()}
        numbers |= {_RATE + name: x for name, x in row.get("learning_rate", {}).items()}
        numbers |= {name: x for name, x in row.items() if name.startswith(_EXTRA)}
        numbers |= {_BAND + name: x for name, x in row.get("band", {}).items()}
        for name, value in numbers.items():
            if name not in self._all:
                self._all[name] = array("d", [np.nan]) * self.count
            self._all[name].append(np.nan if value is None else value)
        self.count += 1
        for column in self._all.values():
            if len(column) < self.count:
                column.append(np.nan)

    def arrays(self) -> dict[str, Array]:
        return {name: np.frombuffer(x, dtype=np.float64) for name, x in self._all.items()}


def read_curves(run: Run, most: int = 3000) -> Curves:
    """Return the curves of a run, of at most `most` points each. Raises UserError for a damaged
    row."""
    columns, scores = _Columns(), dict[tuple[str, int], Row]()
    layers: dict[int, dict[str, float]] = {}
    for row, _ in each_row(run.metrics):
        if row.get("kind") == "train":
            columns.add(row)
            if LAYERS in row:
                layers[row["step"]] = row[LAYERS]
        elif row.get("kind") == "validation":
            scores[row.get("dataset", "validation"), row["step"]] = row
    arrays = columns.arrays()
    curves = Curves()
    if not columns.count:
        return curves
    curves.steps, curves.places = arrays["step"], {name: arrays[name] for name in X}
    curves.per_point = -(-columns.count // most)
    curves.broken = [int(step) for step in arrays["step"][~np.isfinite(arrays["loss"])]]
    for name, values in arrays.items():
        if name not in X and np.isfinite(values).any():
            curves.lines[name] = _thinned(curves.places, values, curves.per_point)
    sides = [curves.lines.pop(_BAND + side, None) for side in ("center", "low", "high")]
    if (center := sides[0]) and sides[1] and sides[2]:
        curves.band = Line(center.x, center.y, sides[1].y, sides[2].y)
    curves.scores = _scores(scores, curves)
    for name, line in _layers(layers, curves).items():
        curves.scores.setdefault(name, {})[LAYERS] = line
    curves.dropped = [*_dropped(run, curves, most)]
    return curves


def _thinned(places: dict[str, Array], values: Array, per: int) -> Line:
    """Return a line of which each point stands for `per` values."""
    if per == 1:
        return Line(places, np.where(np.isfinite(values), values, np.nan))
    starts = np.arange(0, len(values), per)
    last = np.append(starts[1:], len(values)) - 1
    known = np.isfinite(values)
    count = np.add.reduceat(known.astype(float), starts)
    with np.errstate(invalid="ignore", divide="ignore"):
        mean = np.add.reduceat(np.where(known, values, 0.0), starts) / count
    low = np.fmin.reduceat(np.where(known, values, np.nan), starts)
    high = np.fmax.reduceat(np.where(known, values, np.nan), starts)
    return Line({name: x[last] for name, x in places.items()}, mean, low, high)


def _scores(rows: dict[tuple[str, int], Row], curves: Curves) -> dict[str, dict[str, Line]]:
    """Return a line for each number of each held-out dataset."""
    lines: dict[str, dict[str, Line]] = {}
    for dataset in dict.fromkeys(name for name, _ in rows):
        scores = [row for (name, _), row in sorted(rows.items()) if name == dataset]
        at = [curves.at(row["step"]) for row in scores]
        x = {name: np.array([place.get(name, np.nan) for place in at]) for name in X}
        measured = dict.fromkeys(key for row in scores for key in row)
        abilities = (k for k in measured if (c := column_of(k)) and c.kind in ("share", "nats"))
        for key in ("loss", "bits_per_byte", *abilities):
            y = np.array([row.get(key, np.nan) for row in scores], dtype=float)
            y[~np.isfinite(y)] = np.nan
            if np.isfinite(y).any():
                lines.setdefault(dataset, {})[key] = Line(x, y)
    return lines


def _layers(norms: dict[int, dict[str, float]], curves: Curves) -> dict[str, Line]:
    """Return the line of each layer; norms: of the layers, by step."""
    at = [curves.at(step) for step in norms]
    x = {name: np.array([place.get(name, np.nan) for place in at]) for name in X}
    names = dict.fromkeys(name for of in norms.values() for name in of)
    ys = {name: np.array([of.get(name, np.nan) for of in norms.values()]) for name in names}
    return {name: Line(x, y) for name, y in ys.items()}


def _dropped(run: Run, curves: Curves, most: int) -> Iterable[Line]:
    """Yield the losses of an attempt's steps beyond the first step of a later attempt."""
    begun = [a for a in run.attempts() if a.has_begun]
    for attempt, _ in pairwise(begun):
        parents = (a.parent for a in begun if a.number > attempt.number)
        first = min(parent.step if parent else 0 for parent in parents)
        path = attempt.metrics.path
        if not path.exists():
            continue
        columns = _Columns()
        for row, _ in each_row(path, first_of(path, attempt.number)):
            if row.get("kind") == "train" and row["step"] > first:
                columns.add(row)
        if not columns.count:
            continue
        arrays = columns.arrays()
        places = {name: arrays[name] for name in X}
        places["time"] = places["time"] + curves.at(first)["time"]
        yield _thinned(places, arrays["loss"], -(-columns.count // most))
