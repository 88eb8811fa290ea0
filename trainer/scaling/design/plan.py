"""What a study will run and what that costs, before anything is spent; and what its results make
of the rest.

    isoFLOP grid   budgets x sizes around the N that is thought best; a stage a budget: the first is
                   exact, a later one an envelope of costs until the former's optimum is known
    ladder         sizes x multiples of 20 tokens a parameter; of a size all D share one trunk
    list           whatever (N, D) are given

Invariant: a plan's highest cost is within its cap, or there is no plan.
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
    again,
    basin_of,
    crossed,
    make_cell,
    share_trunks,
    wider,
)
from forescale.scaling.design.shapes import RATIO, SEEDS, Common, Rule
from forescale.scaling.design.tuning import Tuned, best_rates, between

_BUDGETS, _SIZES = 3, 3  # fewer tell no law, and no parabola
_CROSS, _WIDER = 3, 2  # learning rates of a cross, and more where the best is at an edge
_DRIFT = 2.0  # so far the best N may turn out off where it was thought, for the envelope
Kind = Literal["isoflop", "ladder", "list"]


@dataclass(frozen=True)
class Stage:
    """low, high: cost in FLOPs, the same where it is exact but for what may be needed to widen its
    crosses; where it isn't, its cells are a draft. tuned, gap: by N the best learning rate, and the
    log loss left untuned; set when its crosses have ended."""

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
        return sum(c.cost for c in self.cells)


@dataclass(frozen=True)
class Plan:
    """cap, low, high: FLOPs by common.cost. grid: what an isoFLOP plan is made again from."""

    kind: Kind
    common: Common
    stages: tuple[Stage, ...]
    cap: float
    grid: "Grid | None" = None
    notes: tuple[str, ...] = ()

    @property
    def low(self) -> float:
        return sum(s.low for s in self.stages)

    @property
    def high(self) -> float:
        return sum(s.high for s in self.stages)

    @property
    def cells(self) -> tuple[Cell, ...]:
        return tuple(c for s in self.stages for c in s.cells)

    def with_stage(self, stage: Stage) -> "Plan":
        """In place of the one of its number."""
        stages = (stage if s.number == stage.number else s for s in self.stages)
        return replace(self, stages=tuple(stages))

    def recentred(self, best: Callable[[float], float], rule: Rule | None = None) -> "Plan":
        """With the first stage that is not exact made so. best: N*(C), as isoflop(...).parameters;
        rule: of batch and learning rate, as learnt so far. Raises UserError where none is left, N*
        is no size, or the cap would be passed."""
        stage = next((s for s in self.stages if not s.exact), None)
        if self.grid is None or stage is None or stage.budget is None:
            raise UserError("stage", "all stages are exact", "launch them, or plan a new study")
        common = replace(self.common, rule=rule or self.common.rule)
        cells = self.grid.cells(common, stage.number, centre := float(best(stage.budget)))
        cost = sum(c.cost for c in cells)
        made = replace(stage, cells=cells, low=cost, high=cost + _spare(cells), exact=True)
        found = self.with_stage(made)
        if found.high > self.cap:
            what = f"with stage {stage.number} at {centre:.3g} parameters it is {found.high:.3g}"
            raise UserError("cap", what, f"raise it from {self.cap:.3g}, or end the study before")
        return found


@dataclass(frozen=True)
class Grid:
    """budgets: FLOPs, growing; sizes a budget, from centre / spread to centre x spread; ratio: D/N
    of the first centre."""

    budgets: tuple[float, ...]
    sizes: int = 5
    spread: float = 2.5
    ratio: float = RATIO

    @classmethod
    def under(
        cls,
        cap: float,
        budgets: int = 5,
        sizes: int = 5,
        spread: float = 2.5,
        step: float = 10**0.5,
        ratio: float = RATIO,
        seeds: tuple[int, int] = SEEDS,
        cross: bool = False,
    ) -> "Grid":
        """The dearest budgets, a factor of `step` apart, that the cap (FLOPs) pays for, with all
        crosses, checks and seeds; 1 % is left for whole steps. budgets, sizes: 3 or more."""
        checks = 8 if cross else 2
        extra = [checks + seeds[0] - 1, *[0] * (budgets - 3), seeds[1] - 1, checks]
        each = sizes + 2 * (_CROSS - 1) + 2 * _WIDER
        shares = [step ** (i + 1 - budgets) for i in range(budgets)]
        top = 0.99 * cap / sum((each + e) * s for e, s in zip(extra, shares, strict=True))
        return cls(tuple(top * s for s in shares), sizes, spread, ratio)

    def cells(self, common: Common, stage: int, centre: float) -> tuple[Cell, ...]:
        """Of stage 1, 2, ... around N = centre."""
        budget, last = self.budgets[stage - 1], len(self.budgets)
        powers = [2 * i / (self.sizes - 1) - 1 for i in range(self.sizes)]
        shapes = common.family.nearest([centre * self.spread**p for p in powers])
        if len(shapes) < _SIZES:
            what = f"only {len(shapes)} sizes can be had around {centre:.3g} parameters"
            raise UserError("sizes", what, "spread them further, or take greater budgets")
        sizes = enumerate(shapes)
        drafts = [partial(make_cell, common, f"s{stage}-n{i}", stage, s, budget) for i, s in sizes]
        found = crossed(drafts)
        middle, draft = found[len(shapes) // 2], drafts[len(shapes) // 2]
        if stage in (1, last):
            found += basin_of(draft, middle, common.cross)
        seeds = {1: common.seeds[0], last - 1: common.seeds[1]}
        return tuple(found + again(middle, seeds.get(stage, 1)))

    def stage(self, common: Common, number: int) -> Stage:
        """The first exact; a later one the envelope of where its centre may come to lie."""
        budget = self.budgets[number - 1]
        centre = common.centre(budget, self.ratio)
        tried = [self.cells(common, number, centre)]
        for factor in (1 / _DRIFT, _DRIFT) if number > 1 else ():
            with suppress(UserError):  # sizes that can't be had there can't cost anything
                tried.append(self.cells(common, number, centre * factor))
        costs = [sum(c.cost for c in cells) for cells in tried]
        high = max(cost + _spare(cells) for cost, cells in zip(costs, tried, strict=True))
        return Stage(number, budget, tried[0], min(costs), high, number == 1)


def _spare(cells: Sequence[Cell]) -> float:
    """FLOPs to widen each of the two crosses with."""
    awaited = {name for c in cells for name in c.awaits}
    return _WIDER * sum({c.of: c.cost for c in cells if c.name in awaited}.values())


def isoflop_grid(common: Common, grid: Grid, cap: float) -> Plan:
    """cap: FLOPs, by common.cost. Raises UserError for a grid that tells no law, where sizes can't
    be had, and where it costs more than the cap (with what would fit)."""
    if len(grid.budgets) < _BUDGETS or list(grid.budgets) != sorted(set(grid.budgets)):
        what = f"{len(grid.budgets)} of them, which must be {_BUDGETS} or more and grow"
        raise UserError("budgets", what, "give 5 or more, half a decade apart")
    if grid.sizes < _SIZES or grid.spread <= 1:
        what = f"{grid.sizes} over a factor of {grid.spread:g} make no parabola"
        raise UserError("sizes", what, "give 5 to 7, over a factor of 2 to 4")

    def made(g: Grid) -> Plan:
        try:
            stages = tuple(g.stage(common, i + 1) for i in range(len(g.budgets)))
        except UserError as e:
            what = f"a grid from {g.budgets[0]:.3g} FLOPs can't be had ({e.where}: {e.what})"
            raise UserError("cap", what, "raise it, or take fewer budgets or sizes") from None
        notes = [f"{len(g.budgets)} budgets; 5 or more are better"] * (len(g.budgets) < 5)
        notes += [f"{g.sizes} sizes a budget; 5 to 7 are better"] * (not 5 <= g.sizes <= 7)
        return Plan("isoflop", common, stages, cap, g, tuple(notes))

    sizes = sorted({grid.sizes, min(grid.sizes, 5)}, reverse=True)
    less = [(s, grid.budgets[:n]) for s in sizes for n in range(len(grid.budgets), 2, -1)]
    words = "{} budgets up to {:.3g} of {} sizes"
    return _within(made(grid), (
        (words.format(len(b), b[-1], s), made(replace(grid, budgets=b, sizes=s))) for s, b in less
    ))  # fmt: skip


def ladder(common: Common, sizes: Sequence[float], multiples: Sequence[float], cap: float) -> Plan:
    """Of each size D = 20 N times every multiple, on one trunk with the batch and learning rate of
    the geometric mean of its D; those are tried out at the least multiple, and awaited by the
    others. Raises UserError as `isoflop_grid` does."""
    if len(sizes) < _SIZES or len(set(multiples)) < 2 or min(multiples) <= 0:
        what = f"{len(sizes)} sizes and {len(set(multiples))} multiples tell no law"
        raise UserError("sizes", what, "give three sizes or more, and two multiples or more")

    def made(ns: Sequence[float], ms: Sequence[float]) -> Plan:
        middle = RATIO * geometric_mean(ms)
        shapes, cells = common.family.series(ns), list[Cell]()
        for m in ms:
            drafts = [
                partial(make_cell, common, f"n{i}-x{m:g}", 1, s, tokens=RATIO * m * s.parameters,
                        recipe_of=middle * s.parameters)
                for i, s in enumerate(shapes)
            ]  # fmt: skip
            awaits = cells[1].awaits if cells else ()
            cells += [replace(d(), awaits=awaits) for d in drafts] if cells else crossed(drafts)
        return _listed("ladder", common, cells, cap)

    ns, ms = sorted(sizes), sorted(set(multiples))
    shorter = ((n, k) for n in range(len(ns), _SIZES - 1, -1) for k in range(len(ms), 1, -1))
    words = "{} sizes up to {:.3g} at {} multiples"
    cheaper = ((words.format(n, ns[n - 1], k), made(ns[:n], ms[:k])) for n, k in shorter)
    return _within(made(ns, ms), cheaper)


def explicit(common: Common, runs: Sequence[tuple[float, float]], cap: float) -> Plan:
    """Of (N, D) as given, D in tokens, with nothing to check their recipes; else as a `ladder`."""
    ns = sorted({n for n, _ in runs})
    if len(ns) < _SIZES:
        what = f"{len(runs)} of them are of fewer than {_SIZES} sizes"
        raise UserError("runs", what, "give (N, D) of three sizes or more")
    shapes, cells = dict(zip(ns, common.family.series(ns), strict=True)), list[Cell]()
    for i, (n, d) in enumerate(runs):
        aim = geometric_mean([other for size, other in runs if size == n])
        cells.append(make_cell(common, f"r{i}", 1, shapes[n], tokens=d, recipe_of=aim))
    return _within(_listed("list", common, cells, cap), iter(()))


def _listed(kind: Kind, common: Common, cells: Sequence[Cell], cap: float) -> Plan:
    """One exact stage, with seeds at the cheapest cell and at the dearest but one."""
    grown = sorted((c for c in cells if c.role == "grid"), key=lambda c: c.cost)
    seeds = [*again(grown[0], common.seeds[0]), *again(grown[-2], common.seeds[1])]
    shared = share_trunks([*cells, *seeds])
    cost = sum(c.cost for c in shared)
    return Plan(kind, common, (Stage(1, None, shared, cost, cost + _spare(shared), True),), cap)


def _within(plan: Plan, cheaper: Iterator[tuple[str, Plan]]) -> Plan:
    """The plan, or UserError with the first of the cheaper ones that fits, or with the last."""
    if plan.high <= plan.cap:
        return plan
    what = f"the plan costs up to {plan.high:.3g} FLOPs, more than the cap of {plan.cap:.3g}"
    todo = "raise it, or take out runs"
    for words, other in cheaper:
        if other.high <= plan.cap:
            raise UserError("cap", what, f"{words} cost {other.high:.3g} and fit")
        todo = f"raise it: the cheapest such plan, {words}, costs {other.high:.3g}"
    raise UserError("cap", what, todo)


def losses_of_cross(stage: Stage, losses: Mapping[str, float]) -> list[Cell]:
    """The cells whose losses tell a learning rate. Raises UserError where some have none yet."""
    awaited = {name for c in stage.cells for name in c.awaits}
    if missing := sorted(awaited - set(losses)):
        what = f"{len(missing)} cells have no loss yet, such as {missing[0]}"
        raise UserError(f"stage {stage.number}", what, "let them end first")
    return [c for c in stage.cells if c.name in awaited]


def widened(stage: Stage, losses: Mapping[str, float], room: float) -> tuple[Cell, ...]:
    """One more learning rate for each size whose best is at the edge of its cross, as far as `room`
    (FLOPs) and _WIDER go. losses: by name of cell, nan for one that diverged."""
    ends, found = losses_of_cross(stage, losses), list[Cell]()
    best, _ = best_rates([(c.shape.parameters, c.learning_rate, losses[c.name]) for c in ends])
    for n, t in best.items():
        own, rate = [c for c in ends if c.shape.parameters == n], t.wider(FACTOR)
        if rate is not None and len(own) < _CROSS + _WIDER and own[0].cost <= room:
            found.append(wider(own, rate))
            room -= own[0].cost
    return tuple(found)


def settled(stage: Stage, losses: Mapping[str, float]) -> Stage:
    """With the learning rates that awaited crosses; nobody awaits them any more, and nothing is
    spared to widen them. losses: by name of cell, nan for one that diverged."""
    ends = losses_of_cross(stage, losses)
    rates, gap = best_rates([(c.shape.parameters, c.learning_rate, losses[c.name]) for c in ends])
    own = {c.name: between(rates, c.shape.parameters) * c.rate_by for c in stage.cells if c.awaits}
    cells = [
        replace(c, learning_rate=own.get(c.name, c.learning_rate), awaits=()) for c in stage.cells
    ]
    made = replace(stage, cells=tuple(cells), tuned=tuple(sorted(rates.items())), gap=gap)
    return replace(made, high=made.cost)
