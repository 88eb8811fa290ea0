"""The compute multiplier of each recipe: the base's compute for the recipe's loss / the recipe's.

    multiplier   m = C_base(L) / C: above 1, the recipe needs less compute than the base. C_base is
                 the base's own curve read backwards (BaseCurve), never extrapolated
    interval     from drawn studies: each mean loss anew, with the noise of repeated runs (pooled
                 over all recipes and budgets, so Student's t); the base's curve is drawn with it
    trend        the factor by which m changes in a decade of compute: least squares of log m
    other costs  the same for seconds of training, parameters in memory and bytes of text: what the
                 base has of them at C_base(L), by a straight line of logs between its budgets, over
                 what the recipe has. Seconds only of runs under the same conditions
    confirmed    m from seeds of both that no choice has seen, at the settings that earlier fresh
                 seeds chose (design/kinds.py), so that no search's luck decides: the compute at
                 which the curve has the recipe's loss, over that at which it has the base's

Invariant: all recipes are treated alike; a multiplier below 1 is as much a result as one above.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy.optimize import isotonic_regression

from forescale.ground.errors import UserError
from forescale.scaling.analysis.ratio import Ratio, Spread
from forescale.scaling.analysis.recipe_cells import COSTS, RecipeCell, cells_of
from forescale.scaling.config import StudyJob
from forescale.scaling.fitting.points import Array

_FLOORS = np.linspace(0.0, 0.97, 98)  # tried floors, in units of the lowest loss
_LEAST = 3  # budgets that tell a floor
_HEADROOM = 1e-6  # of the lowest loss, that stays above the floor in each drawn curve
_DRAWS = 2000
_BUDGETS = 2  # of the base: fewer are no curve
_DECADE = np.log(10.0)
_UNEVEN = 3.0  # times the noise of the other budgets that is worth a note
_UNKNOWN = (0.0, np.inf)  # ends of an interval without a measured noise
_NO_ANSWER = Ratio(np.nan, *_UNKNOWN)  # of fresh seeds


class BaseCurve:
    """The base at its budgets. log_flops: (k,), increasing; log_losses: (k,), the mean of its
    runs."""

    def __init__(self, log_flops: Array, log_losses: Array):
        self.log_flops, self.log_losses = log_flops, log_losses
        self.floor = floor_of(log_flops, log_losses)

    def log_compute(self, log_losses: Array, nodes: Array | None = None) -> Array:
        """Return log C at which the base has these losses, (..., m).

        nodes: (..., k), other log losses of its budgets, such as drawn ones. Where they rise with
        C, they are replaced by the nearest ones that don't.
        """
        curve = np.array(self.log_losses if nodes is None else nodes)
        for at in map(tuple, np.argwhere((np.diff(curve) > 0).any(axis=-1))):
            curve[at] = isotonic_regression(curve[at], increasing=False).x
        heights, targets = self._height(curve), self._height(log_losses)
        above = (heights[..., None, :] >= targets[..., None]).sum(axis=-1)  # budgets, (..., m)
        last = np.clip(above, 1, len(self.log_flops) - 1)
        left, right = (np.take_along_axis(heights, i, axis=-1) for i in (last - 1, last))
        start, end = self.log_flops[last - 1], self.log_flops[last]
        with np.errstate(invalid="ignore", divide="ignore"):
            share = (left - targets) / (left - right)  # 0 / 0 where two budgets have one loss
        log_c = start + np.nan_to_num(share, nan=0.0) * (end - start)
        log_c = np.where(targets > heights[..., :1], -np.inf, log_c)
        return np.asarray(np.where(targets < heights[..., -1:], np.inf, log_c))

    def _height(self, log_losses: Array) -> Array:
        """Return log(L - floor)."""
        losses = np.exp(log_losses)
        return np.log(np.maximum(losses - self.floor, _HEADROOM * losses))


def floor_of(log_flops: Array, log_losses: Array) -> float:
    """Return the floor for which log(L - floor) is nearest to a straight line over log C, by the
    squares of the residuals of log L; 0 if there are too few budgets to tell."""
    if len(log_flops) <= _LEAST:
        return 0.0
    losses = np.exp(log_losses)
    floors = _FLOORS * losses.min()

    def off(floor: float) -> float:
        line = np.polyfit(log_flops, np.log(losses - floor), 1)
        fitted = floor + np.exp(np.polyval(line, log_flops))
        return float(np.square(np.log(fitted) - log_losses).sum())

    return float(min(floors, key=off))


@dataclass(frozen=True)
class Place:
    """A recipe at one budget. multiplier: 0 or infinite where the base never has its loss, which
    is then outside `reach`: the multipliers that the base's budgets can show. confirmed: that of
    fresh seeds alone, of both; nan if they give none. others: of the costs beside FLOPs."""

    cell: RecipeCell
    multiplier: Ratio
    reach: tuple[float, float]
    confirmed: Ratio | None = None
    confirmed_reach: tuple[float, float] = _UNKNOWN
    others: Mapping[str, Ratio] = field(default_factory=dict)


@dataclass(frozen=True)
class Candidate:
    """A recipe compared with the base. places: by budget; mean: the geometric mean of its
    multipliers; trend: the factor a decade of compute, None with fewer than two budgets; lost:
    its budgets without a loss."""

    name: str
    places: tuple[Place, ...]
    mean: Ratio | None
    trend: Ratio | None
    lost: tuple[float, ...] = ()

    @property
    def top(self) -> Place:
        """Return the place at its highest budget with a loss."""
        return self.places[-1]

    @property
    def is_winner(self) -> bool:
        """True if it is shown to need less compute at its highest budget, where it has a loss."""
        known = self.top.confirmed or self.top.multiplier
        return known.low > 1 and self.top.cell.budget > max(self.lost, default=0.0)


class Multipliers:
    """All recipes of a table, compared with the base. Raises UserError if the table has too few
    budgets of the base, or no recipe beside it."""

    def __init__(self, table: pd.DataFrame, job: StudyJob, where: str):
        self.job, self.where, self.base = job, where, job.reference
        self.cells, self.lost = cells_of(table, job, where)
        names = sorted({c.recipe for c in self.cells})
        if self.base not in names:
            problem = f"has no recipe {self.base!r} to compare with"
            raise UserError(where, problem, f"write reference=NAME, one of {', '.join(names)}")
        if len(names) < 2:
            gone = "".join(f"; {lost}".rstrip(".") for lost in self.lost)
            problem = f"has no recipe beside {self.base}{' with a loss' * bool(gone)}{gone}"
            raise UserError(where, problem, "train the others first")
        of_base = self.of(self.base)
        if len(of_base) < _BUDGETS:
            problem = f"has {len(of_base)} budgets of {self.base}, which are no curve"
            raise UserError(where, problem, f"train {self.base} at {_BUDGETS} or more")
        self.noise = _noise(self.cells)
        # Not of its fresh seeds, which may have other settings than its own search's.
        means = np.array([c.log_loss for c in of_base])
        self.curve = BaseCurve(np.log([c.flops for c in of_base]), means)

    def of(self, name: str) -> list[RecipeCell]:
        """Return the cells of a recipe, by compute."""
        return sorted((c for c in self.cells if c.recipe == name), key=lambda c: c.flops)

    @cached_property
    def candidates(self) -> list[Candidate]:
        """Return all recipes but the base, the best mean first."""
        names = {c.recipe for c in self.cells} - {self.base}
        candidates = [self._candidate(name) for name in sorted(names)]
        return sorted(candidates, key=lambda c: -(c.mean or c.top.multiplier).value)

    def _candidate(self, name: str) -> Candidate:
        cells, base = self.of(name), {b.budget: b for b in self.of(self.base) if b.fresh.size}
        at, draws = self._logs(cells, [c.logs for c in cells])
        places, ends = [], np.exp(self.curve.log_flops[[0, -1]])
        for i, (c, ratio) in enumerate(zip(cells, self._ratios(at, draws), strict=True)):
            reach = float(ends[0] / c.flops), float(ends[1] / c.flops)
            is_tested = c.fresh.size and c.budget in base
            fresh, end = self._confirmed(c, base[c.budget]) if is_tested else (None, _UNKNOWN)
            others = self._others(c, at[i], draws[:, i])
            places.append(Place(c, _within(ratio, reach), reach, fresh, end, others))
        lost = tuple(c.budget for c in self.lost if c.recipe == name)
        is_inside = np.isfinite(at)
        if not is_inside.any():
            return Candidate(name, tuple(places), None, None, lost)
        # A drawn loss that the base never has counts as the nearest one that it has.
        low, high = np.log([p.reach for p in places]).T
        at, draws = at[is_inside], np.clip(draws, low, high)[:, is_inside]
        (mean,) = self._ratios(at.mean(keepdims=True), draws.mean(axis=1, keepdims=True))
        x, trend = np.log([c.flops for c in cells])[is_inside], None
        if len(x) >= _BUDGETS:
            weights = (x - x.mean()) / np.square(x - x.mean()).sum() * _DECADE
            (trend,) = self._ratios((at @ weights)[None], (draws @ weights)[:, None])
        return Candidate(name, tuple(places), mean, trend, lost)

    def _confirmed(self, cell: RecipeCell, base: RecipeCell) -> tuple[Ratio, tuple[float, float]]:
        """Return the multiplier by fresh seeds of both, and its reach: of the compute at which the
        curve has the loss of each, so that searches that ended differently at other budgets don't
        bend it. No answer if one of them diverged, or if the curve lacks the base's loss."""
        if not np.isfinite(np.concatenate((cell.fresh, base.fresh))).all():
            return _NO_ANSWER, _UNKNOWN
        at, draws = self._logs([cell, base], [cell.fresh, base.fresh])
        if np.isinf(at[1]) or np.isinf(draws[:, 1]).mean() > (1 - self.job.level) / 2:
            return _NO_ANSWER, _UNKNOWN
        ends = self.curve.log_flops[[0, -1]] - np.log(base.flops)
        (ratio,) = self._ratios(at[:1] - at[1:], draws[:, :1] - np.clip(draws[:, 1:], *ends))
        low, high = np.exp(ends + np.log(base.flops / cell.flops) - at[1])
        return _within(ratio, reach := (float(low), float(high))), reach

    @cached_property
    def costs(self) -> list[str]:
        """Return the costs beside FLOPs that can be compared: those of all runs."""
        known = [name for name in COSTS if all(name in c.costs for c in self.cells)]
        return [name for name in known if name != "seconds" or not self._differing_clocks]

    @property
    def _differing_clocks(self) -> list[str]:
        clocks = sorted({clock for c in self.cells for clock in c.clocks})
        return clocks if len(clocks) > 1 else []

    def _others(self, cell: RecipeCell, at: float, draws: Array) -> dict[str, Ratio]:
        """Return the multipliers of a cell by its other costs. at, draws: log m of its compute."""
        base, others = self.of(self.base), dict[str, Ratio]()
        for name in self.costs:
            of_base, log_cost = np.log([c.costs[name] for c in base]), np.log(cell.costs[name])
            log_c = np.log(cell.flops) + np.concatenate(([at], draws))
            logs = np.interp(log_c, self.curve.log_flops, of_base) - log_cost
            logs = np.where(np.isfinite(log_c), logs, log_c)  # a loss that the base never has
            (ratio,) = self._ratios(logs[:1], logs[1:, None])
            first, last = np.exp(of_base[[0, -1]] - log_cost)
            others[name] = _within(ratio, (float(first), float(last)))
        return others

    def _logs(self, cells: Sequence[RecipeCell], logs: Sequence[Array]) -> tuple[Array, Array]:
        """Return log m of each cell, (m,), and of drawn studies, (draws, m). logs: the log losses
        of the runs to take for each cell."""
        log_c, means = np.log([c.flops for c in cells]), np.array([y.mean() for y in logs])
        at = self.curve.log_compute(means) - log_c
        if not self.noise.free:
            return at, np.broadcast_to(at, (_DRAWS, len(at)))
        rng, free = np.random.default_rng(self.job.seed), self.noise.free
        errors = self.noise.sd * np.sqrt(free / rng.chisquare(free, size=(_DRAWS, 1)))

        def scatter(logs: Sequence[Array]) -> Array:
            """Return standard normal errors of the means of these runs, in units of the noise."""
            counts = np.array([len(y) for y in logs])
            return rng.standard_normal((_DRAWS, len(counts))) / np.sqrt(counts)

        nodes = self.curve.log_losses + errors * scatter([c.logs for c in self.of(self.base)])
        moved = means + errors * scatter(logs)
        return at, self.curve.log_compute(moved, nodes) - log_c

    def _ratios(self, at: Array, draws: Array) -> list[Ratio]:
        """Return exp of the values with intervals. at: (m,); draws: (draws, m)."""
        if not self.noise.free:
            return [Ratio(float(v), *_UNKNOWN) for v in np.exp(at)]
        tail = (1 - self.job.level) / 2
        # By ranks: between a finite draw and an infinite one there is nothing to interpolate.
        low, high = np.quantile(draws, (tail, 1 - tail), axis=0, method="inverted_cdf")
        return [Ratio(*map(float, row)) for row in np.exp(np.stack((at, low, high), axis=1))]

    @property
    def doubts(self) -> list[str]:
        """Return what makes the numbers doubtful, as sentences."""
        return list(self._doubts())

    def _doubts(self) -> Iterator[str]:
        base, free = self.base, self.noise.free
        if not free:
            yield "No run was repeated with another seed: noise, and so intervals, are unknown."
        elif free < 6:
            yield (
                f"The noise of seeds has {free} degrees of freedom: the intervals are wide because "
                "it is hardly known."
            )
        if not (np.diff(self.curve.log_losses) < 0).all():
            yield (
                f"The loss of {base} does not fall from each budget to the next: there it tells "
                "little about compute."
            )
        yield from map(str, self.lost)
        yield from _uneven(self.cells)
        yield from _untuned(self.cells)
        if clocks := self._differing_clocks:
            yield (
                f"Seconds are not compared: runs have different conditions ({clocks[0]}; "
                f"{clocks[1]})."
            )
        if at := [f"{c.recipe} at {c.budget:.3g}" for c in self.cells if c.unstable]:
            yield (
                f"Of {_few(at)} some runs with other seeds diverged and don't count, so that its "
                "loss may be too low."
            )
        for c in self.candidates:
            if c.top.confirmed and np.isnan(c.top.confirmed.value):
                yield (
                    f"Fresh seeds of {c.name} give no answer: a run of it or of {base} diverged, "
                    f"or those of {base} have a loss outside of its curve."
                )
            if beyond := [p for p in c.places if not 0 < p.multiplier.value < np.inf]:
                yield (
                    f"At {len(beyond)} of {len(c.places)} budgets {c.name} has a loss that {base} "
                    "never has: there the multiplier is only bounded, and mean and trend leave it "
                    "out."
                )
        winners = [c.name for c in self.candidates if c.is_winner and c.top.confirmed is None]
        if winners and len(self.candidates) > 1:
            yield (
                f"{', '.join(winners)} won among {len(self.candidates)} recipes: the best of "
                "several often looks better than it is; only fresh seeds can confirm it."
            )


