"""Coverage of nominal 90 % intervals over 200 simulated studies.

The intervals are those of the law's parameters, of a in N* ~ C^a, and of the loss at extrapolation
factors of 4 and 10. The design has 5 budgets from 1e18 to 1e20 FLOPs, half a decade apart, with 6
sizes each, from the optimal N divided by 2.5 to 2.5 times that (30 runs). The losses are those of
the Chinchilla law as refitted in arXiv 2404.10102 with seed noise, fitted and resampled as in
`study fit`. The simulated law is exact: backtests measure the error of a law itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from forescale.scaling.design.simulate import PUBLISHED
from forescale.scaling.fitting.bootstrap import pairs
from forescale.scaling.fitting.fit import fit
from forescale.scaling.fitting.laws import CHINCHILLA, allocation
from forescale.scaling.fitting.objective import LEAST_SQUARES, Objective
from forescale.scaling.fitting.points import Array, Points
from tests.benchmarks.pairing import Result

BUDGETS, SIZES, SPREAD = np.geomspace(1e18, 1e20, 5), 6, 2.5
NEAR = 0.04  # as in `study fit`: runs within 4 % of the least loss of their budget
LEVEL = 0.9
NAMES = (*CHINCHILLA.symbols, "a", "loss at 4 C", "loss at 10 C")
LABEL = f"nominally {LEVEL:.0%}:"
COLUMNS = ("noise", "objective", "interval", *NAMES)


@dataclass(frozen=True)
class Sizes:
    replicates: int
    studies: int


REAL, TOY = Sizes(200, 200), Sizes(50, 1)


def measure(rounds: int, sizes: Sizes = REAL) -> list[Result]:
    """Return and print a row per kind of interval; `rounds` is unused, since nothing is timed."""
    studies, replicates = sizes.studies, sizes.replicates
    print(f"{studies} studies, {replicates} replicates each; % that a {LEVEL:.0%} interval covers")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS), flush=True)
    results = []
    for noise, goal in ((5e-4, Objective()), (2e-3, Objective()), (5e-3, Objective()),
                        (2e-3, LEAST_SQUARES)):  # fmt: skip
        covers = coverage(noise, goal, replicates, studies)
        for method, each in covers.items():
            labels = (f"{noise:g}", str(goal).removesuffix(" on log loss"), method)
            print(
                "| " + " | ".join([*labels, *(f"{100 * x:.1f}" for x in each)]) + " |", flush=True
            )
            name, facts = ", ".join(labels), dict(zip(NAMES, map(float, each), strict=True))
            required = "0.84 to 0.96 each" if method == "corrected" else ""
            rows = [(float(x),) for x in each]
            results.append(Result(name, "covered", (LABEL,), rows, required, facts))
    return results


def coverage(noise: float, goal: Objective, replicates: int, studies: int) -> dict[str, Array]:
    """Return the share of studies whose interval holds the truth, by the interval's method.

    Each is (8,), in the order of NAMES. noise: standard deviation of log loss between seeds.
    """
    truth = quantities(CHINCHILLA.vector(PUBLISHED))
    inside: dict[str, list[Array]] = {}
    for seed in range(studies):
        for method, (low, high) in intervals(noise, goal, replicates, seed):
            inside.setdefault(method, []).append((low <= truth) & (truth <= high))
    return {method: np.mean(each, axis=0) for method, each in inside.items()}


def intervals(
    noise: float, goal: Objective, replicates: int, seed: int
) -> Iterator[tuple[str, Array]]:
    """Yield the intervals of one study, (2, 8), by their method."""
    replicated = pairs(fit(CHINCHILLA, study(noise, seed), goal), replicates, seed)
    yield "corrected", replicated.interval(LEVEL, quantities)
    yield "percentile", replicated.interval(LEVEL, quantities, "percentile")


def study(noise: float, seed: int) -> Points:
    """Return the runs of one simulated study that `study fit` would use."""
    c = np.repeat(BUDGETS, SIZES)
    n = np.sqrt(c / 120) * np.tile(np.geomspace(1 / SPREAD, SPREAD, SIZES), len(BUDGETS))
    d = c / (6 * n)
    off = noise * np.random.default_rng(seed).standard_normal(len(c))
    loss = CHINCHILLA.predict(PUBLISHED, parameters=n, tokens=d) * np.exp(off)
    least = np.repeat(loss.reshape(-1, SIZES).min(1), SIZES)
    return Points(loss, n, d, c).take(loss <= least * (1 + NEAR))


def quantities(values: Array) -> Array:
    """Return all quantities in NAMES, (..., 8), of published parameters, (..., 5)."""
    target = np.array([4, 10]) * BUDGETS[-1]
    n = np.sqrt(target / 120)
    loss = CHINCHILLA.predict(values, parameters=n, tokens=target / (6 * n))
    a = allocation(CHINCHILLA, values)[..., None]
    return np.concatenate((values, a, loss), axis=-1)
