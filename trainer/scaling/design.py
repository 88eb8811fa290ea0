"""What a study will run and what that costs, before anything is spent.

    isoFLOP grid   budgets x sizes around the N that is thought best; a stage a budget: the first is
                   exact, a later one an envelope of costs until the former's optimum is known
    ladder         sizes x multiples of 20 tokens a parameter; of a size all D share one trunk
    list           whatever (N, D) are given

Invariant: a plan's highest cost is within its cap, or there is no plan. What a cell says is all
that its run needs: config keys, and the cells that must end before (for a learning rate, a trunk).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from statistics import geometric_mean
from typing import Any, Literal

from trainer.errors import UserError
from trainer.scaling.shapes import RATIO, Common, Shape, best_rates, between, overrides

SEEDS = (5, 3)  # at the cheapest cell, and near the top
FACTOR = 2.0  # between the three learning rates of a cross, and the batches of a check
_BUDGETS, _SIZES = 3, 3  # fewer tell no law, and no parabola
_DRIFT = 2.0  # so far the best N may turn out off where it was thought, for the envelope
# Habits: least steps, least warm-up, its greatest share; how far whole steps may take D off.
_STEPS, _WARMUP, _LONG, _ROUNDED = 500, 20, 0.1, 0.02
_SEED = "train.seed sets weights, order and dropout together: their noise can't be told apart"
Kind = Literal["isoflop", "ladder", "list"]
Role = Literal["grid", "rate", "batch", "seed"]


@dataclass(frozen=True)
class Cell:
    """A run to be. tokens = steps x batch; batch in windows; flops: of the whole run by every
    convention; cost: FLOPs that it adds, a branch its decay alone; seconds: of one device, if its
    rate is known; trunk, trunk_step: the run that it branches off; awaits: the cells whose losses
    tell its learning rate (until then that of the rule)."""

    name: str
    stage: int
    role: Role
    budget: float | None
    shape: Shape
    tokens: int
    steps: int
    global_batch: int
    sequence_length: int
    learning_rate: float
    warmup_steps: int
    decay_steps: int
    seed: int
    flops: dict[str, float]
    cost: float
    seconds: float | None
    flags: tuple[str, ...] = ()
    awaits: tuple[str, ...] = ()
    trunk: str | None = None
    trunk_step: int | None = None
    seed_key: str = "train.seed"

    @property
    def trajectory(self) -> tuple[Any, ...]:
        """What two runs must share to be one until the first decays."""
        recipe = (self.learning_rate, self.global_batch, self.warmup_steps, self.seed, self.awaits)
        return (*overrides(self.shape.model).items(), *recipe)

    @property
    def keys(self) -> dict[str, Any]:
        """The config keys of its run."""
        return {
            "run.name": self.name,
            **overrides(self.shape.model),
            "train.steps": self.steps,
            "train.tokens": None,
            "train.global_batch": self.global_batch,
            "train.sequence_length": self.sequence_length,
            self.seed_key: self.seed,
            "optimizer.learning_rate": self.learning_rate,
            "schedule.kind": "wsd",
            "schedule.warmup": f"{self.warmup_steps} steps",
            "schedule.decay": f"{self.decay_steps} steps",
            **({"run.from.run": self.trunk} if self.trunk else {}),
            **({"run.from.step": self.trunk_step} if self.trunk else {}),
        }


@dataclass(frozen=True)
class Stage:
    """low, high: cost in FLOPs, the same where it is exact; else its cells are a draft."""

    number: int
    budget: float | None
    cells: tuple[Cell, ...]
    low: float
    high: float
    exact: bool


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

    def recentred(self, best: Callable[[float], float]) -> "Plan":
        """With the first stage that is not exact made so. best: N*(C), as isoflop(...).parameters.
        Raises UserError where none is left, N* is no size, or the cap would be passed."""
        stage = next((s for s in self.stages if not s.exact), None)
        if self.grid is None or stage is None or stage.budget is None:
            raise UserError("stage", "all stages are exact", "launch them, or plan a new study")
        cells = self.grid.cells(self.common, stage.number, centre := float(best(stage.budget)))
        cost = sum(c.cost for c in cells)
        made = replace(stage, cells=cells, low=cost, high=cost, exact=True)
        found = replace(self, stages=tuple(made if s is stage else s for s in self.stages))
        if found.high > self.cap:
            what = f"with stage {stage.number} at {centre:.3g} parameters it is {found.high:.3g}"
            raise UserError("cap", what, f"raise it from {self.cap:.3g}, or end the study before")
        return found


@dataclass(frozen=True)
class Grid:
    """budgets: FLOPs, growing; sizes a budget, from centre / spread to centre x spread; ratio: D/N
    of the first centre; seeds: see SEEDS."""

    budgets: tuple[float, ...]
    sizes: int = 5
    spread: float = 2.5
    ratio: float = RATIO
    seeds: tuple[int, int] = SEEDS

    @classmethod
    def under(cls, cap: float, budgets: int = 5, sizes: int = 5, step: float = 10**0.5) -> "Grid":
        """The dearest budgets, a factor of `step` apart, that the cap (FLOPs) pays for, with all
        crosses, checks and seeds; 1 % is left for whole steps. budgets, sizes: 3 or more."""
        extra = [2 + SEEDS[0] - 1, *[0] * (budgets - 3), SEEDS[1] - 1, 2]
        shares = [step ** (i + 1 - budgets) for i in range(budgets)]
        top = 0.99 * cap / sum((sizes + 4 + e) * s for e, s in zip(extra, shares, strict=True))
        return cls(tuple(top * s for s in shares), sizes)

    def cells(self, common: Common, stage: int, centre: float) -> tuple[Cell, ...]:
        """Of stage 1, 2, ... around N = centre."""
        budget, last = self.budgets[stage - 1], len(self.budgets)
        powers = [2 * i / (self.sizes - 1) - 1 for i in range(self.sizes)]
        sizes = enumerate(common.family.series([centre * self.spread**p for p in powers]))
        drafts = [partial(_cell, common, f"s{stage}-n{i}", stage, s, budget) for i, s in sizes]
        found = _crossed(drafts)
        middle, draft = found[self.sizes // 2], drafts[self.sizes // 2]
        for power, word in ((-1, "low"), (1, "high")) if stage in (1, last) else ():
            check = draft(role="batch", batch_by=FACTOR**power, suffix=f"-batch-{word}")
            if check.global_batch != middle.global_batch:
                found.append(replace(check, awaits=middle.awaits))
        seeds = {1: self.seeds[0], last - 1: self.seeds[1]}
        return tuple(found + _again(middle, seeds.get(stage, 1)))

    def stage(self, common: Common, number: int) -> Stage:
        """The first exact; a later one the envelope of where its centre may come to lie."""
        budget = self.budgets[number - 1]
        centre = common.centre(budget, self.ratio)
        tried = [self.cells(common, number, centre)]
        for factor in (1 / _DRIFT, _DRIFT) if number > 1 else ():
            with suppress(UserError):  # sizes that can't be had there can't cost anything
                tried.append(self.cells(common, number, centre * factor))
        costs = [sum(c.cost for c in cells) for cells in tried]
        return Stage(number, budget, tried[0], min(costs), max(costs), number == 1)


def _cell(
    common: Common, name: str, stage: int, shape: Shape, budget: float | None = None,
    tokens: float | None = None, recipe_of: float | None = None, role: Role = "grid",
    rate_by: float = 1.0, batch_by: float = 1.0, suffix: str = "",
) -> Cell:  # fmt: skip
    """budget (FLOPs) or tokens; recipe_of: D that batch and learning rate are for, its own if None;
    rate_by, batch_by: factors on them."""
    length, rule, n = common.sequence_length, common.rule, shape.counts.non_embedding
    per = common.per_token(shape.model)
    wanted = tokens or (budget or 0) / per[common.cost]
    aim, at_once = recipe_of or wanted, common.micro_batch * length
    batch = max(1, round(rule.batch(aim) * batch_by / at_once)) * at_once
    steps = max(1, round(wanted / batch))
    # Over N tokens: a constant warm-up is too long for small models (Porian et al. 2024, arXiv
    # 2406.19146). Our bound: where D is few times N, that is too long as well.
    warmup = math.ceil(min(shape.parameters, _LONG * aim) / batch)
    off = abs(steps * batch / wanted - 1)
    doubts = {
        f"fewer than {_STEPS} steps": steps < _STEPS,
        f"warm-up over {_LONG:.0%}": warmup > math.ceil(_LONG * steps),
        f"warm-up of fewer than {_WARMUP} steps": warmup < _WARMUP,
        "D beyond one epoch": common.unique is not None and steps * batch > common.unique,
        f"whole steps are {off:.0%} off its D": off > _ROUNDED,
        "batch and learning rate beyond their rule's range": not rule.covers(n, wanted),
    }
    flops = {convention: float(steps * batch * each) for convention, each in per.items()}
    decay, cost = math.ceil(common.decay * steps), flops[common.cost]
    return Cell(
        name + suffix, stage, role, budget, shape, steps * batch, steps, batch // length, length,
        rule.learning_rate(n, aim) * rate_by, min(warmup, steps - decay), decay, common.seed,
        flops, cost, cost / common.rate if common.rate else None,
        tuple(what for what, is_so in doubts.items() if is_so),
    )  # fmt: skip


def _crossed(drafts: Sequence[Callable[..., Cell]]) -> list[Cell]:
    """The smallest and the largest size at three learning rates; those between await them."""
    found, words = [d() for d in drafts], ((1 / FACTOR, "low"), (FACTOR, "high"))
    ends = [(d, by, word) for d in (drafts[0], drafts[-1]) for by, word in words]
    more = [d(role="rate", rate_by=by, suffix=f"-lr-{word}") for d, by, word in ends]
    awaits = tuple(c.name for c in (found[0], found[-1], *more))
    return [found[0], *(replace(c, awaits=awaits) for c in found[1:-1]), found[-1], *more]


def _again(cell: Cell, seeds: int) -> list[Cell]:
    """The other seeds of a cell; `seeds` counts its own."""
    new = replace(cell, role="seed", flags=(*cell.flags, _SEED))
    return [replace(new, name=f"{cell.name}-seed{i}", seed=cell.seed + i) for i in range(1, seeds)]


def share_trunks(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Those of one trajectory branch off the longest of them, each where its own decay begins, and
    cost that decay alone (Hägele et al. 2024, arXiv 2405.18392)."""
    longest = {c.trajectory: c for c in sorted(cells, key=lambda c: c.steps)}
    found = list[Cell]()
    for c in cells:
        trunk, share = longest[c.trajectory], c.decay_steps / c.steps
        if c.steps < trunk.steps:
            seconds, at = c.seconds and c.seconds * share, c.steps - c.decay_steps
            c = replace(c, cost=c.cost * share, seconds=seconds, trunk=trunk.name, trunk_step=at)
        found.append(c)
    return tuple(found)


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
        stages = tuple(g.stage(common, i + 1) for i in range(len(g.budgets)))
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
                partial(_cell, common, f"n{i}-x{m:g}", 1, s, tokens=RATIO * m * s.parameters,
                        recipe_of=middle * s.parameters)
                for i, s in enumerate(shapes)
            ]  # fmt: skip
            awaits = cells[1].awaits if cells else ()
            cells += [replace(d(), awaits=awaits) for d in drafts] if cells else _crossed(drafts)
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
        cells.append(_cell(common, f"r{i}", 1, shapes[n], tokens=d, recipe_of=aim))
    return _within(_listed("list", common, cells, cap), iter(()))


