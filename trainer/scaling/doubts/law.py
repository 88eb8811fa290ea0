"""What makes the numbers of a fit doubtful, as sentences, the most serious first.

    data        the runs themselves (data.py): as long as they are wrong, nothing else counts
    optimum     the law and the parabolas disagree on it, or show none (optimum.py)
    law         it explains no losses; terms that the runs don't determine; the certificate
    target      far outside the runs
    budgets     named otherwise than C is counted (budgets.py)

Invariant: a doubt says what was found, where, and what to do. "Nothing was found" means that all of
these were examined.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from forescale.scaling.doubts.budgets import mismatch
from forescale.scaling.doubts.data import data_doubts
from forescale.scaling.doubts.optimum import optimum_doubts, order_doubts
from forescale.scaling.fitting.bootstrap import Replicates
from forescale.scaling.fitting.isoflop import IsoFlop
from forescale.scaling.fitting.points import Points

_EXPLAINED = 0.5  # least share of the variance of log loss that a law explains
_ABSENT = 0.05  # of the loss: E below it is no lower bound; share of refits without a term
_WIDE = 0.3  # of the exponent of N*: with an interval so wide it is not determined
_LINE = 0.1  # deviation of log D from a line in log N, below which N and D can't be told apart
_FAR_SIZE, _FAR_RATIO = 10.0, 2.0  # target over the greatest N, and D/N, of the runs
_RIVAL = 1.05  # objective of another minimum over that of the fit, below which it counts


@dataclass(frozen=True)
class Target:
    """N, D and C of the run that is predicted; NaN where it is not known."""

    parameters: float
    tokens: float
    flops: float


def doubts(
    table: pd.DataFrame,
    points: Points,
    replicates: Replicates,
    iso: IsoFlop | str | None = None,
    target: Target | None = None,
    level: float = 0.9,
    columns: Mapping[str, str] | None = None,
) -> list[str]:
    """Return everything that makes a fit doubtful, the most serious first; empty if nothing does.

    table: the records; points: the same runs, in the same order, also those that the law is not
    fitted to; replicates: the resampled fits of the law; iso: the parabolas, or why there are none;
    level: of intervals; columns: which column of a foreign table is which of ours, {ours: theirs}.
    """
    sentences = data_doubts(table, points, columns)
    if isinstance(iso, IsoFlop):
        sentences += optimum_doubts(
            replicates, iso, None if target is None else target.flops, level
        )
    elif iso is not None:
        sentences.append(f"The runs show no optimum of N. {iso}")
    if "budget" in table:
        sentences += order_doubts(points, table["budget"].to_numpy(dtype=float), replicates.fit)
    sentences += law_doubts(replicates, level)
    if target is not None:
        sentences += target_doubts(replicates.fit.points, target)
    return [*sentences, *budget_doubts(table, points)]


def budget_doubts(table: pd.DataFrame, points: Points) -> list[str]:
    """Return a sentence if the named budgets are not the C of their runs."""
    if "budget" not in table or points.parameters is None or points.tokens is None:
        return []
    product = 6 * points.parameters * points.tokens
    names = [c for c in map(str, table) if c.startswith("flops_") and table[c].notna().all()]
    costs = {f"cost={c.removeprefix('flops_')}": table[c].to_numpy(dtype=float) for c in names}
    if points.flops is not None:
        costs["6 N D"] = product
    flops = product if points.flops is None else points.flops
    sentence = mismatch(table["budget"].to_numpy(dtype=float), flops, points.parameters, costs)
    return [sentence] if sentence else []


def law_doubts(replicates: Replicates, level: float = 0.9) -> list[str]:
    """Return the doubts about a law: what it doesn't explain, what its runs don't determine."""
    law = replicates.fit
    y = np.log(law.points.loss)
    share = 1 - float(law.residuals @ law.residuals / max(((y - y.mean()) ** 2).sum(), 1e-300))
    sentences = []
    if share < _EXPLAINED:
        sentences.append(
            f"The law explains {max(share, 0):.0%} of the variance of the losses of {len(y)} runs: "
            "their N and D hardly tell their loss. Check that N, D and loss of a row belong to the "
            "same run, and that all runs are trained to their end."
        )
    sentences += _undetermined(replicates, level)
    certificate = law.certificate
    sentences += [f"The fit is not certified: {p}." for p in certificate.problems]
    rivals = [m for m in certificate.minima[1:] if m.objective < _RIVAL * law.value]
    if rivals:
        problem = ", ".join(f"{k} {v:.4g}" for k, v in rivals[0].values.items())
        sentences.append(
            f"Another minimum is nearly as low: {problem}. Add runs that tell them apart, of other "
            "N and D."
        )
    return sentences


def _undetermined(replicates: Replicates, level: float) -> list[str]:
    """Return sentences on parameters that the runs don't determine."""
    law, symbols = replicates.fit, replicates.fit.form.symbols
    edges = {e.split()[0]: e for e in law.certificate.edges}
    sentences, gone = [], []
    if {"parameters", "tokens"} <= set(law.form.columns):
        sentences += _one_line(law.points)
        gone = [s for s in symbols if s != "E" and (s in edges or _lost(replicates, s) > _ABSENT)]
    ends = dict(zip(symbols, replicates.interval(level).T, strict=True))
    if gone:
        at_edges = [f"{edges[s]} of its range" for s in gone if s in edges]
        at_edges += [
            f"{s} at an end of its range in {_lost(replicates, s):.0%} of refits"
            for s in gone
            if s not in edges
        ]
        a = replicates.allocation(level)
        means = f" N* ∝ C^{a[0]:.2f} then means nothing." if a else ""
        sentences.append(
            f"The runs don't determine the law: {', '.join(at_edges)}.{means} Add runs with other "
            "N and D, or fit a law with fewer parameters, such as form=shared-exponent."
        )
    elif (a := replicates.allocation(level)) and a[1][1] - a[1][0] > _WIDE:
        sentences.append(
            f"The exponent of N*, {a[0]:.2f}, is hardly determined: its {level:.0%} interval is "
            f"{a[1][0]:.2f} to {a[1][1]:.2f}. Add runs of other D/N."
        )
    if "E" in ends and (
        "E" in edges
        or _lost(replicates, "E") > _ABSENT
        or ends["E"][0] < _ABSENT * law.points.loss.min()
    ):
        sentences.append(
            f"E has no lower bound: it is {law.values['E']:.3g}, and anything from 0 to "
            f"{ends['E'][1]:.3g} fits these runs. Predictions far beyond them may be far too low: "
            "add larger runs."
        )
    return sentences


