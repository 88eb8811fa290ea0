"""Runs chosen by what they tell of the target, against runs chosen at random: the error at the
dearest budget after a share of what all runs between would cost. Each share is spent at once, from
the two cheapest budgets on. Both ways foretell alike: by the law as `study fit` has it, by one with
weights toward the target, and by the linear law with its discrepancy that the choice is made by.

Public data where it is here (Llama 3's isoFLOP points; those of arXiv 2404.10102, off a figure, in
their nine budgets), each seed with another 70 % of it to choose from; and made-up surfaces, a new
one a seed: the Chinchilla law scattered, 7 budgets of 7 sizes over three decades, noise of 0.2 %,
and what leaves the law (2 % a decade): a walk, a slope that sets in late, a bend, nothing.
"""

import os
from itertools import product
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd

from forescale.scaling.design.next_runs import By, Replay, replay
from forescale.scaling.design.simulate import PUBLISHED
from forescale.scaling.fitting.backtest import PRIOR
from forescale.scaling.fitting.laws import CHINCHILLA
from forescale.scaling.fitting.points import Array, Points
from tests.benchmarks.pairing import Result

ROOT = Path(__file__).parents[2]
SHARES = (0.03, 0.1, 0.3)
# Hoffmann et al. 2022, arXiv 2203.15556, figure 3.
EPOCH = np.array([6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20, 1e21, 3e21])
SURFACES = ("walk", "slope", "bend", "nothing")


def measure(rounds: int, seeds: int = 40) -> list[Result]:
    """A result a set and share; `rounds` is not asked: nothing is timed."""
    print("error at the dearest budget, by the rule and at random; difference ± its standard error")
    print("| runs | foretold by | " + " | ".join(f"{s:.0%} of the pool" for s in SHARES) + " |")
    print("|" + "---|" * (2 + len(SHARES)), flush=True)
    found = []
    for by, name in product(get_args(By), (*public(), *SURFACES)):
        row = []
        for share in SHARES:
            made = replay_of(name, seeds, by, share)
            row.append(cell(made))
            pairs = zip(made.rule[:, 0].tolist(), made.random[:, 0].tolist(), strict=True)
            title = f"{name}, {by}, {share:.0%} of the pool"
            found.append(Result(title, "of loss", ("by the rule", "at random"), list(pairs)))
        print(f"| {name} | {by} | " + " | ".join(row) + " |", flush=True)
    return found


def cell(made: Replay) -> str:
    gap = (made.rule - made.random)[:, 0]
    error = gap.std(ddof=1) / np.sqrt(len(gap))
    ends = f"{made.rule.mean():.2%} {made.random.mean():.2%}"
    return f"{ends} ({gap.mean():+.2%} ± {error:.2%})"


def replay_of(name: str, seeds: int, by: By, share: float) -> Replay:
    """Of public data, or of surfaces, a new one a seed."""
    if name in (sets := public()):
        return replay(*sets[name], (share,), range(seeds), by)
    each = [replay(*surface(name, s), (share,), (s,), by) for s in range(seeds)]
    parts = (np.concatenate([getattr(r, k) for r in each]) for k in ("rule", "random", "start"))
    return Replay((share,), *parts)


def surface(kind: str, seed: int, noise: float = 2e-3) -> tuple[Points, Array]:
    """49 runs and their budgets."""
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
    """Points and budgets, of what is here."""
    data = Path(os.environ.get("FORESCALE_DATA", ROOT.parent / "shared" / "data")) / "scaling"
    found = {}
    if (path := data / "llama3_isoflops" / "llama_3.csv").exists():
        table = pd.read_csv(path)
        table = table[table.experiment == "llama_3__raw_loss"]
        columns = (table[k].to_numpy() for k in ("loss", "params", "tokens", "budget"))
        found["Llama 3"] = (points := Points(*columns)), points.flops
    if (path := data / "epoch_chinchilla" / "svg_extracted_data.csv").exists():
        table = pd.read_csv(path)
        N, C, loss = (table[k].to_numpy() for k in ("Model Size", "Training FLOP", "loss"))
        keep = loss < np.sort(loss)[-5]
        nearest = np.abs(np.log(C[:, None] / EPOCH)).argmin(1)
        found["Chinchilla"] = Points(loss, N, C / 6 / N, C).take(keep), EPOCH[nearest][keep]
    return found
