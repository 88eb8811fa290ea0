"""Which runs to add: those that make the target surest for what they cost.

    law           linear at the fit: its Jacobian, with next to nothing known of its parameters but
                  by the runs
    discrepancy   what the law itself is off by: a random walk along log C, by `a_decade` in a
                  decade, of which runs of other D/N share less
    choice        the candidate that takes most variance off the target for its FLOPs, again and
                  again; or most variance; whichever set leaves less
    replay        the same over runs whose losses are known, against choice at random

Without the discrepancy the cheapest runs would win: they tell the parameters of a law that holds
everywhere. Invariant: what is chosen depends on where runs lie, and on losses that are known.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

import numpy as np
from rich.console import Console

from forescale.console import table
from forescale.errors import UserError
from forescale.run.forecast import SAME
from forescale.scaling.analysis.weights import RunNoise, weigh
from forescale.scaling.design.shapes import RATIO, Common
from forescale.scaling.design.simulate import Design, Target
from forescale.scaling.fitting import bootstrap
from forescale.scaling.fitting.backtest import Discrepancy, Sure, spent, sure_of
from forescale.scaling.fitting.fit import Fit, fit
from forescale.scaling.fitting.forms import Design as At
from forescale.scaling.fitting.forms import Form
from forescale.scaling.fitting.laws import CHINCHILLA
from forescale.scaling.fitting.objective import Objective
from forescale.scaling.fitting.points import Array, Points

_SHARED = 1.0  # decades of D/N over which the discrepancy of two runs falls to 1/e
_OPEN = 1.0  # of the parameters beforehand, standard deviation: an e-fold, an exponent of 1
_NOISE = 3e-4  # of log loss, at least: no run tells more
_SPREAD = 2.5  # of the N of candidates, to either side of that with 20 tokens a parameter
# How a replay foretells the target: the law as `study fit` has it; fitted with weights `toward` the
# target; the linear law with the discrepancy that the choice is made by.
By = Literal["plain", "toward", "process"]
_START = 2  # budgets that a replay begins with
_PART = 0.7  # of the others, drawn anew for each of its seeds: what can be chosen


@dataclass(frozen=True)
class Choice:
    """before, after: standard deviation of log loss at the target, of what is not known of the law,
    without this run and with it, in the order of choice."""

    parameters: float
    tokens: float
    flops: float
    before: float
    after: float

    @property
    def gain(self) -> float:
        """Variance taken off, per FLOP."""
        return (self.before**2 - self.after**2) / self.flops


def recommend(law: Sure, candidates: Design, target: Target | Design, cap: float) -> list[Choice]:
    """The runs to add for `cap` FLOPs together, the first the one to begin with. target: a run to
    come, or several, whose variances are averaged. Raises UserError where the runs have no N or D,
    and where no candidate is within the cap."""
    if not (candidates.flops <= cap).any():
        what = (
            f"of {cap:.3g} FLOPs is less than the cheapest candidate, {candidates.flops.min():.3g}"
        )
        raise UserError("cap", what, "raise it, or offer cheaper runs")
    own, variances = _chosen(law, candidates, target, cap)
    deviations = np.sqrt(variances)
    return [
        Choice(
            *(float(x[i]) for x in (candidates.parameters, candidates.tokens, candidates.flops)),
            *map(float, deviations[k : k + 2]),
        )
        for k, i in enumerate(own)
    ]


def candidates_of(common: Common, low: float, high: float, known: Points) -> Design:
    """Runs between `low` and `high` FLOPs by common.cost, of shapes of the family: budgets a
    quarter of a decade apart, of each the sizes (a fifth of a decade apart) that get 3 to 130
    tokens a parameter. Sizes that can't be had, D beyond one epoch, and what is a run of `known`
    are left out. Raises UserError where none is left."""
    if not 0 < low <= high:
        raise UserError("cap", f"{high:.3g} is below the cheapest run, {low:.3g}", "raise it")
    shapes = dict[int, float]()
    for n in _steps(common.centre(low) / _SPREAD, common.centre(high) * _SPREAD, 10**0.2):
        with suppress(UserError):
            shape = common.family.solve(n)
            shapes[shape.parameters] = common.per_token(shape.model)[common.cost]
    rows = [
        (float(n), budget / per, budget)
        for budget in _steps(low, high, 10**0.25)
        for n, per in shapes.items()
        if RATIO / _SPREAD**2 < budget / per / n < RATIO * _SPREAD**2
        and budget / per <= (common.unique or np.inf)
        and not _is_known(known, n, budget / per)
    ]
    if not rows:
        what = f"no model of this family fits {low:.3g} to {high:.3g} FLOPs within its data"
        raise UserError("candidates", what, "change the cap, or take more data")
    n, d, c = np.array(rows).T
    return Design(n, d, c)


def _is_known(known: Points, parameters: float, tokens: float) -> bool:
    off = (known.log("parameters") - np.log(parameters), known.log("tokens") - np.log(tokens))
    return bool((np.max(np.abs(off), axis=0) < SAME).any())


def _steps(low: float, high: float, step: float) -> list[float]:
    """From one to the other by equal factors, none above `step`."""
    count = 1 + int(np.ceil(np.log(high / low) / np.log(step) - 1e-9))
    return np.minimum(np.geomspace(low, high, count), high).tolist()


def _chosen(
    law: Sure, candidates: Design, target: Target | Design, cap: float
) -> tuple[list[int], list[float]]:
    """Places among the candidates, and the target's variance before and after each."""
    targets = len(np.atleast_1d(target.flops))
    _, covariance = _known(law, _joined(target, candidates))
    noise = max(law.noise, _NOISE) ** 2
    # For the cost alone greed may end arbitrarily far from the best, and so may it for the variance
    # alone; the better of both can't (Leskovec et al. 2007, KDD, section 3.2, were it submodular).
    powers = (1.0, 0.0)
    tried = [_greedy(covariance, targets, candidates.flops, noise, cap, p) for p in powers]
    return min(tried, key=lambda one: one[1][-1])