def _lost(replicates: Replicates, symbol: str) -> float:
    """Return the share of refits in which a parameter is at an end of its range."""
    edge = replicates.solved.edge[:, replicates.fit.form.symbols.index(symbol)]
    return float((edge != 0).mean())


def _one_line(points: Points) -> list[str]:
    """Return a sentence if N and D of all runs are on one line in logarithms."""
    x, z = points.log("parameters"), points.log("tokens")
    slope, level = np.polyfit(x, z, 1)
    if len(x) < 4 or np.std(z - slope * x - level) >= _LINE:
        return []
    return [
        f"D of all runs is nearly the same power of N (D ∝ N^{slope:.2f}), so that the law can't "
        "tell the effect of N from that of D. Add runs with other D/N."
    ]


def target_doubts(points: Points, target: Target) -> list[str]:
    """Return sentences if a target is far outside the runs of a fit in N or in D/N."""
    n, d = points.parameters, points.tokens
    cases = [("N", target.parameters, n, _FAR_SIZE)]
    if n is not None and d is not None:
        cases.append(("D/N", target.tokens / target.parameters, d / n, _FAR_RATIO))
    sentences = []
    for name, value, runs, limit in cases:
        if runs is None or not np.isfinite(value):
            continue
        low, high = float(runs.min()), float(runs.max())
        if low / limit <= value <= high * limit:
            continue
        by, side = (value / high, "above the greatest") if value > high else (
            low / value, "below the least"
        )  # fmt: skip
        sentences.append(
            f"The target's {name}, {value:.3g}, is {by:.2g} times {side} of the {len(points)} runs "
            f"({low:.3g} to {high:.3g}), where nothing tests the law. Add runs with {name} nearer "
            "to the target's."
        )
    return sentences
