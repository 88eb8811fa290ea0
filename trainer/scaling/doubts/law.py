"""What makes the numbers of a fit doubtful, as sentences, the most serious first.

    data        the runs themselves (data.py): as long as they are wrong, nothing else counts
    gain        losses that fall faster than any law at some budget (gain.py)
    optimum     the law, the parabolas' power law and their vertices differ beyond their intervals;
                the vertices are on no power law; the law doesn't tell better runs of a budget
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
from scipy.special import stdtrit

from forescale.scaling.doubts.budgets import mismatch
from forescale.scaling.doubts.data import data_doubts
from forescale.scaling.doubts.gain import gain_doubts
from forescale.scaling.fitting.bootstrap import Replicates
from forescale.scaling.fitting.fit import Fit
from forescale.scaling.fitting.isoflop import IsoFlop
from forescale.scaling.fitting.points import Array, Points

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
    named = table["budget"].to_numpy(dtype=float) if "budget" in table else None
    sentences += gain_doubts(points, named, replicates.fit)
    if isinstance(iso, IsoFlop):
        sentences += optimum_doubts(replicates, iso, target.flops if target else None, level)
    elif iso is not None:
        sentences.append(f"The runs show no optimum of N. {iso}")
    if named is not None:
        sentences += order_doubts(points, named, replicates.fit)
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


# Differences of the exponent and of N* that matter to nobody, however sure they are.
_SLIGHT = (0.02, np.log(1.1))
_TURN = 0.1  # change of the exponent of N* along the vertices, from which they are no power law
_SURE = 0.999  # probability of a smaller bend of the vertices by chance, to each side
# Least correlation of the ranks of observed and fitted losses within budgets. Nine public tables
# have 0.83 to 0.99; with their losses shuffled within budgets, -0.2 to 0.25.
_ORDERED = 0.5


def optimum_doubts(
    replicates: Replicates, iso: IsoFlop, flops: float | None = None, level: float = 0.9
) -> list[str]:
    """Return a sentence if the law and the parabolas disagree on N* beyond their intervals, and one
    if the vertices bend away from their power law.

    They are compared in their exponents, and in N* at `flops` or the greatest budget. Those of the
    law are of the line through its log N* of the budgets.
    """
    if replicates.fit.form.columns != ("parameters", "tokens"):
        return _bend(iso)
    at = float(flops) if flops and np.isfinite(flops) else iso.vertices[-1].budget
    log_c = np.log([v.budget for v in iso.vertices])
    away = log_c - log_c.mean()

    def of(values: Array) -> Array:
        """Return the exponent and log N* at `at`, (R, 2)."""
        best = _along(replicates, iso, values)
        slope = best @ away / (away @ away)
        return np.stack((slope, best.mean(1) + slope * (np.log(at) - log_c.mean())), axis=-1)

    # Value, low and high end of the exponent and of log N*, (3, 2); without an interval of the
    # parabolas, its ends are the value.
    law = np.vstack((of(replicates.fit.vector[None]), replicates.interval(level, of)))
    line = iso.parameters
    value = np.array([line.a, np.log(line(at))])
    exponent, n = line.interval(level)[:, 1], np.log(line.interval(level, [at])[:, 0])
    ends = np.stack((exponent, n), axis=1)
    parabolas = np.vstack((value, np.where(np.isfinite(ends), ends, value)))
    apart = (law[1] > parabolas[2]) | (parabolas[1] > law[2])
    apart &= np.abs(law[0] - parabolas[0]) > _SLIGHT
    if not apart.any():
        return _bend(iso)
    parts = []
    for i, quantity in ((1, f"at {at:.3g} FLOPs N* is"), (0, "the exponent of N* is")):
        if apart[i]:
            texts = ["{:.3g} ({:.3g} to {:.3g})".format(*np.exp(one[:, i])) if i else
                     "{:.3f} ({:.3f} to {:.3f})".format(*one[:, i])
                     for one in (law, parabolas)]  # fmt: skip
            parts.append(f"{quantity} {texts[0]} by the law and {texts[1]} by the parabolas")
    low, high = replicates.interval(level, lambda values: _along(replicates, iso, values))
    log_n = np.log([v.parameters for v in iso.vertices])
    outside = int(((log_n < low) | (log_n > high)).sum())
    return [
        f"The law and the parabolas disagree on the optimum beyond their {level:.0%} intervals: "
        f"{'; '.join(parts)}; {outside} of {len(log_n)} vertices are outside the law's interval. "
        "Fit both with near=0.02, to runs nearer the optimum; if they disagree still, trust N* and "
        "D* only as far as both agree.",
        *_bend(iso),
    ]


def _along(replicates: Replicates, iso: IsoFlop, values: Array) -> Array:
    """Return log N of the law's lowest loss along the runs of each budget, (R, B).

    Beyond the sizes of a budget its line of log D over log N is continued straight.
    """
    away = np.linspace(-8, 8, 161)
    best = np.empty((len(values), len(iso.vertices)))
    for b, v in enumerate(iso.vertices):
        n = v.parameters * np.exp(away)
        d = v.tokens * np.exp(v.path[-2] * away)
        loss = replicates.fit.form.predict(values, parameters=n, tokens=d)
        i = np.clip(loss.argmin(1), 1, len(away) - 2)
        low, mid, high = (loss[np.arange(len(values)), i + k] for k in (-1, 0, 1))
        bend = np.maximum(low - 2 * mid + high, 1e-300)
        shift = np.clip((low - high) / (2 * bend), -1, 1) * (away[1] - away[0])
        best[:, b] = np.log(v.parameters) + away[i] + shift
    return best


def _bend(iso: IsoFlop) -> list[str]:
    """Return a sentence if N* of the vertices is clearly no power law of C."""
    x, y = np.log([(v.budget, v.parameters) for v in iso.vertices]).T
    if len(x) < 5:
        return []
    X = np.vander(x - x.mean(), 3)
    fitted, *_ = np.linalg.lstsq(X, y)
    rest = y - X @ fitted
    error = np.sqrt(rest @ rest / (len(x) - 3) * np.linalg.inv(X.T @ X)[0, 0])
    first, last = (fitted[1] + 2 * fitted[0] * (end - x.mean()) for end in (x.min(), x.max()))
    if abs(fitted[0]) < stdtrit(len(x) - 3, _SURE) * error or abs(last - first) < _TURN:
        return []
    return [
        f"N* of the {len(x)} vertices is no power law of C: its exponent goes from {first:.2f} at "
        f"{np.exp(x.min()):.2g} FLOPs to {last:.2f} at {np.exp(x.max()):.2g}. Fit the larger "
        "budgets alone before extrapolating N*."
    ]


def order_doubts(points: Points, budgets: Array, law: Fit) -> list[str]:
    """Return a sentence if the law doesn't tell which runs of a budget are better than others.

    budgets: of each run, (n,). Budgets with fewer than four runs don't count.
    """
    if not {"parameters", "tokens"} >= set(law.form.columns):
        return []
    fitted = law.predict(**{c: getattr(points, c) for c in law.form.columns})
    losses = pd.DataFrame({"observed": points.loss, "fitted": fitted})
    groups = losses.groupby(budgets)
    ranks = groups.rank()
    size = groups["observed"].transform("size")
    ranks = (ranks - ranks.groupby(budgets).transform("mean")).div(size, axis=0)[size > 3]
    if ranks.empty:
        return []
    observed, expected = ranks.to_numpy().T
    scale = np.sqrt((observed @ observed) * (expected @ expected))
    alike = float(observed @ expected / scale) if scale else 0.0
    if alike >= _ORDERED:
        return []
    return [
        f"Within the {len(np.unique(budgets[size > 3]))} budgets, losses don't follow the law: the "
        f"correlation of observed and fitted ranks is {alike:.2f}, where 1 is perfect, so that N* "
        "and D* mean nothing. Check that N, D and loss of a row belong to the same run, and add "
        "sizes farther from N*."
    ]
