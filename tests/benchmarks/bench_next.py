"""Runs chosen by the rule of next_runs.py against runs chosen at random.

Measures the error at the most expensive budget after a share of the cost of all runs in between is
spent at once, starting from the two cheapest budgets. Both choices predict by the same law: as
`study fit` fits it (plain), or by the linear law with the discrepancy that the choice uses
(process).

Public data, if it is there (Llama 3's isoFLOP points; those of arXiv 2404.10102, digitised from a
figure, in their nine budgets); each seed may choose from another 70 % of it. And simulated studies,
a new one per seed: the Chinchilla law scattered, 7 budgets of 7 sizes over three decades, noise of
0.2 %, and a discrepancy of 2 % per decade: a walk, a slope that starts late, a bend, or nothing.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd

from forescale.ground.errors import UserError
from forescale.scaling.design.next_runs import choose, posterior, run_set
from forescale.scaling.design.simulate import PUBLISHED
from forescale.scaling.fitting import bootstrap
from forescale.scaling.fitting.fit import fit
from forescale.scaling.fitting.forms import Form
from forescale.scaling.fitting.laws import CHINCHILLA
from forescale.scaling.fitting.objective import Objective
from forescale.scaling.fitting.points import Array, Points, spent
from forescale.scaling.forecasting.calibrated import CalibratedLaw, calibrate
from forescale.scaling.forecasting.predictor import PRIOR, Discrepancy
from tests.benchmarks.pairing import Result

ROOT = Path(__file__).parents[2]
# Hoffmann et al. 2022, arXiv 2203.15556, figure 3.
EPOCH = np.array([6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21])
By = Literal["plain", "process"]  # how a replay predicts the target
START = 2  # budgets that a replay knows from the start
PART = 0.7  # of the others, drawn by each seed: the pool to choose from
SURFACES = ("walk", "slope", "bend", "nothing")


@dataclass(frozen=True)
class Replay:
    """Mean absolute error (log loss) at the held-out runs, after each share of the pool's cost:
    (seeds, shares), with the rule's choice and with a random one; start: (seeds,), before any."""

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
    """Choose among runs whose losses are known, and return the errors of the predictions.

    The runs of the two cheapest budgets are known from the start, those of the most expensive one
    are the target, and each seed draws the pool to choose from out of the others. The law is refit
    at each share of the cost. budgets: (n,), nominal. Raises UserError for fewer than four.
    """
    distinct = np.unique(budgets)
    if len(distinct) < START + 2:
        problem = f"{len(distinct)} budgets leave no runs to choose from"
        raise UserError(points.where, problem, "give four or more")
    known = np.flatnonzero(budgets <= distinct[START - 1])
    held, between = budgets == distinct[-1], (budgets > distinct[START - 1])
    target = points.take(held)
    rows = list[list[list[float]]]()
    for seed in seeds:
        rng = np.random.default_rng(seed)
        others = np.flatnonzero(between & ~held)
        pool = rng.choice(others, max(1, round(PART * len(others))), replace=False)
        ways = (None, rng)
        rows.append(
            [
                _errors(points, known, np.sort(pool), target, shares, way, by, form, goal)
                for way in ways
            ]
        )
    curves = np.array(rows)  # (seeds, 2, 1 + shares)
    return Replay(shares, curves[:, 0, 1:], curves[:, 1, 1:], curves[:, 0, 0])


def _errors(
    points: Points, known: Array, pool: Array, target: Points, shares: Sequence[float],
    rng: np.random.Generator | None, by: By, form: Form, goal: Objective | None,
) -> list[float]:  # fmt: skip
    """Errors at the start and after each share, chosen by the rule (rng None) or at random."""
    cost = spent(points)
    total, used = cost[pool].sum(), 0.0
    law, error = _refit(points.take(known), target, by, form, goal)
    errors = [error]
    for share in shares:
        cap = share * total - used
        if (cost[pool] <= cap).any():
            if rng is None:
                chosen = choose(law, run_set(points.take(pool)), run_set(target), cap)[0]
            else:
                chosen = _random_choice(cost[pool], cap, rng)
            known, used = np.append(known, pool[chosen]), used + cost[pool[chosen]].sum()
            pool = np.delete(pool, chosen)
            law, error = _refit(points.take(known), target, by, form, goal)
        errors.append(error)
    return errors


def _refit(
    known: Points, target: Points, by: By, form: Form, goal: Objective | None
) -> tuple[CalibratedLaw, float]:
    """Fit the known runs; return the law and its mean error at the target."""
    refit = fit(form, known, goal)
    law = calibrate(refit, bootstrap.pairs(refit, 1), Discrepancy())
    if by == "process":
        mean = posterior(law, run_set(target))[0]
    else:
        mean = np.log(refit.predict(**{c: np.exp(target.log(c)) for c in form.columns}))
    return law, float(np.abs(mean - np.log(target.loss)).mean())


