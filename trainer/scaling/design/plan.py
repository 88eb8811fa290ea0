"""The plan of a study: its stages of cells with their cost, changed by the results of sweeps.

Invariant: `load(dump(plan)) == plan`. A plan is read as it was decided, even by a later version
that would decide otherwise.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from forescale.config.schema import plain
from forescale.ground.errors import UserError
from forescale.ground.typed import Count, Flag, Number, Positive, Size, typed
from forescale.scaling.config import PlanKeys
from forescale.scaling.design.cells import (
    FACTOR,
    RATES,
    Cell,
    batch_variants,
    extra_rate,
    make_cell,
    seed_repeats,
    with_rate_sweeps,
)
from forescale.scaling.design.pilot import RUNS
from forescale.scaling.design.recipe_grid import RecipeGrid
from forescale.scaling.design.recipes import Recipe
from forescale.scaling.design.shapes import RATIO, Common, Rule
from forescale.scaling.design.tuning import Tuned, interpolated_rate

Kind = Literal["isoflop", "ladder", "list", "recipes", "mixtures"]
EXTRA_RATES = 2  # of a size, if its best learning rate is at an edge
SIZES = 3  # fewer determine no law, and no parabola
_TODO = "restore it, or plan a new study"
_ROUNDING = 0.99  # of the cap: budgets round to whole steps


@dataclass(frozen=True)
class StudyStage:
    """Cells that are launched together.

    low, high: range of the cost in FLOPs; of an exact stage they differ only by the reserve for
    extra learning rates. exact: False for a draft, whose cells may still change. tuned, gap: the
    best learning rate of each swept N, and the largest excess of log loss over it; set when the
    learning-rate sweeps of a law's study have ended.
    """

    number: Count
    budget: Positive | None
    cells: tuple[Cell, ...]
    low: Number
    high: Number
    exact: Flag
    tuned: tuple[tuple[Size, Tuned], ...] = ()
    gap: Number | None = None

    @property
    def cost(self) -> float:
        """FLOPs of all cells."""
        return sum(c.cost for c in self.cells)

    @property
    def untuned(self) -> list[str]:
        """The recipes with cells that wait for a learning rate; [""] in a study of one recipe."""
        return list(dict.fromkeys(c.recipe for c in self.cells if c.waits_for))

    def sweep(self, recipe: str) -> list[Cell]:
        """Return the cells that the waiting cells of a recipe wait for."""
        names = {name for c in self.cells if c.recipe == recipe for name in c.waits_for}
        return [c for c in self.cells if c.name in names]

    def with_extra_rates(self, recipe: str, cells: Sequence[Cell]) -> "StudyStage":
        """Return the stage with more cells of a sweep, for which the others wait too."""
        names = tuple(c.name for c in cells)
        waiting = [
            replace(c, waits_for=(*c.waits_for, *names))
            if c.waits_for and c.recipe == recipe
            else c
            for c in self.cells
        ]
        return replace(self, cells=(*waiting, *cells))

    def with_rates(self, recipe: str, best: Mapping[int, Tuned], gap: float) -> "StudyStage":
        """Return the stage with the learning rates of a recipe's waiting cells. best: by N."""
        cells = []
        for c in self.cells:
            if c.waits_for and c.recipe == recipe:
                rate = interpolated_rate(best, c.shape.parameters) * c.rate_factor
                c = replace(c, learning_rate=rate, waits_for=())
            cells.append(c)
        stage = replace(self, cells=tuple(cells))
        if recipe:  # others may still need the reserve
            return stage
        return replace(stage, tuned=tuple(sorted(best.items())), gap=gap, high=stage.cost)


def extra_rates(
    swept: Sequence[Cell], best: Mapping[int, Tuned], most: int, room: float
) -> list[Cell]:
    """Return one more cell for each size whose best learning rate is at the edge of its sweep, as
    far as `room` (FLOPs) and `most` extra rates of a size allow."""
    cells = list[Cell]()
    for n, tuned in best.items():
        size, rate = [c for c in swept if c.shape.parameters == n], tuned.next_rate(FACTOR)
        if rate is not None and len(size) < RATES + most and size[0].cost <= room:
            cells.append(extra_rate(size, rate))
            room -= size[0].cost
    return cells


def reserve(cells: Sequence[Cell]) -> float:
    """Return the FLOPs that are reserved for extra learning rates of both sweeps."""
    swept = {name for c in cells for name in c.waits_for}
    return EXTRA_RATES * sum({c.cell_of: c.cost for c in cells if c.name in swept}.values())