def _greedy(
    covariance: Array, targets: int, cost: Array, noise: float, cap: float, power: float
) -> tuple[list[int], list[float]]:
    """covariance: of the targets, then of the candidates, given the runs; power: of the cost that
    the variance taken off is divided by."""
    left, free, own = cap, np.ones(len(cost), dtype=bool), list[int]()
    found = [float(np.trace(covariance[:targets, :targets])) / targets]
    while (ok := free & (cost <= left)).any():
        rest = covariance[targets:, targets:].diagonal() + noise
        gain = np.square(covariance[:targets, targets:]).sum(0) / rest
        i = int(np.argmax(np.where(ok, gain / cost**power, -1.0)))
        own.append(i)
        free[i], left = False, left - cost[i]
        pull = covariance[:, targets + i]
        covariance = covariance - np.outer(pull, pull) / rest[i]
        found.append(max(0.0, float(np.trace(covariance[:targets, :targets]))) / targets)
    return own, found


def _known(law: Sure, asked: Design) -> tuple[Array, Array]:
    """Of log loss at m places, given the runs: mean (m,) and covariance (m, m), noise of a run
    aside (Rasmussen and Williams 2006, section 2.7: a Gaussian process with explicit basis
    functions)."""
    made, m = law.fit, len(asked.flops)
    runs = _design(made.points)
    every = _joined(asked, runs)
    mean, jacobian = _linear(made, every)
    prior = _OPEN**2 * jacobian.T @ jacobian + _discrepancy(law, every, float(runs.flops.min()))
    seen = prior[m:, m:] + max(law.noise, _NOISE) ** 2 * np.eye(len(made.points))
    pull = np.linalg.solve(seen, prior[m:, :m]).T
    return mean[:m] + pull @ made.residuals, prior[:m, :m] - pull @ prior[m:, :m]


def _linear(made: Fit, at: Design) -> tuple[Array, Array]:
    """Log loss (m,) and its derivatives by the internal parameters, (p, m)."""
    columns = {"parameters": at.parameters, "tokens": at.tokens, "flops": at.flops}
    columns["unique_tokens"] = at.tokens  # none is read twice
    centre = made.task.at.centre
    logs = {c: np.log(columns[c]) - centre[c] for c in made.form.columns}
    mean, jacobian = made.form.evaluate(made.theta, At(logs, centre))
    return mean[0], jacobian[0]


def _discrepancy(law: Sure, at: Design, cheapest: float) -> Array:
    """Covariance (m, m): a Wiener process of log C from the cheapest run on, times one that forgets
    with D/N. A smooth process does better where the law bends smoothly, far worse where it doesn't.
    """
    t = np.maximum(0.0, np.log10(at.flops / cheapest))
    walked = law.discrepancy.a_decade**2 * np.minimum.outer(t, t)
    ratio = np.log10(at.tokens / at.parameters)
    return walked * np.exp(-np.abs(np.subtract.outer(ratio, ratio)) / _SHARED)


def _joined(one: Target | Design, other: Design) -> Design:
    names = ("parameters", "tokens", "flops")
    parts = {k: np.append(np.atleast_1d(getattr(one, k)), getattr(other, k)) for k in names}
    return Design(**parts)


@dataclass(frozen=True)
class Replay:
    """Mean size of the error (log loss) at the runs held out, after each share of the pool's cost:
    (seeds, shares); start: before anything is spent. Both ways foretell alike."""

    shares: Sequence[float]
    rule: Array
    random: Array
    start: Array


