"""Laws of the best learning rate and the best batch, from tables of sweeps.

    sweeps    runs of one N and one D that differ in learning rate, or in learning rate and batch
    optimum   of each sweep, by the parabola or the surface of tuning.py
    law       log best = log k + sum of exponent * log N, log D or log C; least squares over sweeps
    interval  Student's t, from the scatter of the optima around the law
    critical  the batch from which larger ones cost tokens, of sweeps of both

Invariant: a best run at the edge of a sweep is no optimum; such a sweep is refused with the reason.
A batch is in tokens. A law is not fitted against columns that its sweeps don't tell apart. A run
without a finite loss diverged, and is worse than all others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from forescale.ground.errors import UserError
from forescale.scaling.config import StudyJob
from forescale.scaling.design.tuning import rate_batch_response, tuned
from forescale.scaling.fitting.points import Array, spent
from forescale.scaling.records.records import points

SYMBOLS = {"parameters": "N", "tokens": "D", "flops": "C"}
RATE, BATCH = "learning rate", "batch"
_SAME = 0.02  # D of one sweep are this near; a batch may not divide them evenly
_APART = 0.1  # least spread of a column's log that the other column doesn't explain
_FEWEST = 3  # learning rates, or batches, of a sweep
_TINY, _GRID = 8.0, 401  # critical batches to so far beyond those tried, and their number


@dataclass(frozen=True)
class Optimum:
    """The best values of one sweep. batch: in tokens, None if the sweep has one batch; bend: rise
    of log loss per square of the log rate off the best, None if it is unknown."""

    at: Mapping[str, float]
    runs: int
    learning_rate: float
    batch: float | None
    bend: float | None


@dataclass(frozen=True)
class RefusedSweep:
    """A sweep without an optimum, and the reason."""

    at: Mapping[str, float]
    runs: int
    why: str


@dataclass(frozen=True)
class RateLaw:
    """A power law of a best value.

    quantity: RATE or BATCH; columns: what it depends on; values: log of the value at the middle of
    the sweeps and the exponents, (1 + q,), with their covariance; centre: means of the logs of the
    columns, (q,); scatter: standard deviation of a log optimum; freedom: sweeps without parameters.
    """

    quantity: str
    columns: tuple[str, ...]
    values: Array
    covariance: Array
    centre: Array
    scatter: float
    freedom: int

    @property
    def k(self) -> float:
        """Return the coefficient of value = k * N^p * D^q."""
        return float(np.exp(self.values[0] - self.values[1:] @ self.centre))

    def exponents(self, level: float) -> dict[str, tuple[float, float, float]]:
        """Return the exponent of each column, with its interval."""
        half = self._t(level) * np.sqrt(np.diag(self.covariance)[1:])
        rows = zip(self.columns, self.values[1:], half, strict=True)
        return {c: (float(v), float(v - h), float(v + h)) for c, v, h in rows}

    def at(self, point: Mapping[str, float], level: float) -> tuple[float, float, float]:
        """Return the best value for a run by the law, with its interval."""
        x = np.append(1.0, np.log([point[c] for c in self.columns]) - self.centre)
        log, half = x @ self.values, self._t(level) * np.sqrt(x @ self.covariance @ x)
        low, value, high = np.exp([log - half, log, log + half])
        return float(value), float(low), float(high)

    def _t(self, level: float) -> float:
        return float(stdtrit(self.freedom, (1 + level) / 2))


@dataclass(frozen=True)
class RateLaws:
    """The laws of learning rate and batch of a table. batch: None if too few sweeps vary it;
    target: the best values for the target by name, with their intervals; cost: the median rise of
    the loss at twice the best learning rate."""

    job: StudyJob
    optima: tuple[Optimum, ...]
    refused: tuple[RefusedSweep, ...]
    rate: RateLaw
    batch: RateLaw | None
    target: Mapping[str, tuple[float, float, float]]
    cost: float | None
    notes: tuple[str, ...]


def rate_laws(
    table: pd.DataFrame, job: StudyJob, where: str, target: Mapping[str, float] | None = None
) -> RateLaws:
    """Return the laws of a table of sweeps. target: N, D and C by the names of SYMBOLS; by default
    those of the job that are given. Raises UserError if the table has no learning rates, or too few
    sweeps with an optimum inside."""
    sweeps = [_optimum(*sweep) for sweep in _sweeps(table, job, where)]
    optima = tuple(one for one in sweeps if isinstance(one, Optimum))
    refused = tuple(one for one in sweeps if isinstance(one, RefusedSweep))
    columns, notes = _columns(job, optima)
    rate = _law(RATE, [o.learning_rate for o in optima], optima, columns, where, refused)
    with_batch = [o for o in optima if o.batch is not None]
    batch = None
    if len(with_batch) > len(columns) + 1:
        batch = _law(BATCH, [o.batch or 0.0 for o in with_batch], with_batch, columns, where, ())
    elif with_batch:
        notes.append(f"{len(with_batch)} sweeps that vary the batch are too few for its law.")
    bends = [o.bend for o in optima if o.bend is not None]
    cost = float(np.expm1(np.median(bends) * np.log(2) ** 2)) if bends else None
    values = target or {name: getattr(job.target, name) for name in SYMBOLS}
    point = {name: value for name, value in values.items() if value is not None}
    if point and (missing := [c for c in columns if c not in point]):
        problem = f"is not given; the laws read {', '.join(columns)}"
        raise UserError(f"target.{missing[0]}", problem, "give it too")
    laws = [law for law in (rate, batch) if law is not None and point]
    best = {law.quantity: law.at(point, job.level) for law in laws}
    return RateLaws(job, optima, refused, rate, batch, best, cost, tuple(notes))


def critical_batches(
    table: pd.DataFrame, job: StudyJob, where: str, slope: Callable[[float, float], float]
) -> list[tuple[float, float]]:
    """Return D and the critical batch, in tokens, of each sweep of three batches or more that had
    three learning rates each; 0 or infinite if it is beyond those tried.

    With batches of B a run needs 1 + B / B_crit times the tokens that it needs with tiny ones for
    the same loss (McCandlish et al. 2018, arXiv 1812.06162). slope: by how much log loss falls as
    log D grows, at N and D.
    """
    critical = list[tuple[float, float]]()
    for at, rates, batches, loss in _sweeps(table, job, where):
        least = dict[float, float]()
        for batch in () if batches is None else np.unique(batches):
            each, losses = _least(rates[batches == batch], loss[batches == batch])
            if len(each) >= _FEWEST and (line := tuned(each, losses)).inside:
                least[batch] = float(np.log(min(losses))) - line.gap
        if len(least) < _FEWEST:
            continue
        b, y = np.array([*least]), np.array([*least.values()])
        grid = np.geomspace(b.min() / _TINY, b.max() * _TINY, _GRID)
        rest = slope(at["parameters"], at["tokens"]) * np.log1p(b / grid[:, None]) - y
        i = int(rest.var(axis=1).argmin())
        ends = {0: 0.0, _GRID - 1: np.inf}
        critical.append((at["tokens"], ends.get(i, float(grid[i]))))
    return critical


def _numbers(table: pd.DataFrame, column: str, where: str) -> Array:
    """Return a column as positive numbers, (n,). Raises UserError if it is absent or has others."""
    if column not in table:
        todo = f"name it, such as columns='{{{column}: lr}}'"
        raise UserError(where, f"has no column '{column}'", todo)
    numbers: Array = pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=float)
    if not (numbers > 0).all():
        row = int(np.flatnonzero(~(numbers > 0))[0])
        problem = f"'{table[column].iloc[row]}' is no positive number"
        raise UserError(f"{where}, {column} of row {row}", problem, "give every run its own")
    return numbers


def _sweeps(
    table: pd.DataFrame, job: StudyJob, where: str
) -> Iterator[tuple[dict[str, float], Array, Array | None, Array]]:
    """Yield each N and D that had several learning rates: N, D and C; learning rates, (m,); batches
    in tokens, None if all are equal; losses."""
    loss = table["loss"].fillna(np.inf).to_numpy(dtype=float)
    finite = np.where(np.isfinite(loss), loss, 1.0)  # points have no infinite loss
    runs = points(table.assign(loss=finite), job.size, job.cost, where)
    rates = _numbers(table, "learning_rate", where)
    batches = _numbers(table, "batch_tokens", where) if "batch_tokens" in table else None
    n, log_d, c = np.exp(runs.log("parameters")), runs.log("tokens"), spent(runs)
    alike = np.stack((n, *runs.varied.values()), axis=1)  # a sweep has one N, and one of each
    for size, *setting in np.unique(alike, axis=0):
        rows = np.flatnonzero((alike == [size, *setting]).all(axis=1))
        rows = rows[np.argsort(log_d[rows], kind="stable")]
        for sweep in np.split(rows, np.flatnonzero(np.diff(log_d[rows]) > _SAME) + 1):
            if np.ptp(rates[sweep]) == 0:
                continue
            d, flops = np.exp(log_d[sweep].mean()), np.exp(np.log(c[sweep]).mean())
            at = {"parameters": float(size), "tokens": float(d), "flops": float(flops)}
            several = batches is not None and len(np.unique(batches[sweep])) > 1
            tried = batches[sweep] if batches is not None and several else None
            yield at, rates[sweep], tried, loss[sweep]


def _optimum(
    at: Mapping[str, float], rates: Array, batches: Array | None, loss: Array
) -> Optimum | RefusedSweep:
    """Return the optimum of one sweep. batches: (m,) in tokens, None if all are equal."""

    def no(why: str) -> RefusedSweep:
        return RefusedSweep(at, len(rates), why)

    if (count := len(np.unique(rates))) < _FEWEST:
        return no(f"{count} learning rates are too few")
    if not np.isfinite(loss).any():
        return no("all of its runs diverged")
    if batches is None:
        best = _least(rates, loss)
        line = tuned(*best)
        if not line.inside:
            return no(f"its best learning rate, {line.learning_rate:.3g}, is at the edge")
        return Optimum(at, len(rates), line.learning_rate, None, line.bend)
    if (count := len(np.unique(batches))) < _FEWEST:
        return no(f"{count} batches are too few for a sweep of both")
    both = rate_batch_response(rates.tolist(), batches.tolist(), loss.tolist())
    if not both.inside:
        return no(f"its best {' and '.join(both.edges)} is at the edge")
    near = batches == batches[np.argmin(np.where(np.isfinite(loss), loss, np.inf))]
    bend = tuned(*_least(rates[near], loss[near])).bend if near.sum() >= _FEWEST else None
    return Optimum(at, len(rates), both.learning_rate, both.batch, bend)


def _least(rates: Array, loss: Array) -> tuple[list[float], list[float]]:
    """Return each learning rate once, with the mean loss of its runs; infinite if one diverged."""
    distinct = np.unique(rates)
    return distinct.tolist(), [float(np.mean(loss[rates == rate])) for rate in distinct]


def _columns(job: StudyJob, optima: Sequence[Optimum]) -> tuple[tuple[str, ...], list[str]]:
    """Return what the laws depend on: the job's choice, or N and D, or N alone if D follows it."""
    if job.against:
        return tuple(job.against), []
    logs = np.log([[o.at["parameters"], o.at["tokens"]] for o in optima] or [[1.0, 1.0]])
    logs = logs - logs.mean(0)
    apart = np.linalg.svd(logs, compute_uv=False)[-1] / np.sqrt(len(logs))
    if apart >= _APART and len(optima) > 3:
        return ("parameters", "tokens"), []
    if np.ptp(logs[:, 0]) == 0:
        return ("tokens",), ["All sweeps have one N, so the laws are against D alone."]
    note = "The sweeps don't tell N and D apart, so the laws are against N alone; for C give "
    return ("parameters",), [note + "against=[flops]."]


