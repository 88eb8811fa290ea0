"""The plan of a study: which runs it trains, in which stages, and what they cost.

    isoFLOP grid   several sizes within each compute budget, one stage per budget; the first stage
                   is exact, later ones are drafts with a range of costs until the stage before
                   has given its optimum
    ladder         sizes times multiples of 20 tokens per parameter; one trunk per size
    list           the (N, D) that are given
    recipes        see recipe_plan.py

Invariant: the highest cost of a plan is within its cap, or there is no plan.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from statistics import geometric_mean
from typing import Literal

from forescale.errors import UserError
from forescale.scaling.design.cells import (
    FACTOR,
    Cell,
    batch_variants,
    extra_rate,
    make_cell,
    seed_repeats,
    share_trunks,
    with_rate_sweeps,
)
from forescale.scaling.design.recipe import Recipe, RecipeGrid
from forescale.scaling.design.shapes import RATIO, SEEDS, Common, Rule
from forescale.scaling.design.tuning import Tuned, best_rates, interpolated_rate

_BUDGETS, _SIZES = 3, 3  # fewer determine no law, and no parabola
_RATES, _EXTRA_RATES = 3, 2  # of a learning-rate sweep; and more if the best is at an edge
_DRIFT = 2.0  # factor by which the best N may differ from its guess, for the range of costs
Kind = Literal["isoflop", "ladder", "list", "recipes"]


@dataclass(frozen=True)
class StudyStage:
    """Cells that are launched together.

    low, high: range of the cost in FLOPs; of an exact stage they differ only by the reserve for
    extra learning rates. exact: False for a draft, whose cells may still change. tuned, gap: the
    best learning rate of each swept N, and the largest excess of log loss over it; set when the
    learning-rate sweeps have ended.
    """

    number: int
    budget: float | None
    cells: tuple[Cell, ...]
    low: float
    high: float
    exact: bool
    tuned: tuple[tuple[int, Tuned], ...] = ()
    gap: float | None = None

    @property
    def cost(self) -> float:
        """FLOPs of all cells."""
        return sum(c.cost for c in self.cells)


@dataclass(frozen=True)
class StudyPlan:
    """All stages of a study. cap, low, high: FLOPs, counted by common.cost. grid, recipe_grid: the
    layout that later stages of an isoFLOP plan, or of one of recipes, are made from."""

    kind: Kind
    common: Common
    stages: tuple[StudyStage, ...]
    cap: float
    grid: "Grid | None" = None
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

    def with_stage(self, stage: StudyStage) -> "StudyPlan":
        """Return the plan with this stage in place of the one of its number."""
        stages = (stage if s.number == stage.number else s for s in self.stages)
        return replace(self, stages=tuple(stages))

    def with_exact(self, stage: StudyStage, around: str = "") -> "StudyPlan":
        """Return the plan with this stage in place of its draft. around: what messages say of it.
        Raises UserError if the plan would cost more than its cap."""
        found = self.with_stage(stage)
        if found.high > self.cap:
            problem = (
                f"stage {stage.number}{around} raises the plan's cost to {found.high:.3g} FLOPs,"
            )
            problem += f" more than the cap of {self.cap:.3g}"
            raise UserError("cap", problem, "plan a new study with more, or end this one here")
        return found

    def centre_next_stage(
        self, best: Callable[[float], float], rule: Rule | None = None
    ) -> "StudyPlan":
        """Return the plan with its first draft stage made exact.

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
        made = replace(stage, cells=cells, low=cost, high=cost + _reserve(cells), exact=True)
        return self.with_exact(made, f" around {centre:.3g} parameters")


