"""Measures a study's own noise from its repeats and sweeps, in place of the assumed noise.

    repeats   runs of one cell with several seeds -> standard deviation of log loss, by the weights'
              seed and by the data's if the runs separate them; cells at two budgets -> its exponent
    sweeps    three or more learning rates of one cell -> the tuning gap: how far the best run is
              above their parabola

Invariant: each number carries the number of runs behind it; what was not measured stays as assumed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from forescale.scaling.analysis.ratio import Spread
from forescale.scaling.design.simulate import CENTRE, Assumptions
from forescale.scaling.design.tuning import tuned

# Two levels of a few seeds each measure the exponent to about +-0.2, so a prior holds it near the
# assumed value.
_FADING = 0.1  # standard deviation of that prior
_RATES = 3  # learning rates that a parabola needs
_LOUD = 0.01  # of log loss; the minima of neighbouring budgets differ by a few percent


@dataclass(frozen=True)
class Level:
    """The noise of one repeated cell. flops: C of a run; runs: how many, the cell's own included;
    noise: over all seeds; weights, data: over one kind of seed alone."""

    cell: str
    flops: float
    runs: int
    noise: Spread
    weights: Spread | None
    data: Spread | None


@dataclass(frozen=True)
class Noise:
    """The noise of a study. gap: root mean square excess of log loss by the learning rate, over
    `sweeps` cells; edges: number of sweeps whose best rate is at an edge and that give no gap."""

    levels: tuple[Level, ...]
    gap: float | None
    sweeps: int
    edges: int

    @property
    def warning(self) -> str:
        """What to do about noise at the lowest repeated budget that no law can see through; "" if
        it is low."""
        loud = [level for level in self.levels[:1] if level.noise.sd > _LOUD]
        return "".join(
            f"At {level.flops:.2g} FLOPs another seed moves the loss by {level.noise.sd:.1%} "
            f"(standard deviation of {level.runs} runs), and no law predicts such runs better "
            "than that. Plan a study with larger budgets: a higher plan.cap, or a smaller "
            "plan.step."
            for level in loud
        )

    def assumed(self) -> Assumptions:
        """Return the usual assumptions with all that was measured in place. The exponent
        `fading` combines the levels with a prior at the assumed value, +-0.1; the noise is that of
        all levels, scaled to one C."""
        before = Assumptions()
        assumptions = before if self.gap is None else replace(before, gap=self.gap)
        known = [level for level in self.levels if level.noise.sd > 0]
        if not known:
            return assumptions
        x = np.log([level.flops / CENTRE for level in known])
        sd = np.array([level.noise.sd for level in known])
        free = np.array([level.noise.free for level in known], dtype=float)
        # The logarithm of a standard deviation varies by 1 / (2 free).
        off = x - np.average(x, weights=free)
        precision = 2 * float((free * off**2).sum())
        slope = -2 * float((free * off * np.log(sd)).sum())
        prior = 1 / _FADING**2
        fading = (slope + before.fading * prior) / (precision + prior)
        noise = math.sqrt(np.average((sd * np.exp(fading * x)) ** 2, weights=free))
        floor = min(before.floor, float(sd.min()))
        return replace(assumptions, noise=noise, fading=fading, floor=floor)


def noise_of(table: pd.DataFrame, cost: str = "flops_causal") -> Noise:
    """Return the noise of a study.

    table: one row per run with name, role (grid, rate, seed, ...), cell_of (the grid cell that it
    repeats or varies; a grid cell's own name), learning_rate, loss and the column `cost`; seed and
    init_seed if known. Rows whose loss is not finite are left out.
    """
    if table.empty or "role" not in table:
        return Noise((), None, 0, 0)
    table = table[np.isfinite(table["loss"])]
    levels, gaps, edges = list[Level](), list[float](), 0
    for cell, runs in table.groupby("cell_of", sort=False):
        repeats = runs[runs["role"].isin(("grid", "seed"))]
        if (whole := _spread([repeats])) is not None:
            weights = data = None
            if {"seed", "init_seed"} <= set(repeats.columns):
                weights = _spread([rows for _, rows in repeats.groupby("seed")])
                data = _spread([rows for _, rows in repeats.groupby("init_seed")])
            if weights and data:
                # Each of these runs has one new seed; runs with two new seeds scatter more.
                whole = Spread(math.hypot(weights.sd, data.sd), weights.free + data.free)
            flops = float(repeats[cost].mean())
            levels.append(Level(str(cell), flops, len(repeats), whole, weights, data))
        sweep = runs[runs["role"].isin(("grid", "rate"))].drop_duplicates("learning_rate")
        if len(sweep) >= _RATES:
            best = tuned(sweep["learning_rate"].tolist(), sweep["loss"].tolist())
            gaps += [best.gap] if best.inside else []
            edges += not best.inside
    levels.sort(key=lambda level: level.flops)
    gap = math.sqrt(np.square(gaps).mean()) if gaps else None
    return Noise(tuple(levels), gap, len(gaps), edges)


def _spread(groups: Sequence[pd.DataFrame]) -> Spread | None:
    """Pooled over groups of runs; None if no group has two runs."""
    spread = Spread.within(np.log(rows["loss"].to_numpy()) for rows in groups)
    return spread if spread.free else None
