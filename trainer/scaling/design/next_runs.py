"""Chooses the additional runs that narrow the prediction of the target most for their cost.

    law           linear around the fit (its Jacobian), with a wide prior of its parameters
    discrepancy   the error of the law itself: a random walk along log C, of `per_decade` in a
                  decade, of which runs with a different D/N share less
    choice        repeatedly the candidate that lowers the target's variance most per FLOP, or most
                  in all; the better of both sets

Without the discrepancy the cheapest runs would win, since a law that holds everywhere is measured
anywhere. Invariant: the choice depends on where runs lie and on known losses, on nothing else.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from rich.console import Console

from forescale.ground.console import table
from forescale.ground.errors import UserError
from forescale.run.forecast import SAME
from forescale.scaling.design.shapes import RATIO, Common
from forescale.scaling.design.simulate import RunSet
from forescale.scaling.fitting.forms import Design
from forescale.scaling.fitting.points import Array, Points, spent
from forescale.scaling.forecasting.calibrated import CalibratedLaw

_SHARED = 1.0  # decades of D/N over which the shared discrepancy of two runs falls to 1/e
_OPEN = 1.0  # prior standard deviation of the parameters: a factor of e, an exponent of 1
NOISE = 3e-4  # smallest noise of a run's log loss
_SPREAD = 2.5  # factor by which candidates' N differ from that with 20 tokens per parameter


@dataclass(frozen=True)
class NextRun:
    """A run to add. before, after: standard deviation of the law's log loss at the target, without
    this run and with it, in the order of choice."""

    parameters: float
    tokens: float
    flops: float
    before: float
    after: float


def recommend(law: CalibratedLaw, candidates: RunSet, target: RunSet, cap: float) -> list[NextRun]:
    """Return the runs to add for `cap` FLOPs together, the most useful first. target: one or
    several runs to predict; the variances of several are averaged. Raises UserError if the law's
    runs have no N or D, or if no candidate costs less than the cap."""
    if not (candidates.flops <= cap).any():
        least = candidates.flops.min()
        problem = f"the cheapest candidate costs {least:.3g} FLOPs, more than the cap of {cap:.3g}"
        raise UserError("cap", problem, "raise it")
    chosen, variances = choose(law, candidates, target, cap)
    columns = [x[chosen] for x in (candidates.parameters, candidates.tokens, candidates.flops)]
    deviations = np.sqrt(variances)
    rows = np.column_stack((*columns, deviations[:-1], deviations[1:]))
    return [NextRun(*row) for row in rows.tolist()]


def candidates_of(common: Common, low: float, high: float, known: Points) -> RunSet:
    """Return the runs that may be added, between `low` and `high` FLOPs by common.cost.

    Budgets are a quarter of a decade apart, sizes a fifth; of each budget those sizes count that
    get 3 to 130 tokens per parameter. Left out are sizes without a model, D beyond one epoch, and
    runs in `known`. Raises UserError if none is left.
    """
    if not 0 < low <= high:
        problem = f"{high:.3g} FLOPs are less than the cheapest run of the study, {low:.3g}"
        raise UserError("cap", problem, "raise it")
    shapes = dict[int, float]()
    for n in _steps(common.centre(low) / _SPREAD, common.centre(high) * _SPREAD, 10**0.2):
        with suppress(UserError):
            shape = common.family.solve(n)
            shapes[shape.parameters] = common.per_token(shape.model)[common.cost]
    logs = np.stack((known.log("parameters"), known.log("tokens")))

    def is_known(n: float, d: float) -> bool:
        away = np.abs(logs - np.log([[n], [d]]))
        return bool((away.max(0) < SAME).any())

    rows = [
        (float(n), budget / per, budget)
        for budget in _steps(low, high, 10**0.25)
        for n, per in shapes.items()
        if RATIO / _SPREAD**2 < budget / per / n < RATIO * _SPREAD**2
        and budget / per <= (common.unique or np.inf)
        and not is_known(n, budget / per)
    ]
    if not rows:
        problem = f"no model of this family has {low:.3g} to {high:.3g} FLOPs within one epoch"
        raise UserError("cap", problem, "change it, or train on more data")
    n, d, c = np.array(rows).T
    return RunSet(n, d, c)


def _steps(low: float, high: float, step: float) -> list[float]:
    """Values from low to high with equal factors of at most `step`."""
    count = 1 + int(np.ceil(np.log(high / low) / np.log(step) - 1e-9))
    return np.minimum(np.geomspace(low, high, count), high).tolist()


def choose(
    law: CalibratedLaw, candidates: RunSet, target: RunSet, cap: float
) -> tuple[list[int], list[float]]:
    """Return the indices of the chosen candidates, and the target's variance before the first and
    after each."""
    targets = len(target.flops)
    _, covariance = posterior(law, _joined(target, candidates))
    noise = max(law.noise, NOISE) ** 2
    # Greedy choice per cost may end arbitrarily far from the optimum, and so may greedy choice of
    # the variance alone; the better of both can't, for submodular gains (Leskovec et al. 2007, KDD,
    # section 3.2).
    powers = (1.0, 0.0)
    tried = [_greedy(covariance, targets, candidates.flops, noise, cap, p) for p in powers]
    return min(tried, key=lambda one: one[1][-1])


def _greedy(
    covariance: Array, targets: int, cost: Array, noise: float, cap: float, power: float
) -> tuple[list[int], list[float]]:
    """Choose greedily. covariance: of the targets followed by the candidates, given the runs;
    power: the decrease of variance is divided by cost^power."""
    left, free, chosen = cap, np.ones(len(cost), dtype=bool), list[int]()
    variances = [float(np.trace(covariance[:targets, :targets])) / targets]
    while (ok := free & (cost <= left)).any():
        rest = covariance[targets:, targets:].diagonal() + noise
        gain = np.square(covariance[:targets, targets:]).sum(0) / rest
        i = int(np.argmax(np.where(ok, gain / cost**power, -1.0)))
        chosen.append(i)
        free[i], left = False, left - cost[i]
        pull = covariance[:, targets + i]
        covariance = covariance - np.outer(pull, pull) / rest[i]
        variances.append(max(0.0, float(np.trace(covariance[:targets, :targets]))) / targets)
    return chosen, variances


def posterior(law: CalibratedLaw, points: RunSet) -> tuple[Array, Array]:
    """Return mean (m,) and covariance (m, m) of log loss at m points, given the runs, without the
    noise of a new run (Rasmussen and Williams 2006, section 2.7: a Gaussian process with explicit
    basis functions)."""
    fit, m = law.fit, len(points.flops)
    runs = run_set(fit.points)
    at = _joined(points, runs)
    columns = {"parameters": at.parameters, "tokens": at.tokens, "flops": at.flops}
    columns["unique_tokens"] = at.tokens  # no data is repeated
    centre = fit.task.at.centre
    logs = {c: np.log(columns[c]) - centre[c] for c in fit.form.columns}
    mean, jacobian = (x[0] for x in fit.form.evaluate(fit.theta, Design(logs, centre)))
    # The discrepancy: a Wiener process of log C from the cheapest run on, times a correlation that
    # decays with the distance in log D/N. A smooth process does better if the truth leaves the law
    # smoothly, and much worse if it doesn't.
    t = np.maximum(0.0, np.log10(at.flops / float(runs.flops.min())))
    ratio = np.log10(at.tokens / at.parameters)
    shared = np.exp(-np.abs(np.subtract.outer(ratio, ratio)) / _SHARED)
    discrepancy = law.discrepancy.per_decade**2 * np.minimum.outer(t, t) * shared
    prior = _OPEN**2 * jacobian.T @ jacobian + discrepancy
    observed = prior[m:, m:] + max(law.noise, NOISE) ** 2 * np.eye(len(fit.points))
    pull = np.linalg.solve(observed, prior[m:, :m]).T
    return mean[:m] + pull @ fit.residuals, prior[:m, :m] - pull @ prior[m:, :m]


def _joined(one: RunSet, other: RunSet) -> RunSet:
    names = ("parameters", "tokens", "flops")
    parts = {k: np.append(getattr(one, k), getattr(other, k)) for k in names}
    return RunSet(**parts)


def run_set(points: Points) -> RunSet:
    """Return N, D and C of the runs."""
    return RunSet(np.exp(points.log("parameters")), np.exp(points.log("tokens")), spent(points))


def show(choices: Sequence[NextRun], console: Console, rate: float | None = None) -> None:
    """Print the runs in order. rate: FLOP/s of a device, to show device-hours."""
    names = ("", "N", "D", "D/N", "FLOPs", *(["device-hours"] if rate else []), "target ±")
    rows = table(*names)
    for i, c in enumerate(choices, 1):
        hours = [f"{c.flops / rate / 3600:,.3g}"] if rate else []
        cells = (f"{c.parameters:.4g}", f"{c.tokens:.4g}", f"{c.tokens / c.parameters:.3g}")
        rows.add_row(str(i), *cells, f"{c.flops:.3g}", *hours, f"{c.after:.2%}")
    console.print(rows)
    if choices:
        console.print(
            f"{len(choices)} runs of {sum(c.flops for c in choices):.3g} FLOPs lower the "
            f"uncertainty of the law at the target from ± {choices[0].before:.2%} to "
            f"± {choices[-1].after:.2%} (one standard deviation of the loss, with discrepancy). In "
            "replays of known studies, this choice was no better than a random one if only a few "
            "cheap runs were added (3 % of the cost of all).",
            soft_wrap=True,
        )
