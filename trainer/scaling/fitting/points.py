"""What a fit reads: one number a run and a column, each column a convention that all runs share.

Invariant: every value is finite and positive, so that its logarithm exists; no run is dropped here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from forescale.errors import UserError

_FEWEST = 3  # runs of a budget that a law is fitted to: fewer tell no bend
Array = NDArray[Any]  # of float64, but for masks and indices


@dataclass(frozen=True)
class Points:
    """n runs. loss: held-out, nats a token or whatever unit all share; parameters: N; tokens: D,
    seen; flops: C of training; unique_tokens: U, of the data that D was drawn from. convention: how
    N, D, C and the loss are counted, one word for all or one a run. where: names the data in
    messages. Raises UserError for values that have no logarithm, for columns of other lengths and
    for runs that count by different conventions."""

    loss: Array
    parameters: Array | None = None
    tokens: Array | None = None
    flops: Array | None = None
    unique_tokens: Array | None = None
    convention: str | Sequence[str] = ""
    where: str = "points"

    def __post_init__(self) -> None:
        for name in COLUMNS:
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, self._checked(name, given))
        if not isinstance(self.convention, str):
            found = sorted(set(self.convention))
            if len(found) > 1:
                counts = ", ".join(f"{list(self.convention).count(c)} by '{c}'" for c in found)
                what = f"the runs count by different conventions ({counts})"
                raise UserError(self.where, what, "give every run the same N, D, C and loss")
            object.__setattr__(self, "convention", found[0] if found else "")

    def _checked(self, name: str, given: ArrayLike) -> Array:
        values = np.array(given, dtype=float)
        where = f"{self.where}: {name}"
        if values.ndim != 1 or values.shape != np.shape(self.loss):
            what = f"its shape is {values.shape}, that of the losses {np.shape(self.loss)}"
            raise UserError(where, what, "give one number a run")
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if bad.size:
            more = f" and {bad.size - 1} more" if bad.size > 1 else ""
            what = f"{values[bad[0]]} of run {bad[0]}{more}"
            raise UserError(where, f"{what}, which has no logarithm", "leave such runs out")
        values.flags.writeable = False
        return values

    def __len__(self) -> int:
        return len(self.loss)

    def log(self, column: str) -> Array:
        """Of a column, (n,). Raises UserError if no run has it."""
        values = getattr(self, column)
        if values is None:
            raise UserError(self.where, f"it has no column '{column}'", "give it for every run")
        return np.log(values)

    def take(self, which: Any) -> "Points":
        """Those of an index or a mask."""
        own = {f.name: getattr(self, f.name) for f in fields(self)}
        return Points(**own | {k: own[k][which] for k in COLUMNS if own[k] is not None})


def near_best(loss: Array, budgets: Array, near: float | None) -> Array:
    """(n,) of bool: runs within so much of the least loss of their budget, and the best three of it
    however far apart: small models are few, and 4 % may leave one. None: all."""
    kept = np.ones(len(loss), dtype=bool)
    if near is None:
        return kept
    for b in np.unique(budgets):
        own = np.flatnonzero(budgets == b)
        kept[own] = loss[own] <= loss[own].min() * (1 + near)
        kept[own[np.argsort(loss[own], kind="stable")[:_FEWEST]]] = True
    return kept


COLUMNS = ("loss", "parameters", "tokens", "flops", "unique_tokens")
