"""Simulated recipes with known compute multipliers.

L = (E + A (m C)^-b) exp(bend log(rate / best)^2 + noise): a recipe with the multiplier m has
at C the loss of the base at m C.
"""

import numpy as np
import pandas as pd

E, A, B, C0 = 1.2, 1.0, 0.15, 1e11
BUDGETS = (1e11, 3.16e11, 1e12)
BEST, RATES, BEND = 0.01, (0.005, 0.01, 0.02), 0.01


def law(flops, multiplier=1.0):
    """The loss at the best learning rate, without noise."""
    return E + A * (multiplier * np.asarray(flops) / C0) ** -B


def runs(rng, multipliers, noise=0.002, seeds=3, budgets=BUDGETS, rates=RATES) -> pd.DataFrame:
    """A table of recipe, flops, learning_rate, seed and loss: each recipe at each budget and rate,
    with more seeds at the best rate. The base also at 2/5 of the lowest budget and 5/2 of the
    highest. multipliers: by name, or a function of C."""
    ends = (budgets[0] * 0.4, *budgets, budgets[-1] * 2.5)
    rows = []
    for recipe, multiplier in {"base": 1.0, **multipliers}.items():
        for flops in ends if recipe == "base" else budgets:
            m = multiplier(flops) if callable(multiplier) else multiplier
            runs_of = [(rate, 0) for rate in rates] + [(BEST, seed) for seed in range(1, seeds)]
            for rate, seed in runs_of:
                off = BEND * np.log(rate / BEST) ** 2 + noise * rng.standard_normal()
                loss = law(flops, m) * np.exp(off)
                rows.append((recipe, flops, rate, seed, loss))
    return pd.DataFrame(rows, columns=["recipe", "flops", "learning_rate", "seed", "loss"])