def _random_choice(cost: Array, cap: float, rng: np.random.Generator) -> list[int]:
    indices = list[int]()
    for i in rng.permutation(len(cost)).tolist():
        if cost[i] <= cap:
            indices.append(i)
            cap -= cost[i]
    return indices


@dataclass(frozen=True)
class Sizes:
    """seeds: replays of each set of runs, two or more; shares: of the cost of the pool; surfaces:
    of simulated studies; public: whether public data is taken too."""

    seeds: int
    shares: tuple[float, ...]
    surfaces: tuple[str, ...]
    public: bool


REAL = Sizes(40, (0.03, 0.1, 0.3), SURFACES, public=True)
TOY = Sizes(2, (0.1,), ("bend",), public=False)


def measure(rounds: int, sizes: Sizes = REAL) -> list[Result]:
    """Return a result for each set of runs and share. `rounds` is ignored: nothing is timed."""
    print(
        "error at the most expensive budget: by the rule, at random (difference ± standard error)"
    )
    print(
        "| runs | predicted by | " + " | ".join(f"{s:.0%} of the pool" for s in sizes.shares) + " |"
    )
    print("|" + "---|" * (2 + len(sizes.shares)), flush=True)
    results = []
    names = (*(public() if sizes.public else ()), *sizes.surfaces)
    for by, name in product(get_args(By), names):
        row = []
        for share in sizes.shares:
            replay = replay_of(name, sizes.seeds, by, share)
            row.append(cell(replay))
            pairs = zip(replay.rule[:, 0].tolist(), replay.random[:, 0].tolist(), strict=True)
            title = f"{name}, {by}, {share:.0%} of the pool"
            results.append(Result(title, "of loss", ("by the rule", "at random"), list(pairs)))
        print(f"| {name} | {by} | " + " | ".join(row) + " |", flush=True)
    return results


def cell(replay: Replay) -> str:
    gap = (replay.rule - replay.random)[:, 0]
    error = gap.std(ddof=1) / np.sqrt(len(gap))
    ends = f"{replay.rule.mean():.2%} {replay.random.mean():.2%}"
    return f"{ends} ({gap.mean():+.2%} ± {error:.2%})"


def replay_of(name: str, seeds: int, by: By, share: float) -> Replay:
    """Replay public data, or simulated studies, a new one per seed."""
    if name in (sets := public()):
        return replay(*sets[name], (share,), range(seeds), by)
    each = [replay(*surface(name, s), (share,), (s,), by) for s in range(seeds)]
    parts = (np.concatenate([getattr(r, k) for r in each]) for k in ("rule", "random", "start"))
    return Replay((share,), *parts)


def surface(kind: str, seed: int, noise: float = 2e-3) -> tuple[Points, Array]:
    """Return 49 simulated runs and their budgets."""
    rng, steps = np.random.default_rng(seed), np.geomspace(1e18, 1e21, 7)
    c = np.repeat(steps, 7)
    n = np.sqrt(c / 120) * np.tile(np.geomspace(0.3, 3, 7), 7)
    d = c / (6 * n)
    law = {k: v * np.exp(0.1 * rng.standard_normal()) for k, v in PUBLISHED.items()}
    for term, exponent, x in (("A", "alpha", n), ("B", "beta", d)):
        law[term] *= np.exp((law[exponent] - PUBLISHED[exponent]) * np.log(x).mean())
    t, walk = np.log10(c / 1e18), np.cumsum(np.sqrt(0.5) * rng.standard_normal(6))
    off = {
        "walk": np.repeat([0.0, *walk], 7),
        "slope": walk[0] * np.sqrt(2) * np.maximum(0, t - 1.5),
        "bend": walk[0] * np.sqrt(2) * t**2 / 3,
        "nothing": 0 * t,
    }[kind]
    pure = CHINCHILLA.predict(law, parameters=n, tokens=d)
    return Points(pure * np.exp(PRIOR * off + noise * rng.standard_normal(49)), n, d, c), c


def public() -> dict[str, tuple[Points, Array]]:
    """Return points and budgets of the public data that is there."""
    data = Path(os.environ.get("FORESCALE_DATA", ROOT.parent / "shared" / "data")) / "scaling"
    tables = {}
    if (path := data / "llama3_isoflops" / "llama_3.csv").exists():
        table = pd.read_csv(path)
        table = table[table.experiment == "llama_3__raw_loss"]
        columns = (table[k].to_numpy() for k in ("loss", "params", "tokens", "budget"))
        tables["Llama 3"] = (points := Points(*columns)), points.flops
    if (path := data / "epoch_chinchilla" / "svg_extracted_data.csv").exists():
        table = pd.read_csv(path)
        N, C, loss = (table[k].to_numpy() for k in ("Model Size", "Training FLOP", "loss"))
        keep = loss < np.sort(loss)[-5]
        nearest = np.abs(np.log(C[:, None] / EPOCH)).argmin(1)
        tables["Chinchilla"] = Points(loss, N, C / 6 / N, C).take(keep), EPOCH[nearest][keep]
    return tables
