"""The same runs under every convention of N and of C that their table knows: what of the law is a
matter of counting.

    fit          once for each N (and each C, of a law that reads it)
    C ~ N^p D    by least squares over the runs: p is 1 where C = 6 N D, and not where N leaves out
                 what C pays for, or C leaves out what N counts
    N* ~ C^a     the law's minimum along such a budget: a = beta / (alpha + p beta)

Invariant: D, weights, runs and target are the same in all rows; the target is one run, whose N and
C are carried over along the line of the runs' own in log N and log C.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from forescale.errors import UserError
from forescale.scaling.fitting import laws
from forescale.scaling.fitting.bootstrap import Replicates
from forescale.scaling.fitting.fit import Fit, fit
from forescale.scaling.fitting.points import Array

if TYPE_CHECKING:
    from forescale.scaling.analysis.answer import StudyFit

COUNT = 200  # resampled fits of each
_OWN = "the table's"


@dataclass(frozen=True)
class Row:
    """size, cost: the conventions of N and C; per: p of C ~ N^p D; values: of the law; allocation,
    interval: a of N* ~ C^a, None for a law without one; loss: of the target, None without one."""

    size: str
    cost: str
    per: float
    values: dict[str, float]
    allocation: float | None
    interval: tuple[float, float] | None
    loss: float | None


def sensitivity(made: "StudyFit", count: int = COUNT) -> list[Row]:
    """A row for every pair of conventions; those that come to the same numbers share one. A single
    row: the table knows one way to count."""
    near, own = made.near, made.points
    sizes: dict[str, Array | None]
    costs: dict[str, Array | None]
    sizes = {name: c[near] for name, c in conventions(made.table, "parameters").items()}
    costs = {name: c[near] for name, c in conventions(made.table, "flops").items()}
    if not sizes and own.parameters is not None:
        sizes = {_OWN: own.parameters}
    reads = made.form.columns
    done: dict[tuple[str, str], tuple[Fit, Replicates]] = {}
    rows: list[Row] = []
    costs = costs or {"6 N D" if sizes else "-": None}
    for size, n in (sizes or {"-": None}).items():
        for cost, c in costs.items():
            key = (size if "parameters" in reads else "", cost if "flops" in reads else "")
            if key not in done:
                points = replace(own, parameters=n, flops=c)
                law = fit(made.form, points, made.fit.objective, made.weights)
                done[key] = law, made.resample(law, count)
            rows.append(_row(made, (size, cost), (n, c), *done[key]))
    return rows


def _row(
    made: "StudyFit",
    names: tuple[str, str],
    counts: tuple[Array | None, Array | None],
    law: Fit,
    replicates: Replicates,
) -> Row:
    """counts: N and C of the runs, (n,) each."""
    (n, c), d = counts, made.points.tokens
    per = 1.0 if n is None or c is None or d is None else _slope(np.log(n), np.log(c / d))

    def allocation(values: Array) -> Array:
        """With q = beta / (alpha + beta), for p = 1, it is q / (1 + (p - 1) q)."""
        q = laws.allocation(made.form, values)
        return q / (1 + (per - 1) * q)

    try:
        a = float(allocation(law.vector))
    except UserError:  # a law whose optimum is no power of C
        return Row(*names, per, law.values, None, None, _loss(made, law.values, n, c))
    low, high = map(float, replicates.interval(made.job.level, allocation))
    return Row(*names, per, law.values, a, (low, high), _loss(made, law.values, n, c))


def conventions(table: pd.DataFrame, what: str) -> dict[str, Array]:
    """Of "parameters" or "flops": the ways in which a table counts them, (n,) each, by name. Those
    of the same numbers are one, with all of its names."""
    prefix = f"{what}_"
    found = {_OWN: table[what]} if what in table else {}
    found |= {c.removeprefix(prefix): table[c] for c in map(str, table) if c.startswith(prefix)}
    groups: dict[tuple[float, ...], list[str]] = {}
    for name, column in found.items():
        if column.notna().all():
            groups.setdefault(tuple(column.astype(float)), []).append(name)
    return {", ".join(names): np.array(numbers) for numbers, names in groups.items()}


def _slope(x: Array, y: Array) -> float:
    return float(np.polyfit(x - x.mean(), y, 1)[0])


def _loss(
    made: "StudyFit", values: dict[str, float], n: Array | None, c: Array | None
) -> float | None:
    """Of the target, as this law has it."""
    if not made.job.target.is_given:
        return None
    columns, _, _, _ = made.run_of(made.job.target)
    for name, column in (("parameters", n), ("flops", c)):
        if name in columns and column is not None:
            own = np.log(getattr(made.points, name))
            line = np.polynomial.Polynomial.fit(own, np.log(column), 1)
            columns[name] = float(np.exp(line(np.log(columns[name]))))
    return float(made.form.predict(values, **columns)[0])