@dataclass(frozen=True)
class Grid:
    """The layout of an isoFLOP plan. budgets: FLOPs, increasing; sizes: number per budget, from
    centre / spread to centre x spread; ratio: D/N at the centre of the first budget."""

    budgets: tuple[float, ...]
    sizes: int = 5
    spread: float = 2.5
    ratio: float = RATIO

    @classmethod
    def within_cap(
        cls,
        cap: float,
        budgets: int = 5,
        sizes: int = 5,
        spread: float = 2.5,
        step: float = 10**0.5,
        ratio: float = RATIO,
        seeds: tuple[int, int] = SEEDS,
        joint_sweep: bool = False,
    ) -> "Grid":
        """Return the grid with the most expensive budgets, a factor of `step` apart, that the cap
        (FLOPs) pays for, including sweeps and seeds; 1 % is left for rounding to whole steps.
        budgets, sizes: 3 or more."""
        checks = 8 if joint_sweep else 2
        extra = [checks + seeds[0] - 1, *[0] * (budgets - 3), seeds[1] - 1, checks]
        each = sizes + 2 * (_RATES - 1) + 2 * _EXTRA_RATES
        shares = [step ** (i + 1 - budgets) for i in range(budgets)]
        top = 0.99 * cap / sum((each + e) * s for e, s in zip(extra, shares, strict=True))
        return cls(tuple(top * s for s in shares), sizes, spread, ratio)

    def cells(self, common: Common, stage: int, centre: float) -> tuple[Cell, ...]:
        """Return the cells of stage 1, 2, ... around N = centre."""
        budget, last = self.budgets[stage - 1], len(self.budgets)
        powers = [2 * i / (self.sizes - 1) - 1 for i in range(self.sizes)]
        shapes = common.family.nearest([centre * self.spread**p for p in powers])
        if len(shapes) < _SIZES:
            problem = f"only {len(shapes)} different models exist around {centre:.3g} parameters"
            raise UserError("sizes", problem, "raise plan.spread, or take larger budgets")
        sizes = enumerate(shapes)
        drafts = [partial(make_cell, common, f"s{stage}-n{i}", stage, s, budget) for i, s in sizes]
        found = with_rate_sweeps(drafts)
        middle, draft = found[len(shapes) // 2], drafts[len(shapes) // 2]
        if stage in (1, last):
            found += batch_variants(draft, middle, common.joint_sweep)
        seeds = {1: common.seeds[0], last - 1: common.seeds[1]}
        return tuple(found + seed_repeats(middle, seeds.get(stage, 1)))

    def stage(self, common: Common, number: int) -> StudyStage:
        """Return a stage; the first is exact, a later one has the range of costs over the centres
        that it may get."""
        budget = self.budgets[number - 1]
        centre = common.centre(budget, self.ratio)
        tried = [self.cells(common, number, centre)]
        for factor in (1 / _DRIFT, _DRIFT) if number > 1 else ():
            with suppress(UserError):  # no models there, so no cost
                tried.append(self.cells(common, number, centre * factor))
        costs = [sum(c.cost for c in cells) for cells in tried]
        high = max(cost + _reserve(cells) for cost, cells in zip(costs, tried, strict=True))
        return StudyStage(number, budget, tried[0], min(costs), high, number == 1)


def _reserve(cells: Sequence[Cell]) -> float:
    """FLOPs kept for extra learning rates of both sweeps."""
    swept = {name for c in cells for name in c.waits_for}
    return _EXTRA_RATES * sum({c.cell_of: c.cost for c in cells if c.name in swept}.values())


def isoflop_grid(common: Common, grid: Grid, cap: float) -> StudyPlan:
    """Return an isoFLOP plan. cap: FLOPs, counted by common.cost.

    Raises UserError if the grid can't determine a law, if no models of its sizes exist, or if it
    costs more than the cap (the message says what would fit).
    """
    if len(grid.budgets) < _BUDGETS or list(grid.budgets) != sorted(set(grid.budgets)):
        problem = f"{len(grid.budgets)} are given; they must be {_BUDGETS} or more and increase"
        raise UserError("budgets", problem, "give 5 or more, half a decade apart")
    if grid.sizes < _SIZES or grid.spread <= 1:
        problem = f"{grid.sizes} sizes over a factor of {grid.spread:g} determine no parabola"
        raise UserError("sizes", problem, "give 5 to 7, over a factor of 2 to 4")

    def made(g: Grid) -> StudyPlan:
        try:
            stages = tuple(g.stage(common, i + 1) for i in range(len(g.budgets)))
        except UserError as e:
            problem = f"no grid can start at {g.budgets[0]:.3g} FLOPs ({e.where}: {e.problem})"
            raise UserError("cap", problem, "raise it, or plan fewer budgets or sizes") from None
        notes = [f"{len(g.budgets)} budgets; 5 or more are better"] * (len(g.budgets) < 5)
        notes += [f"{g.sizes} sizes per budget; 5 to 7 are better"] * (not 5 <= g.sizes <= 7)
        return StudyPlan("isoflop", common, stages, cap, g, tuple(notes))

    sizes = sorted({grid.sizes, min(grid.sizes, 5)}, reverse=True)
    less = [(s, grid.budgets[:n]) for s in sizes for n in range(len(grid.budgets), 2, -1)]
    text = "{} budgets up to {:.3g} of {} sizes"
    return _within_cap(made(grid), (
        (text.format(len(b), b[-1], s), made(replace(grid, budgets=b, sizes=s))) for s, b in less
    ))  # fmt: skip


def ladder(
    common: Common, sizes: Sequence[float], multiples: Sequence[float], cap: float
) -> StudyPlan:
    """Return a plan with D = 20 N times every multiple for each size.

    The runs of a size branch off one trunk and share the batch and learning rate for the geometric
    mean of their D. The learning-rate sweeps are at the smallest multiple; the others wait for
    them. Raises UserError as `isoflop_grid` does.
    """
    if len(sizes) < _SIZES or len(set(multiples)) < 2 or min(multiples) <= 0:
        problem = f"{len(sizes)} sizes and {len(set(multiples))} multiples determine no law"
        raise UserError("sizes", problem, "give three or more sizes, and two or more multiples")

    def made(ns: Sequence[float], ms: Sequence[float]) -> StudyPlan:
        middle = RATIO * geometric_mean(ms)
        shapes, cells = common.family.series(ns), list[Cell]()
        for m in ms:
            drafts = [
                partial(make_cell, common, f"n{i}-x{m:g}", 1, s, tokens=RATIO * m * s.parameters,
                        recipe_of=middle * s.parameters)
                for i, s in enumerate(shapes)
            ]  # fmt: skip
            sweep = cells[1].waits_for if cells else ()
            cells += (
                [replace(d(), waits_for=sweep) for d in drafts]
                if cells
                else with_rate_sweeps(drafts)
            )
        return _listed("ladder", common, cells, cap)

    ns, ms = sorted(sizes), sorted(set(multiples))
    shorter = ((n, k) for n in range(len(ns), _SIZES - 1, -1) for k in range(len(ms), 1, -1))
    text = "{} sizes up to {:.3g} at {} multiples"
    cheaper = ((text.format(n, ns[n - 1], k), made(ns[:n], ms[:k])) for n, k in shorter)
    return _within_cap(made(ns, ms), cheaper)


def explicit(common: Common, runs: Sequence[tuple[float, float]], cap: float) -> StudyPlan:
    """Return a plan of the given (N, D), D in tokens, without learning-rate sweeps. Runs of one
    size branch off one trunk. Raises UserError as `isoflop_grid` does."""
    ns = sorted({n for n, _ in runs})
    if len(ns) < _SIZES:
        problem = f"{len(runs)} runs have fewer than {_SIZES} different sizes"
        raise UserError("runs", problem, "give (N, D) of three or more sizes")
    shapes, cells = dict(zip(ns, common.family.series(ns), strict=True)), list[Cell]()
    for i, (n, d) in enumerate(runs):
        aim = geometric_mean([other for size, other in runs if size == n])
        cells.append(make_cell(common, f"r{i}", 1, shapes[n], tokens=d, recipe_of=aim))
    return _within_cap(_listed("list", common, cells, cap), iter(()))


def _listed(kind: Kind, common: Common, cells: Sequence[Cell], cap: float) -> StudyPlan:
    """A plan of one exact stage, with repeats of the cheapest and of the second most expensive
    cell."""
    grown = sorted((c for c in cells if c.role == "grid"), key=lambda c: c.cost)
    seeds = [*seed_repeats(grown[0], common.seeds[0]), *seed_repeats(grown[-2], common.seeds[1])]
    shared = share_trunks([*cells, *seeds])
    cost = sum(c.cost for c in shared)
    return StudyPlan(
        kind, common, (StudyStage(1, None, shared, cost, cost + _reserve(shared), True),), cap
    )


def _within_cap(plan: StudyPlan, cheaper: Iterator[tuple[str, StudyPlan]]) -> StudyPlan:
    """Return the plan. If it costs more than its cap, raise UserError with the first cheaper plan
    that fits, or with the cheapest."""
    if plan.high <= plan.cap:
        return plan
    problem = f"the plan costs up to {plan.high:.3g} FLOPs, more than the cap of {plan.cap:.3g}"
    todo = "raise it, or remove runs"
    for text, other in cheaper:
        if other.high <= plan.cap:
            raise UserError("cap", problem, f"{text} cost {other.high:.3g} and fit")
        todo = f"raise it; the cheapest such plan, {text}, costs {other.high:.3g}"
    raise UserError("cap", problem, todo)


def _sweep_cells(stage: StudyStage, losses: Mapping[str, float]) -> list[Cell]:
    """The cells of the learning-rate sweeps. Raises UserError if some have no loss yet."""
    swept = {name for c in stage.cells for name in c.waits_for}
    if missing := sorted(swept - set(losses)):
        problem = f"{len(missing)} cells have no loss yet, such as {missing[0]}"
        raise UserError(f"stage {stage.number}", problem, "wait until they have ended")
    return [c for c in stage.cells if c.name in swept]


def extra_rates(stage: StudyStage, losses: Mapping[str, float], room: float) -> tuple[Cell, ...]:
    """Return one more cell for each size whose best learning rate is at the edge of its sweep, as
    far as `room` (FLOPs) and _EXTRA_RATES allow. losses: by cell name, nan if it diverged."""
    ends, found = _sweep_cells(stage, losses), list[Cell]()
    best, _ = best_rates([(c.shape.parameters, c.learning_rate, losses[c.name]) for c in ends])
    for n, t in best.items():
        own, rate = [c for c in ends if c.shape.parameters == n], t.next_rate(FACTOR)
        if rate is not None and len(own) < _RATES + _EXTRA_RATES and own[0].cost <= room:
            found.append(extra_rate(own, rate))
            room -= own[0].cost
    return tuple(found)


def with_chosen_rates(stage: StudyStage, losses: Mapping[str, float]) -> StudyStage:
    """Return the stage with the learning rates of all waiting cells set, and without the reserve
    for extra rates. losses: by cell name, nan if it diverged."""
    ends = _sweep_cells(stage, losses)
    rates, gap = best_rates([(c.shape.parameters, c.learning_rate, losses[c.name]) for c in ends])
    own = {
        c.name: interpolated_rate(rates, c.shape.parameters) * c.rate_factor
        for c in stage.cells
        if c.waits_for
    }
    cells = [
        replace(c, learning_rate=own.get(c.name, c.learning_rate), waits_for=())
        for c in stage.cells
    ]
    made = replace(stage, cells=tuple(cells), tuned=tuple(sorted(rates.items())), gap=gap)
    return replace(made, high=made.cost)
