"""What the seeds and crosses of a study say of its noise, in place of what was assumed.

    seeds      runs of one cell -> standard deviation of log loss, of the weights' seed and of the
               data's apart where the runs tell them apart; cells at two budgets -> how it fades
    crosses    three or more learning rates of one cell -> what the best of them is above their
               parabola: the tuning gap

Invariant: each number stands with how many runs it is from; what nobody measured stays as assumed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from forescale.scaling.design.simulate import CENTRE, Assumptions
from forescale.scaling.design.tuning import tuned

# Two levels of a few seeds each tell an exponent to +-0.2 or so: it is held near what was assumed.
_FADING = 0.1  # standard deviation of what is believed of it beforehand
_RATES = 3  # of a parabola


@dataclass(frozen=True)
class Spread:
    """sd: of log loss; free: degrees of freedom that it is from."""

    sd: float
    free: int


@dataclass(frozen=True)
class Level:
    """A cell that was repeated. flops: C of a run; runs: of the cell, its own included; noise: of a
    run that is new in all its seeds; weights, data: of a new seed of either alone."""

    cell: str
    flops: float
    runs: int
    noise: Spread
    weights: Spread | None
    data: Spread | None


@dataclass(frozen=True)
class Noise:
    """gap: log loss that is typically (root mean square) lost to the learning rate, of `crosses`
    cells; edges: cells whose best rate was at an edge, and which tell none."""

    levels: tuple[Level, ...]
    gap: float | None
    crosses: int
    edges: int

    def assumed(self, told: Assumptions | None = None) -> Assumptions:
        """With what was measured in place of what was `told`. The exponent of fading weighs the
        levels against what was told, +-0.1; the noise is that of all levels brought to one C."""
        told = told or Assumptions()
        found = told if self.gap is None else replace(told, gap=self.gap)
        known = [level for level in self.levels if level.noise.sd > 0]
        if not known:
            return found
        x = np.log([level.flops / CENTRE for level in known])
        sd = np.array([level.noise.sd for level in known])
        free = np.array([level.noise.free for level in known], dtype=float)
        # The logarithm of a standard deviation varies by 1 / (2 free).
        off = x - np.average(x, weights=free)
        precision = 2 * float((free * off**2).sum())
        slope = -2 * float((free * off * np.log(sd)).sum())
        prior = 1 / _FADING**2
        fading = (slope + told.fading * prior) / (precision + prior)
        noise = math.sqrt(np.average((sd * np.exp(fading * x)) ** 2, weights=free))
        floor = min(told.floor, float(sd.min()))
        return replace(found, noise=noise, fading=fading, floor=floor)


def noise_of(table: pd.DataFrame, cost: str = "flops_causal") -> Noise:
    """table: a row a run, with name, role (grid, rate, seed, ...), cell_of (the grid cell that it
    repeats or tunes, its own name for that cell), learning_rate, loss and the column `cost`; seed
    and init_seed where they are known. Losses that are no number are left out."""
    if table.empty or "role" not in table:
        return Noise((), None, 0, 0)
    table = table[np.isfinite(table["loss"])]
    levels, gaps, edges = list[Level](), list[float](), 0
    for cell, runs in table.groupby("cell_of", sort=False):
        again = runs[runs["role"].isin(("grid", "seed"))]
        if len(again) > 1:
            levels.append(_level(str(cell), again, cost))
        cross = runs[runs["role"].isin(("grid", "rate"))].drop_duplicates("learning_rate")
        if len(cross) >= _RATES:
            best = tuned(cross["learning_rate"].tolist(), cross["loss"].tolist())
            gaps += [best.gap] if best.inside else []
            edges += not best.inside
    levels.sort(key=lambda level: level.flops)
    gap = math.sqrt(np.square(gaps).mean()) if gaps else None
    return Noise(tuple(levels), gap, len(gaps), edges)


def _level(cell: str, runs: pd.DataFrame, cost: str) -> Level:
    whole = _spread([runs])
    weights = data = None
    if {"seed", "init_seed"} <= set(runs.columns):
        weights = _spread([own for _, own in runs.groupby("seed")])
        data = _spread([own for _, own in runs.groupby("init_seed")])
    if weights and data:
        # Each of these runs is new in one of the two: they scatter less than runs new in both.
        whole = Spread(math.hypot(weights.sd, data.sd), weights.free + data.free)
    assert whole is not None
    return Level(cell, float(runs[cost].mean()), len(runs), whole, weights, data)


def _spread(groups: Sequence[pd.DataFrame]) -> Spread | None:
    """Pooled over groups of runs that differ in one thing; None where no group has two."""
    logs = [np.log(own["loss"].to_numpy()) for own in groups if len(own) > 1]
    if not logs:
        return None
    free = sum(len(y) - 1 for y in logs)
    return Spread(math.sqrt(sum(((y - y.mean()) ** 2).sum() for y in logs) / free), free)