def _listed(kind: Kind, common: Common, cells: Sequence[Cell], cap: float) -> Plan:
    """One exact stage, with seeds at the cheapest cell and at the dearest but one."""
    grown = sorted((c for c in cells if c.role == "grid"), key=lambda c: c.cost)
    seeds = [*_again(grown[0], SEEDS[0]), *_again(grown[-2], SEEDS[1])]
    shared = share_trunks([*cells, *seeds])
    cost = sum(c.cost for c in shared)
    return Plan(kind, common, (Stage(1, None, shared, cost, cost, True),), cap)


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


def settled(stage: Stage, losses: Mapping[str, float]) -> tuple[Stage, float]:
    """With the learning rates that awaited crosses, and the gap in log loss left untuned. losses:
    by name of cell. Raises UserError where some are missing."""
    awaited = {name for c in stage.cells for name in c.awaits}
    if missing := sorted(awaited - set(losses)):
        what = f"{len(missing)} cells have no loss yet, such as {missing[0]}"
        raise UserError(f"stage {stage.number}", what, "let them end first")
    ends = [c for c in stage.cells if c.name in awaited]
    rates, gap = best_rates([(c.shape.parameters, c.learning_rate, losses[c.name]) for c in ends])
    own = {c.name: between(rates, c.shape.parameters) for c in stage.cells if c.awaits}
    made = [replace(c, learning_rate=own.get(c.name, c.learning_rate)) for c in stage.cells]
    return replace(stage, cells=tuple(made)), gap