@dataclass(frozen=True)
class Grid:
    """The layout of an isoFLOP plan. budgets: FLOPs, increasing; sizes: number per budget, from
    centre / spread to centre x spread; ratio: D/N at the centre of the first budget."""

    budgets: tuple[Positive, ...]
    sizes: Size = 5
    spread: Positive = 2.5
    ratio: Positive = RATIO

    @classmethod
    def within_cap(cls, keys: PlanKeys, common: Common) -> "Grid":
        """Return the grid with the most expensive budgets, a factor of `keys.step` apart, that the
        cap (FLOPs) pays for, including sweeps and seeds."""
        number, seeds = keys.budgets, common.seeds
        checks = 8 if common.joint_sweep else 2
        extra = [checks + seeds[0] - 1, *[0] * (number - 3), seeds[1] - 1, checks]
        each = keys.sizes + 2 * (RATES - 1) + 2 * EXTRA_RATES
        shares = [keys.step ** (i + 1 - number) for i in range(number)]
        runs = sum((each + e) * s for e, s in zip(extra, shares, strict=True))
        runs += keys.pilot * (RUNS + 2 * EXTRA_RATES) * shares[0]
        top = _ROUNDING * (keys.cap or 0.0) / runs
        return cls(tuple(top * s for s in shares), keys.sizes, keys.spread, keys.ratio)

    def cells(self, common: Common, stage: int, centre: float) -> tuple[Cell, ...]:
        """Return the cells of stage 1, 2, ... around N = centre. Raises UserError for fewer than
        three models."""
        budget, last = self.budgets[stage - 1], len(self.budgets)
        powers = [2 * i / (self.sizes - 1) - 1 for i in range(self.sizes)]
        shapes = common.family.nearest([centre * self.spread**p for p in powers])
        if len(shapes) < SIZES:
            problem = f"only {len(shapes)} different models exist around {centre:.3g} parameters"
            raise UserError("sizes", problem, "raise plan.spread, or take larger budgets")
        sizes = enumerate(shapes)
        drafts = [partial(make_cell, common, f"s{stage}-n{i}", stage, s, budget) for i, s in sizes]
        cells = with_rate_sweeps(drafts)
        middle, draft = cells[len(shapes) // 2], drafts[len(shapes) // 2]
        if stage in (1, last):
            cells += batch_variants(draft, middle, common.joint_sweep)
        seeds = {1: common.seeds[0], last - 1: common.seeds[1]}
        return tuple(cells + seed_repeats(middle, seeds.get(stage, 1)))


@dataclass(frozen=True)
class StudyPlan:
    """All stages of a study. cap, low, high: FLOPs, counted by common.cost. grid, recipe_grid: the
    layout that later stages of an isoFLOP plan, or of one of recipes, are made from."""

    kind: Kind
    common: Common
    stages: tuple[StudyStage, ...]
    cap: Positive
    grid: Grid | None = None
    notes: tuple[str, ...] = ()
    recipes: tuple[Recipe, ...] = ()
    recipe_grid: RecipeGrid | None = None

    @property
    def low(self) -> float:
        """The lowest possible cost, FLOPs."""
        return sum(s.low for s in self.stages)

    @property
    def high(self) -> float:
        """The highest possible cost, FLOPs."""
        return sum(s.high for s in self.stages)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cells of all stages."""
        return tuple(c for s in self.stages for c in s.cells)

    def stage(self, number: int) -> StudyStage:
        """Return the stage of this number."""
        return next(s for s in self.stages if s.number == number)

    def with_stage(self, stage: StudyStage) -> "StudyPlan":
        """Return the plan with this stage in place of the one of its number, or at its end."""
        stages = {s.number: s for s in self.stages} | {stage.number: stage}
        return replace(self, stages=tuple(stages.values()))

    def with_exact(self, stage: StudyStage, around: str = "") -> "StudyPlan":
        """Return the plan with this stage in place of its draft. around: what messages say of it.
        Raises UserError if the plan would cost more than its cap."""
        plan = self.with_stage(stage)
        if plan.high > self.cap:
            problem = f"stage {stage.number}{around} raises the plan's cost to {plan.high:.3g} "
            problem += f"FLOPs, more than the cap of {self.cap:.3g}"
            raise UserError("cap", problem, "plan a new study with more, or end this one here")
        return plan

    def centre_next_stage(
        self, best: Callable[[float], float], rule: Rule | None = None
    ) -> "StudyPlan":
        """Return the isoFLOP plan with its first draft stage made exact.

        best: N*(C), as isoflop(...).parameters; rule: for batch and learning rate, None keeps the
        plan's. Where N* is so small that half of the sizes have no model, they begin at the
        smallest model instead. Raises UserError if no draft is left, if no model has about N*
        parameters, or if the plan would cost more than its cap.
        """
        stage = next((s for s in self.stages if not s.exact), None)
        if self.grid is None or stage is None or stage.budget is None:
            raise UserError("stage", "all stages are exact", "launch them, or plan a new study")
        common = replace(self.common, rule=rule or self.common.rule)
        least = common.family.smallest * self.grid.spread
        centre = max(float(best(stage.budget)), least)
        cells = self.grid.cells(common, stage.number, centre)
        cost = sum(c.cost for c in cells)
        exact = replace(stage, cells=cells, low=cost, high=cost + reserve(cells), exact=True)
        return self.with_exact(exact, f" around {centre:.3g} parameters")


def dump(plan: StudyPlan) -> dict[str, Any]:
    """Return the plan as JSON values; of a model, with the kinds of its parts."""
    return dict(plain(plan))


def load(facts: Any, where: str = "plan.json") -> StudyPlan:
    """Return the plan that `dump` wrote. Raises UserError for anything else."""
    plan = typed(StudyPlan, _renamed(facts), where, _TODO)
    names = [name for c in plan.cells for name in (c.name, c.trunk) if name is not None]
    for name in names:  # directories and log files have these names
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise UserError(where, f"{name!r} is no name of a cell", _TODO)
    return plan


def _renamed(node: Any) -> Any:
    """Return stored values of an earlier version by the names of this one."""
    if isinstance(node, list):
        return [_renamed(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "adam_share" in node:  # before other optimizers had such rates
        share = node["adam_share"]
        shares = [["optimizer.adam_learning_rate", share]] if share else []
        node = {k: v for k, v in node.items() if k != "adam_share"} | {"shares": shares}
    facts = {"target" if name == "wanted" else name: _renamed(v) for name, v in node.items()}
    if isinstance(trend := facts.get("aspect"), dict) and isinstance(trend.get("layers"), float):
        facts["aspect"] = trend["layers"] / 12  # of a shape's family
    return facts