def _within(ratio: Ratio, reach: tuple[float, float]) -> Ratio:
    """Return the ratio with the ends that the base's budgets show: a multiplier that is beyond
    them all is shown to be above (or below) `reach`, and no more."""
    low = reach[1] if ratio.low == np.inf else ratio.low
    return Ratio(ratio.value, low, reach[0] if ratio.high == 0 else ratio.high)


def _noise(cells: Sequence[RecipeCell]) -> Spread:
    return Spread.within(y[np.isfinite(y)] for c in cells for y in (c.logs, c.fresh))


def _uneven(cells: Sequence[RecipeCell]) -> Iterator[str]:
    """Yield a sentence for each budget at which seeds scatter far more than at the others."""
    for budget in sorted({c.budget for c in cells}):
        there = _noise([c for c in cells if c.budget == budget])
        rest = _noise([c for c in cells if c.budget != budget])
        if min(there.free, rest.free) >= 2 and there.sd > _UNEVEN * rest.sd:
            yield (
                f"At {budget:.2g} FLOPs runs scatter by {there.sd:.2%} by their seed, and "
                f"elsewhere by {rest.sd:.2%}: intervals know the mean of both, and are too narrow "
                "there and too wide elsewhere."
            )


def _untuned(cells: Sequence[RecipeCell]) -> Iterator[str]:
    """Yield a sentence for each way in which learning rates are not tuned."""
    for is_so, problem in (
        (False, "the best learning rate is at the edge of those that were tried"),
        (None, "fewer than three learning rates were tried"),
    ):
        if at := [f"{c.recipe} at {c.budget:.2g}" for c in cells if c.is_bracketed is is_so]:
            yield f"Of {_few(at)} {problem}, so that its loss may be too high."
    rest = [(c, ", ".join(x for x in c.edges if x != "rate")) for c in cells]
    if at := [f"{c.recipe} at {c.budget:.2g} ({names})" for c, names in rest if names]:
        yield (
            f"{_few(at)}: the setting in brackets is best at the edge of those tried, so that the "
            "loss may be too high."
        )
    if {c.sizes for c in cells} == {1}:
        ratios = [c.ratio for c in cells if c.ratio]
        at_one = f", of {min(ratios):.2g} to {max(ratios):.2g} tokens a parameter" if ratios else ""
        yield (
            f"Each recipe has one size a budget{at_one}: these are no multipliers of recipes at "
            "their best size. Plan several: plan.sizes=3."
        )


