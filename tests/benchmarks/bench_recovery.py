"""How often nominal 90 % intervals hold the truth, over 200 studies of made-up runs: of the law's
parameters, of a in N* ~ C^a, of the loss at 4 and at 10 times the dearest run's compute.

The design: 5 budgets from 1e18 to 1e20 FLOPs, half a decade apart, 6 sizes each, from the best N
over 2.5 to 2.5 times that (30 runs), of the Chinchilla law as refitted in arXiv 2404.10102, off by
seed noise alone. Fitted and resampled as `study fit` does it. Nothing here leaves the law: what the
law itself is off by is for the roll-outs.
"""

from collections.abc import Iterator

import numpy as np

from forescale.scaling.design.simulate import PUBLISHED
from forescale.scaling.fitting import bootstrap
from forescale.scaling.fitting.bootstrap import Replicates
from forescale.scaling.fitting.fit import fit
from forescale.scaling.fitting.laws import CHINCHILLA, allocation
from forescale.scaling.fitting.objective import LEAST_SQUARES, Objective
from forescale.scaling.fitting.points import Array, Points
from tests.benchmarks.pairing import Result

BUDGETS, SIZES, SPREAD = np.geomspace(1e18, 1e20, 5), 6, 2.5
NEAR = 0.04  # as `study fit` has it: runs within 4 % of the least loss of their budget
LEVEL = 0.9
DRAWS = ("pairs", "residuals")
NAMES = (*CHINCHILLA.symbols, "a", "loss at 4 C", "loss at 10 C")
LABEL = f"nominally {LEVEL:.0%}:"
COLUMNS = ("noise", "objective", "resampled", "interval", *NAMES)


def measure(rounds: int, replicates: int = 200, studies: int = 200) -> list[Result]:
    """A row an interval; `rounds` is not asked: coverage is no time."""
    print(f"{studies} studies, {replicates} replicates each; % that a {LEVEL:.0%} interval covers")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS), flush=True)
    found = []
    for noise, goal in ((5e-4, Objective()), (2e-3, Objective()), (5e-3, Objective()),
                        (2e-3, LEAST_SQUARES)):  # fmt: skip
        covers = coverage(noise, goal, replicates, studies)
        for (draw, method), each in covers.items():
            words = (f"{noise:g}", str(goal).removesuffix(" on log loss"), draw, method)
            print("| " + " | ".join([*words, *(f"{100 * x:.1f}" for x in each)]) + " |", flush=True)
            name, facts = ", ".join(words), dict(zip(NAMES, map(float, each), strict=True))
            asked = "0.84 to 0.96 each" if (draw, method) == ("pairs", "corrected") else ""
            rows = [(float(x),) for x in each]
            found.append(Result(name, "covered", (LABEL,), rows, asked, facts))
    return found


def coverage(
    noise: float, goal: Objective, replicates: int, studies: int, draws: tuple[str, ...] = DRAWS
) -> dict[tuple[str, str], Array]:
    """Share of studies whose interval holds the truth, in NAMES' order, by (resampled, interval).
    noise: of a seed, standard deviation of log loss."""
    truth = quantities(CHINCHILLA.vector(PUBLISHED))
    inside: dict[tuple[str, str], list[Array]] = {}
    for seed in range(studies):
        for what, (low, high) in intervals(noise, goal, replicates, seed, draws):
            inside.setdefault(what, []).append((low <= truth) & (truth <= high))
    return {what: np.mean(each, axis=0) for what, each in inside.items()}


def intervals(
    noise: float, goal: Objective, replicates: int, seed: int, draws: tuple[str, ...]
) -> Iterator[tuple[tuple[str, str], Array]]:
    made = fit(CHINCHILLA, study(noise, seed), goal)
    for draw in draws:
        found: Replicates = getattr(bootstrap, draw)(made, replicates, seed)
        yield (draw, "corrected"), found.interval(LEVEL, quantities)
        yield (draw, "percentile"), found.interval(LEVEL, quantities, "percentile")


def study(noise: float, seed: int) -> Points:
    c = np.repeat(BUDGETS, SIZES)
    n = np.sqrt(c / 120) * np.tile(np.geomspace(1 / SPREAD, SPREAD, SIZES), len(BUDGETS))
    d = c / (6 * n)
    off = noise * np.random.default_rng(seed).standard_normal(len(c))
    loss = CHINCHILLA.predict(PUBLISHED, parameters=n, tokens=d) * np.exp(off)
    least = np.repeat(loss.reshape(-1, SIZES).min(1), SIZES)
    return Points(loss, n, d, c).take(loss <= least * (1 + NEAR))


def quantities(values: Array) -> Array:
    """(..., 8) of published parameters (..., 5), in NAMES' order."""
    target = np.array([4, 10]) * BUDGETS[-1]
    n = np.sqrt(target / 120)
    loss = CHINCHILLA.predict(values, parameters=n, tokens=target / (6 * n))
    a = allocation(CHINCHILLA, values)[..., None]
    return np.concatenate((values, a, loss), axis=-1)
