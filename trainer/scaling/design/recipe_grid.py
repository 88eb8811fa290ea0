"""The layout of a study of recipes: budgets, searches and seeds of a base and its candidates.

    the layout   budgets of all recipes, and budgets of the base alone at both ends, so that no
                 multiplier is extrapolated: one at 2/5 of the lowest, and `beyond` above the
                 highest, each 5/2 of the one before
    a budget     of each recipe a search (search.py) for its best size and settings, and runs with
                 other seeds, which wait for the best of them
    fresh seeds  at the highest budget of all, of a recipe at its own settings, the base's and those
                 that suit it, of the base at all; new ones at the best of these, which alone count
    settings     up to the lowest budget of all recipes also those of plan.dials, from the base's
                 best below it; later budgets take them over; what a recipe sets itself stays

Invariant: all recipes have the same number of runs and of seeds at a budget.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from statistics import fmean

from forescale.ground.errors import UserError
from forescale.ground.typed import Count, Positive
from forescale.scaling.config import PlanKeys
from forescale.scaling.design.cells import Cell, make_cell
from forescale.scaling.design.recipes import Recipe
from forescale.scaling.design.search import DIALS, Dial, Search, Trial
from forescale.scaling.design.shapes import Common

_BELOW, _ABOVE = 0.4, 2.5  # from the lowest budget, and from the highest, to one of the base alone
_EXTRA = (6, 2)  # runs beyond the edges of a search, of settings too, and of size and rate alone
_SLOPE, _DRIFT, _NOISE = 0.5, 0.15, 0.3  # of log N* over log C, its prior deviation; of a log N*
_OVER = 1.25  # largest cost of a run over its budget, by rounding to whole steps
_ROUNDING = 0.97  # of the cap: budgets round to whole steps


@dataclass(frozen=True)
class RecipeGrid:
    """The layout of a study of recipes. budgets: FLOPs, increasing, those of the base alone at both
    ends; ratio: D/N of the base where a search begins that has no earlier budget; seeds: runs of a
    recipe at its best trial, below the highest budget and from there on; fresh: runs that confirm
    it, at each settings; beyond: number of budgets of the base alone at the upper end; sizes: of a
    budget, from one to the next a factor of `apart`; dials: varied at the first budgets."""

    budgets: tuple[Positive, ...]
    ratio: Positive
    seeds: tuple[Count, Count]
    fresh: Count
    beyond: Count = 1
    sizes: Count = 1
    apart: Positive = 2.5
    dials: tuple[Dial, ...] = ()

    @classmethod
    def within_cap(cls, keys: PlanKeys, common: Common, recipes: int) -> "RecipeGrid":
        """Return the grid with the most expensive budgets, a factor of `keys.step` apart, that the
        cap (FLOPs) pays for, whichever trials turn out. recipes: with the base. Raises
        UserError for a number of sizes without a middle, or for an unknown dial."""
        number, beyond, sizes = keys.budgets, keys.beyond, keys.sizes
        if sizes % 2 == 0:
            problem = f"{sizes} sizes have none in the middle, where a budget begins"
            raise UserError("plan.sizes", problem, f"write plan.sizes={sizes - 1}")
        shares = [keys.step ** (i + 1 - number) for i in range(number)]
        above = [_ABOVE ** (i + 1) for i in range(beyond)]
        shares = [shares[0] * _BELOW, *shares, *above]
        apart = keys.spread ** (2 / max(1, sizes - 1))
        dials = tuple(d for d in DIALS if keys.dials is None or d in keys.dials)
        grid = cls(tuple(shares), keys.ratio, common.seeds, keys.fresh, beyond, sizes, apart, dials)
        runs = [grid.trials(i + 1) + grid.runs_with_seeds(i + 1) for i in range(len(shares))]
        counts = [1, *[recipes] * number, *[1] * beyond]
        cost = sum(n * k * s for n, k, s in zip(runs, counts, shares, strict=True))
        top = _ROUNDING * (keys.cap or 0.0) / (cost + keys.fresh * (5 * recipes - 4))
        return replace(grid, budgets=tuple(top * s for s in shares))

    @property
    def top(self) -> int:
        """The stage of the highest budget that all recipes have."""
        return len(self.budgets) - self.beyond

    def runs_with_seeds(self, stage: int) -> int:
        """Return the number of runs of a recipe at its best trial in stage 1, 2, ..."""
        return self.seeds[stage >= self.top]

    def varies_dials(self, stage: int) -> bool:
        """True up to the lowest budget of all recipes, where rates are unknown too."""
        return stage <= 2

    def extra(self, stage: int) -> int:
        """Return the number of runs of a search beyond its edges that a stage pays for."""
        return _EXTRA[not self.varies_dials(stage)]

    def trials(self, stage: int) -> int:
        """Return the number of runs of a recipe's search in stage 1, 2, ..., the same for all."""
        sizes = self.sizes if self.sizes > 1 else 0
        if not self.varies_dials(stage):
            return sizes + 3 + self.extra(stage)
        return 3 + sizes + (1 + 2 * len(self.dials)) + 2 + self.extra(stage)

    def start(
        self, common: Common, recipe: Recipe, stage: int, earlier: Sequence[Cell] = ()
    ) -> Trial:
        """Return the trial that a search begins with: the settings of the budget before, and the
        size that the best ones so far lead to. earlier: a seed of each budget so far, of the base
        where the recipe has none; rates of another optimizer are not taken from it, and nothing
        where there is no such run."""
        budget, shares = self.budgets[stage - 1], dict(recipe.shares)
        rest = shares.get("optimizer.adam_learning_rate", 1.0)
        varied = recipe.dials(self.dials)
        rates = [str(name) for name in varied if name in ("tables", "scalars")]
        settings = {n: shares.get(f"optimizer.{n[:-1]}_learning_rate", rest) for n in rates}
        known = [(c.budget, c.trial) for c in earlier if c.trial is not None and c.budget]
        if not known:
            return Trial(common.centre(budget, self.ratio), **settings)
        if recipe.rate is not None and earlier[-1].recipe != recipe.name:  # another optimizer
            varied = [name for name in varied if name not in rates]
        settings |= {name: getattr(known[-1][1], name) for name in varied}
        log_c = [math.log(c) for c, _ in known]
        level = [math.log(t.size) - _SLOPE * c for (_, t), c in zip(known, log_c, strict=True)]
        x, y = fmean(log_c), fmean(level)
        moved = sum((c - x) * (a - y) for c, a in zip(log_c, level, strict=True))
        drift = moved / (sum((c - x) ** 2 for c in log_c) + (_NOISE / _DRIFT) ** 2)
        log_n = y + _SLOPE * math.log(budget) + drift * (math.log(budget) - x)
        trial = Trial(math.exp(log_n), **settings)
        with suppress(UserError):
            self.cell(common, recipe, stage, trial, earlier)
            return trial
        # Such as a quarter, first_batch=0.25, of the base's batch of one window.
        return self.start(common, recipe, stage)

    def search(
        self, common: Common, recipe: Recipe, stage: int, earlier: Sequence[Cell] = (),
        losses: Mapping[Trial, float] | None = None,
    ) -> Search:  # fmt: skip
        """Return the search of a recipe as far as its runs have ended. losses: of those. Raises
        UserError if its first run doesn't exist."""
        sized = ["size"] if self.sizes > 1 else []
        rounds: list[str] = [*sized, "rate"]
        if self.varies_dials(stage):
            rounds = ["rate", *sized, *recipe.dials(self.dials), "rate"]
        start = self.start(common, recipe, stage, earlier)
        first = self.cell(common, recipe, stage, start, earlier)
        most_flops = _OVER * max(first.cost, self.budgets[stage - 1])

        def exists(trial: Trial) -> bool:
            try:
                cell = self.cell(common, recipe, stage, trial, earlier)
            except UserError:  # no such model, or no whole windows
                return False
            return cell.cost <= most_flops and (trial == start or cell.decay_steps < cell.steps)

        most, extra = self.trials(stage), self.extra(stage)
        return Search(start, rounds, self.sizes, self.apart, most, extra, losses or {}, exists)

    def cell(
        self, common: Common, recipe: Recipe, stage: int, trial: Trial,
        earlier: Sequence[Cell] = (), suffix: str = "",
    ) -> Cell:  # fmt: skip
        """Return a run of a recipe in stage 1, 2, ... Raises UserError if there is no such run."""
        budget = self.budgets[stage - 1]
        batch = replace(recipe, batch=recipe.batch * trial.batch)
        varied = batch.common(common, earlier)
        rates = {"tables": trial.tables, "scalars": trial.scalars}
        shares = {f"optimizer.{n[:-1]}_learning_rate": x for n, x in rates.items() if x is not None}
        varied = replace(
            varied, decay=common.decay * trial.decay,
            shares=tuple({**dict(varied.shares), **shares}.items()),
        )  # fmt: skip
        planned = make_cell(
            varied, f"b{stage}-{recipe.name}", stage, recipe.shape(common, trial.size), budget,
            role="rate" if suffix else "grid", rate_factor=trial.rate, batch_factor=batch.batch,
            first_batch=recipe.first_batch, suffix=suffix,
        )  # fmt: skip
        warmup = round(planned.warmup_steps * trial.warmup)
        warmup = min(max(warmup, min(1, planned.warmup_steps)), planned.steps - planned.decay_steps)
        return replace(planned, recipe=recipe.name, trial=trial, warmup_steps=warmup)

    def at_settings_of(
        self, common: Common, other: Recipe, best: Cell, recipe: Recipe, tuned: Cell
    ) -> Cell:
        """Return the run of a recipe with the size and settings of another's best run, but for what
        either sets itself, and rates of another optimizer. tuned: its best run. Raises UserError if
        there is no such run."""
        assert tuned.trial is not None, "it comes from a search"
        names = {"size", *recipe.dials(self.dials)} & {"size", *other.dials(self.dials)}
        rate = best.learning_rate
        if recipe.rate is not None or other.rate is not None:
            names, rate = names - {"tables", "scalars"}, tuned.learning_rate
        trial = replace(tuned.trial, **{name: getattr(best.trial, name) for name in names})
        cell = self.cell(common, recipe, tuned.stage, trial)
        return replace(cell, cell_of=best.cell_of, learning_rate=rate)

    def cells(
        self, common: Common, recipe: Recipe, stage: int, earlier: Sequence[Cell] = ()
    ) -> list[Cell]:
        """Return the first runs of a recipe's search, and its seeds, which wait for all of it.
        Raises UserError if its first one doesn't exist."""
        search = self.search(common, recipe, stage, earlier)
        first = self.cell(common, recipe, stage, search.start, earlier)
        swept = self.trial_cells(common, recipe, stage, search.pending, earlier)
        names = tuple(c.name for c in swept)
        # Both seeds change at once, so that the noise of weights and data is measured together.
        seeds = [
            replace(first, name=f"{first.name}-seed{i}", role="seed", seed=common.seed + i,
                    waits_for=names)
            for i in range(1, self.runs_with_seeds(stage) + 1)
        ]  # fmt: skip
        return [*swept, *seeds]

    def trial_cells(
        self, common: Common, recipe: Recipe, stage: int, trials: Sequence[Trial],
        earlier: Sequence[Cell] = (), before: int = 0,
    ) -> list[Cell]:  # fmt: skip
        """Return the runs of these trials. before: number of the search's runs before them."""
        return [
            self.cell(common, recipe, stage, t, earlier, f"-try{i}" if i > 1 else "")
            for i, t in enumerate(trials, before + 1)
        ]
