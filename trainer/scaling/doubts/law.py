"""What makes the numbers of a fit doubtful, as sentences, the most serious first.

    data        the runs themselves (data.py): as long as they are wrong, nothing else counts
    optimum     the law and the parabolas disagree on it, or show none (optimum.py)
    law         it explains no losses; terms that the runs don't determine; the certificate
    target      far outside the runs
    budgets     named otherwise than C is counted (budgets.py)

Invariant: a doubt says what was found, where, and what to do. "Nothing was found" means that all of
these were examined.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

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


class Target(NamedTuple):
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
        sentences += optimum_doubts(replicates, iso, target.flops if target else None, level)
    elif iso is not None:
        sentences.append(f"The runs show no optimum of N. {iso}")
    if "budget" in table:
        sentences += order_doubts(points, table["budget"].to_numpy(dtype=float), replicates.fit)
    sentences += _law(replicates, level)
    if target is not None:
        sentences += _target(replicates.fit.points, target)
    return [*sentences, *_budgets(table, points)]


def _budgets(table: pd.DataFrame, points: Points) -> Iterator[str]:
    """Yield a sentence if the named budgets are not the C of their runs."""
    if "budget" not in table or points.parameters is None or points.tokens is None:
        return
    product = 6 * points.parameters * points.tokens
    names = [c for c in map(str, table) if c.startswith("flops_") and table[c].notna().all()]
    costs = {f"cost={c.removeprefix('flops_')}": table[c].to_numpy(dtype=float) for c in names}
    if points.flops is not None:
        costs["6 N D"] = product
    flops = product if points.flops is None else points.flops
    if text := mismatch(table["budget"].to_numpy(dtype=float), flops, points.parameters, costs):
        yield text


def _law(replicates: Replicates, level: float) -> Iterator[str]:
    """Yield what a law doesn't explain, and what its runs don't determine."""
    law = replicates.fit
    y = np.log(law.points.loss)
    share = 1 - float(law.residuals @ law.residuals / max(((y - y.mean()) ** 2).sum(), 1e-300))
    if share < _EXPLAINED:
        yield (
            f"The law explains {max(share, 0):.0%} of the variance of the losses of {len(y)} runs: "
            "their N and D hardly tell their loss. Check that N, D and loss of a row belong to the "
            "same run, and that all runs are trained to their end."
        )
    yield from _undetermined(replicates, level)
    for problem in law.certificate.problems:
        yield f"The fit is not certified: {problem}."
    rivals = [m for m in law.certificate.minima[1:] if m.objective < _RIVAL * law.value]
    if rivals:
        values = ", ".join(f"{k} {v:.4g}" for k, v in rivals[0].values.items())
        yield (
            f"Another minimum is nearly as low: {values}. Add runs that tell them apart, of other "
            "N and D."
        )


def _undetermined(replicates: Replicates, level: float) -> Iterator[str]:
    """Yield sentences on parameters that the runs don't determine."""
    law, symbols = replicates.fit, replicates.fit.form.symbols
    edges = {e.split()[0]: f"{e} of its range" for e in law.certificate.edges}
    # The share of refits in which a parameter is at an end of its range.
    lost = dict(zip(symbols, (replicates.solved.edge != 0).mean(0), strict=True))
    gone = [s for s in symbols if s in edges or lost[s] > _ABSENT]
    a = replicates.allocation(level)
    if {"parameters", "tokens"} <= set(law.form.columns):
        x, z = law.points.log("parameters"), law.points.log("tokens")
        slope, start = np.polyfit(x, z, 1)
        if len(x) > 3 and np.std(z - slope * x - start) < _LINE:
            yield (
                f"D of all runs is nearly the same power of N (D ∝ N^{slope:.2f}), so that the law "
                "can't tell the effect of N from that of D. Add runs with other D/N."
            )
        places = [edges[s] for s in gone if s in edges and s != "E"]
        places += [f"{s} at an end of its range in {lost[s]:.0%} of refits"
                   for s in gone if s not in edges and s != "E"]  # fmt: skip
        if places:
            means = f" N* ∝ C^{a[0]:.2f} then means nothing." if a else ""
            yield (
                f"The runs don't determine the law: {', '.join(places)}.{means} Add runs with "
                "other N and D, or fit a law with fewer parameters, such as form=shared-exponent."
            )
            a = None
    if a and a[1][1] - a[1][0] > _WIDE:
        yield (
            f"The exponent of N*, {a[0]:.2f}, is hardly determined: its {level:.0%} interval is "
            f"{a[1][0]:.2f} to {a[1][1]:.2f}. Add runs of other D/N."
        )
    if "E" in symbols:
        low, high = replicates.interval(level)[:, symbols.index("E")]
        if "E" in gone or low < _ABSENT * law.points.loss.min():
            yield (
                f"E has no lower bound: it is {law.values['E']:.3g}, and anything from 0 to "
                f"{high:.3g} fits these runs. Predictions far beyond them may be far too low: add "
                "larger runs."
            )


def _target(points: Points, target: Target) -> Iterator[str]:
    """Yield sentences if a target is far outside the runs of a fit in N or in D/N."""
    n, d = points.parameters, points.tokens
    cases = [("N", target.parameters, n, _FAR_SIZE)]
    if n is not None and d is not None:
        cases.append(("D/N", target.tokens / target.parameters, d / n, _FAR_RATIO))
    for name, value, runs, limit in cases:
        if runs is None or not np.isfinite(value):
            continue
        low, high = float(runs.min()), float(runs.max())
        if low / limit <= value <= high * limit:
            continue
        away = f"{low / value:.2g} times below the least"
        if value > high:
            away = f"{value / high:.2g} times above the greatest"
        yield (
            f"The target's {name}, {value:.3g}, is {away} of the {len(points)} runs ({low:.3g} to "
            f"{high:.3g}), where nothing tests the law. Add runs with {name} nearer to the "
            "target's."
        )
