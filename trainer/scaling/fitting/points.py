"""The data of a fit: columns with one number per run, all counted by one convention.

Invariant: every value is finite and positive, so that its logarithm exists; no run is dropped here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forescale.ground.errors import UserError

ONCE = 1.01  # D over U, up to which D is rounded rather than repeated
_FEWEST = 3  # runs of a budget that are always kept: fewer don't determine a parabola
Array = NDArray[Any]  # float64, except masks and indices


@dataclass(frozen=True)
class Points:
    """The columns of n runs, (n,) each.

    loss: held-out, in nats per token or another unit that all share; parameters: N; tokens: D, seen
    in training; flops: C of training; unique_tokens: U, in the data that D was drawn from;
    expansion and so on: see SETTINGS;
    convention: how N, D, C and the loss are counted, one string or one per run; where: names the
    data in messages. Raises UserError for values without a logarithm, for columns of different
    lengths and for runs of different conventions.
    """

    loss: Array
    parameters: Array | None = None
    tokens: Array | None = None
    flops: Array | None = None
    unique_tokens: Array | None = None
    expansion: Array | None = None
    bits: Array | None = None
    weight_bits: Array | None = None
    activation_bits: Array | None = None
    cache_bits: Array | None = None
    post_bits: Array | None = None
    vocabulary: Array | None = None
    convention: str | Sequence[str] = ""
    where: str = "points"

    def __post_init__(self) -> None:
        for name in COLUMNS:
            if (column := getattr(self, name)) is not None:
                object.__setattr__(self, name, self._checked(name, column))
        if not isinstance(self.convention, str):
            kinds = sorted(set(self.convention))
            if len(kinds) > 1:
                counts = ", ".join(f"{list(self.convention).count(c)} by '{c}'" for c in kinds)
                problem = f"the runs have different conventions ({counts})"
                raise UserError(self.where, problem, "count N, D, C and loss alike for all runs")
            object.__setattr__(self, "convention", kinds[0] if kinds else "")

    def _checked(self, name: str, column: ArrayLike) -> Array:
        values = np.array(column, dtype=float)
        where = f"{self.where}: {name}"
        if values.ndim != 1 or values.shape != np.shape(self.loss):
            problem = (
                f"the shape is {values.shape}, but that of the losses is {np.shape(self.loss)}"
            )
            raise UserError(where, problem, "give one number per run")
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if bad.size:
            others = f" and {bad.size - 1} more" if bad.size > 1 else ""
            problem = f"{values[bad[0]]} of run {bad[0]}{others} is not a finite positive number"
            raise UserError(where, problem, "leave such runs out")
        values.flags.writeable = False
        return values

    def __len__(self) -> int:
        """Return the number of runs."""
        return len(self.loss)

    def log(self, column: str) -> Array:
        """Return the logarithms of a column, (n,). Raises UserError if there is no such column."""
        values = getattr(self, column)
        if values is None:
            problem, todo = f"there is no column '{column}' of all runs", "give it for every run"
            raise UserError(self.where, problem, todo)
        return np.log(values)

    @property
    def per_token(self) -> float:
        """Return the mean FLOPs per parameter and token: 6 if one of the three is not known."""
        if self.flops is None or self.parameters is None or self.tokens is None:
            return 6.0
        c, n, d = (self.log(name) for name in ("flops", "parameters", "tokens"))
        return float(np.exp(np.mean(c - n - d)))

    @property
    def varied(self) -> dict[str, Array]:
        """Return the settings in which the runs differ, (n,) each."""
        known = {c: x for c in SETTINGS if (x := getattr(self, c)) is not None}
        return {c: x for c, x in known.items() if np.ptp(x) > 0}

    def columns(self, names: Sequence[str] | None = None) -> dict[str, Array]:
        """Return what a law reads of the runs, (n,) each: all columns but the loss, or these."""
        present = [c for c in COLUMNS[1:] if getattr(self, c) is not None]
        return {c: np.exp(self.log(c)) for c in (present if names is None else names)}

    def take(self, which: Any) -> "Points":
        """Return the runs of an index or a mask."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        return Points(**columns | {k: columns[k][which] for k in COLUMNS if columns[k] is not None})


def spent(points: Points) -> Array:
    """Return C of each run, (n,): as counted, or 6 N D if the points have no FLOPs."""
    if points.flops is not None:
        return points.flops
    return 6 * np.exp(points.log("parameters") + points.log("tokens"))


def repeats(points: Points) -> Array:
    """Return the mask of the runs that repeat their data, (n,); none if U is not known."""
    if points.unique_tokens is None or points.tokens is None:
        return np.zeros(len(points), dtype=bool)
    return points.tokens > ONCE * points.unique_tokens


def near_best(loss: Array, budgets: Array, near: float | None) -> Array:
    """Return the mask of the runs near the optimum of their budget, (n,). These are the runs whose
    loss is at most 1 + `near` times the least of their budget, and the best three of each budget at
    any distance: of small models 4 % may leave only one. If `near` is None, all runs are kept."""
    mask = np.ones(len(loss), dtype=bool)
    if near is None:
        return mask
    for b in np.unique(budgets):
        rows = np.flatnonzero(budgets == b)
        mask[rows] = loss[rows] <= loss[rows].min() * (1 + near)
        mask[rows[np.argsort(loss[rows], kind="stable")[:_FEWEST]]] = True
    return mask


# What a run has beside N, D and C, and the law that reads it.
SETTINGS = {
    "expansion": ("experts over those that a token uses", "experts size=active"),
    "bits": ("bits of weights, activations and cache in training", "precision"),
    "weight_bits": ("bits of weights in training", "precision"),
    "activation_bits": ("bits of activations in training", "precision"),
    "cache_bits": ("bits of the cache of keys and values in training", "precision"),
    "post_bits": ("bits of weights that were quantised after training", "quantised"),
    "vocabulary": ("parameters of the vocabulary, N_v", "vocabulary"),
}
COLUMNS = ("loss", "parameters", "tokens", "flops", "unique_tokens", *SETTINGS)
