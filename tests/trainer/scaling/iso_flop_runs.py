"""IsoFLOP runs of the law TRUTH, with noise: what forecasts and backtests are tested on."""

import numpy as np
import pandas as pd

from forescale.scaling.fitting.laws import CHINCHILLA
from forescale.scaling.fitting.points import Points

TRUTH = {"A": 400.0, "B": 2000.0, "E": 1.8, "alpha": 0.35, "beta": 0.37}


def iso_flop_runs(distinct, sizes=6, width=3.0, noise=0.0, seed=0, gain=1.0):
    """Return the runs of some budgets, and the budget of each, (n,). sizes: models of a budget, up
    to `width` times smaller and larger than its middle one; noise: of log loss; gain: by so many
    times less compute each loss is reached, as if N and D were larger by its root."""
    c = np.repeat(distinct, sizes)
    n = 0.1 * c**0.5 * np.tile(np.geomspace(1 / width, width, sizes), len(distinct))
    larger = gain**0.5
    loss = CHINCHILLA.predict(TRUTH, parameters=n * larger, tokens=c / (6 * n) * larger)
    loss *= np.exp(noise * np.random.default_rng(seed).standard_normal(len(c)))
    return Points(loss, parameters=n, tokens=c / (6 * n), flops=c), c


def iso_flop_table(distinct, **options) -> pd.DataFrame:
    """Return such runs as records."""
    runs, c = iso_flop_runs(distinct, **options)
    names = ("parameters", "tokens", "flops", "loss")
    return pd.DataFrame({name: getattr(runs, name) for name in names} | {"budget": c})