def _few(places: Sequence[str]) -> str:
    return ", ".join(places[:4]) + (f" and {len(places) - 4} more" if len(places) > 4 else "")


def as_dict(study: Multipliers) -> dict[str, Any]:
    """Return the comparison as plain values, for JSON; what is 0 or unbounded is None."""

    def place(p: Place) -> dict[str, Any]:
        return {**_cell(p.cell), "multiplier": p.multiplier.as_dict(), "reach": list(p.reach),
                "confirmed": p.confirmed and p.confirmed.as_dict(),
                "by_cost": {name: ratio.as_dict() for name, ratio in p.others.items()}}  # fmt: skip

    return {
        "base": study.base,
        "level": study.job.level,
        "noise": {"sd": study.noise.sd if study.noise.free else None, "free": study.noise.free},
        "curve": {"floor": study.curve.floor, "budgets": [_cell(c) for c in study.of(study.base)]},
        "candidates": [
            {"name": c.name, "multiplier": c.mean and c.mean.as_dict(), "is_winner": c.is_winner,
             "trend_per_decade": c.trend and c.trend.as_dict(),
             "budgets": [place(p) for p in c.places]}
            for c in study.candidates
        ],
        "without_loss": [
            {"name": c.recipe, "budget": c.budget, "diverged": c.runs} for c in study.lost
        ],
        "doubts": study.doubts,
    }  # fmt: skip


def _cell(c: RecipeCell) -> Mapping[str, Any]:
    return {
        "budget": c.budget, "flops": c.flops, "loss": float(np.exp(c.log_loss)),
        "learning_rate": c.learning_rate, "learning_rates": list(c.rates),
        "is_bracketed": c.is_bracketed, "runs": len(c.logs), "fresh_runs": len(c.fresh),
        "diverged": c.diverged, "edges": list(c.edges), "tokens_per_parameter": c.ratio,
        "costs": dict(c.costs),
    }  # fmt: skip
