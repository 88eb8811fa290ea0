"""Fits of the same runs under every convention of N and of C that their table has.

    fit          one per convention of N (and of C, for a law that reads C)
    C ~ N^p D    by least squares over the runs: p is 1 if C = 6 N D, and not 1 if N leaves out
                 parameters that C pays for, or C leaves out parameters that N counts
    N* ~ C^a     the law's minimum along such a budget: a = beta / (alpha + p beta)

Invariant: all rows have the same D, runs and target. The target is one run: its N and C
are converted to each convention by the runs' own line in log N and log C.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from forescale.ground.errors import UserError
from forescale.scaling.analysis.prediction import run_of
from forescale.scaling.fitting import laws
from forescale.scaling.fitting.bootstrap import Replicates
from forescale.scaling.fitting.fit import Fit, fit
from forescale.scaling.fitting.points import Array

if TYPE_CHECKING:
    from forescale.scaling.analysis.table_fit import StudyFit

COUNT = 200  # resampled fits per convention
_OF_TABLE = "the table's"


@dataclass(frozen=True)
class SensitivityRow:
    """The fit under one pair of conventions.

    size, cost: the conventions of N and C; compute_exponent: p of C ~ N^p D; values: of the law;
    allocation, interval: a of N* ~ C^a, None for a law without it; loss: that of the target, None
    without a target.
    """

    size: str
    cost: str
    compute_exponent: float
    values: dict[str, float]
    allocation: float | None
    interval: tuple[float, float] | None
    loss: float | None


def sensitivity(study: "StudyFit", count: int = COUNT) -> list[SensitivityRow]:
    """Return a row for every pair of conventions; conventions with equal numbers share one. A
    single row means that the table has one convention."""
    mask, runs = study.is_fitted, study.points
    sizes: dict[str, Array | None]
    costs: dict[str, Array | None]
    sizes = {name: c[mask] for name, c in conventions(study.table, "parameters").items()}
    costs = {name: c[mask] for name, c in conventions(study.table, "flops").items()}
    if not sizes and runs.parameters is not None:
        sizes = {_OF_TABLE: runs.parameters}
    reads = study.form.columns
    done: dict[tuple[str, str], tuple[Fit, Replicates]] = {}
    rows: list[SensitivityRow] = []
    costs = costs or {"6 N D" if sizes else "-": None}
    for size, n in (sizes or {"-": None}).items():
        for cost, c in costs.items():
            key = (size if "parameters" in reads else "", cost if "flops" in reads else "")
            if key not in done:
                points = replace(runs, parameters=n, flops=c)
                law = fit(study.form, points, study.fit.objective)
                done[key] = law, study.resample(law, count)
            rows.append(_row(study, (size, cost), (n, c), *done[key]))
    return rows


def _row(
    study: "StudyFit",
    names: tuple[str, str],
    counts: tuple[Array | None, Array | None],
    law: Fit,
    replicates: Replicates,
) -> SensitivityRow:
    """Return a row. names: the conventions of N and C; counts: N and C of the runs, (n,) each."""
    (n, c), d, p, loss = counts, study.points.tokens, 1.0, None
    if n is not None and c is not None and d is not None:
        p = float(np.polyfit(np.log(n) - np.log(n).mean(), np.log(c / d), 1)[0])
    if study.job.target.is_given:
        columns = run_of(study, study.job.target)[0]
        for name, column in (("parameters", n), ("flops", c)):
            if name in columns and column is not None:
                log_count = np.log(getattr(study.points, name))
                line = np.polynomial.Polynomial.fit(log_count, np.log(column), 1)
                columns[name] = float(np.exp(line(np.log(columns[name]))))
        loss = float(study.form.predict(law.values, **columns)[0])

    def allocation(values: Array) -> Array:
        """Return q / (1 + (p - 1) q), where q = beta / (alpha + beta) is that of p = 1."""
        q = laws.allocation(study.form, values)
        return q / (1 + (p - 1) * q)

    try:
        a = float(allocation(law.vector))
    except UserError:  # a law whose optimum is no power law of C
        return SensitivityRow(*names, p, law.values, None, None, loss)
    low, high = map(float, replicates.interval(study.job.level, allocation))
    return SensitivityRow(*names, p, law.values, a, (low, high), loss)


def conventions(table: pd.DataFrame, quantity: str) -> dict[str, Array]:
    """Return the ways in which a table counts "parameters" or "flops", (n,) each, by name.

    Conventions with equal numbers are one, under all of their names. A convention that some run
    lacks is absent.
    """
    prefix = f"{quantity}_"
    columns = {_OF_TABLE: table[quantity]} if quantity in table else {}
    columns |= {c.removeprefix(prefix): table[c] for c in map(str, table) if c.startswith(prefix)}
    groups: dict[tuple[float, ...], list[str]] = {}
    for name, column in columns.items():
        if column.notna().all():
            groups.setdefault(tuple(column.astype(float)), []).append(name)
    return {", ".join(names): np.array(numbers) for numbers, names in groups.items()}
