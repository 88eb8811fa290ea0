"""The layout of an isoFLOP study: several sizes within each of several compute budgets."""

from dataclasses import dataclass
from functools import partial

from forescale.ground.errors import UserError
from forescale.scaling.config import PlanKeys
from forescale.scaling.design.cells import (
    RATES,
    Cell,
    batch_variants,
    make_cell,
    seed_repeats,
    with_rate_sweeps,
)
from forescale.scaling.design.shapes import RATIO, Common

EXTRA_RATES = 2  # of a size, if its best learning rate is at an edge
_SIZES = 3  # fewer determine no parabola
_ROUNDING = 0.99  # of the cap: budgets round to whole steps


@dataclass(frozen=True)
class Grid:
    """The layout of an isoFLOP plan. budgets: FLOPs, increasing; sizes: number per budget, from
    centre / spread to centre x spread; ratio: D/N at the centre of the first budget."""

    budgets: tuple[float, ...]
    sizes: int = 5
    spread: float = 2.5
    ratio: float = RATIO

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
        top = _ROUNDING * (keys.cap or 0.0) / runs
        return cls(tuple(top * s for s in shares), keys.sizes, keys.spread, keys.ratio)

    def cells(self, common: Common, stage: int, centre: float) -> tuple[Cell, ...]:
        """Return the cells of stage 1, 2, ... around N = centre. Raises UserError for fewer than
        three models."""
        budget, last = self.budgets[stage - 1], len(self.budgets)
        powers = [2 * i / (self.sizes - 1) - 1 for i in range(self.sizes)]
        shapes = common.family.nearest([centre * self.spread**p for p in powers])
        if len(shapes) < _SIZES:
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