def replay(
    points: Points,
    budgets: Array,
    shares: Sequence[float] = (0.03, 0.1, 0.3),
    seeds: Sequence[int] = range(20),
    by: By = "process",
    form: Form = CHINCHILLA,
    goal: Objective | None = None,
) -> Replay:
    """Runs of the two cheapest budgets are known; those of the dearest are the target; what lies
    between, or a part that each seed draws, is there to choose from. At each share the law is
    fitted anew, and the rest is chosen by it. budgets: (n,), nominal. Raises UserError for fewer
    than four."""
    distinct = np.unique(budgets)
    if len(distinct) < _START + 2:
        what = f"{len(distinct)} budgets leave nothing to choose between"
        raise UserError(points.where, what, "give four or more")
    known = np.flatnonzero(budgets <= distinct[_START - 1])
    held, between = budgets == distinct[-1], (budgets > distinct[_START - 1])
    target = points.take(held)
    rows = list[list[list[float]]]()
    for seed in seeds:
        rng = np.random.default_rng(seed)
        whole = np.flatnonzero(between & ~held)
        pool = rng.choice(whole, max(1, round(_PART * len(whole))), replace=False)
        ways = (None, rng)
        rows.append(
            [
                _spend(points, known, np.sort(pool), target, shares, way, by, form, goal)
                for way in ways
            ]
        )
    found = np.array(rows)  # (seeds, 2, 1 + shares)
    return Replay(shares, found[:, 0, 1:], found[:, 1, 1:], found[:, 0, 0])


def _spend(
    points: Points, known: Array, pool: Array, target: Points, shares: Sequence[float],
    rng: np.random.Generator | None, by: By, form: Form, goal: Objective | None,
) -> list[float]:  # fmt: skip
    """Errors at the start and after each share, by the rule, or at random."""
    cost = spent(points)
    total, used = cost[pool].sum(), 0.0
    law, error = _met(points.take(known), target, by, form, goal)
    errors = [error]
    for share in shares:
        cap = share * total - used
        if (cost[pool] <= cap).any():
            if rng is None:
                chosen = _chosen(law, _design(points.take(pool)), _design(target), cap)[0]
            else:
                chosen = _at_random(cost[pool], cap, rng)
            known, used = np.append(known, pool[chosen]), used + cost[pool[chosen]].sum()
            pool = np.delete(pool, chosen)
            law, error = _met(points.take(known), target, by, form, goal)
        errors.append(error)
    return errors


def _met(
    known: Points, target: Points, by: By, form: Form, goal: Objective | None
) -> tuple[Sure, float]:
    """The law of what is known, and its mean error at the target."""
    made = fit(form, known, goal)
    law = sure_of(made, bootstrap.pairs(made, 1), Discrepancy())
    if by == "process":
        mean = _known(law, _design(target))[0]
    else:
        if by == "toward":
            aim = float(np.exp(np.log(spent(target)).mean()))
            noise = RunNoise(max(law.noise, _NOISE))
            made = fit(form, known, goal, weigh(spent(known), noise, aim))
        mean = np.log(made.predict(**{c: np.exp(target.log(c)) for c in form.columns}))
    return law, float(np.abs(mean - np.log(target.loss)).mean())


def _at_random(cost: Array, cap: float, rng: np.random.Generator) -> list[int]:
    found = list[int]()
    for i in rng.permutation(len(cost)).tolist():
        if cost[i] <= cap:
            found.append(i)
            cap -= cost[i]
    return found


def _design(points: Points) -> Design:
    return Design(np.exp(points.log("parameters")), np.exp(points.log("tokens")), spent(points))


def show(choices: Sequence[Choice], console: Console, rate: float | None = None) -> None:
    """Print them in their order. rate: FLOPs a second of a device, for device-hours."""
    names = ("", "N", "D", "D/N", "FLOPs", *(["device-hours"] if rate else []), "target ±")
    rows = table(*names)
    for i, c in enumerate(choices, 1):
        hours = [f"{c.flops / rate / 3600:,.3g}"] if rate else []
        cells = (f"{c.parameters:.4g}", f"{c.tokens:.4g}", f"{c.tokens / c.parameters:.3g}")
        rows.add_row(str(i), *cells, f"{c.flops:.3g}", *hours, f"{c.after:.2%}")
    console.print(rows)
    if choices:
        console.print(
            f"{len(choices)} runs of {sum(c.flops for c in choices):.3g} FLOPs take what is not "
            f"known of the law at the target from ± {choices[0].before:.2%} to "
            f"{choices[-1].after:.2%} (one standard deviation of the loss, discrepancy included). "
            "In replays of a few cheap runs (3 % of the cost of all), chance did as well.",
            soft_wrap=True,
        )