def _law(
    quantity: str, values: Sequence[float], optima: Sequence[Optimum], columns: tuple[str, ...],
    where: str, refused: Sequence[RefusedSweep],
) -> RateLaw:  # fmt: skip
    """Return the law of these best values. Raises UserError if they are too few, or at
    one place."""
    if (freedom := len(optima) - len(columns) - 1) < 1:
        whys = "; ".join(f"N {r.at['parameters']:.3g}, D {r.at['tokens']:.3g}: {r.why}"
                         for r in refused[:3])  # fmt: skip
        problem = f"{len(optima)} sweeps have a best {quantity} inside"
        if (swept := len(optima) + len(refused)) < 2:
            problem = f"{('no', 'one')[swept]} size was swept"
        problem += f" ({whys})" if whys else ""
        todo = f"give {len(columns) + 2} or more, each with worse runs on both sides"
        raise UserError(where, problem, todo)
    logs = np.log([[o.at[c] for c in columns] for o in optima])
    centre = logs.mean(0)
    X = np.column_stack((np.ones(len(logs)), logs - centre))
    if np.linalg.matrix_rank(X) < X.shape[1]:
        names = " and ".join(SYMBOLS[c] for c in columns)
        raise UserError(where, f"the sweeps don't tell {names} apart", "give against=[parameters]")
    y = np.log(values)
    gram = np.linalg.inv(X.T @ X)
    coefficients = gram @ X.T @ y
    variance = float(np.square(y - X @ coefficients).sum() / freedom)
    return RateLaw(quantity, columns, coefficients, variance * gram, centre, variance**0.5, freedom)


def as_dict(laws: RateLaws) -> dict[str, Any]:
    """Return the laws as plain values, for JSON."""

    def law(one: RateLaw | None) -> dict[str, Any] | None:
        if one is None:
            return None
        exponents = {c: list(v) for c, v in one.exponents(laws.job.level).items()}
        return {"k": one.k, "exponents": exponents, "scatter": one.scatter,
                "freedom": one.freedom}  # fmt: skip

    return {
        "level": laws.job.level,
        "learning_rate": law(laws.rate),
        "batch_tokens": law(laws.batch),
        "target": {name.replace(" ", "_"): list(v) for name, v in laws.target.items()},
        "cost_of_twice_the_rate": laws.cost,
        "sweeps": [vars(o) for o in laws.optima],
        "refused": [vars(r) for r in laws.refused],
        "notes": list(laws.notes),
    }
