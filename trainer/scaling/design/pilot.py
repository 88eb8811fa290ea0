"""The pilot of an isoFLOP study: cheap runs that choose the sizes and the batch of all others.

    sizes     at the lowest budget, over the square of the grid's spread -> the centre of the first
              stage; learning rates are swept at both ends, as in any stage
    batches   a quarter of the rule's and four times it, each at three learning rates -> one factor
              of the batches of all later runs, and one of their learning rates

A small model wants smaller batches than the rule, which was fitted to models a thousand times its
size: with batches that are too large it has few steps, and its losses follow no law.

Invariant: no law is fitted to a run of a pilot.
"""

import math
from dataclasses import replace
from functools import partial

from forescale.ground.errors import UserError
from forescale.scaling.design.cells import RATES, Cell, batch_variants, make_cell, with_rate_sweeps
from forescale.scaling.design.shapes import Common
from forescale.scaling.design.tuning import RateBatchResponse

PILOT = 0  # number of its stage
_SIZES, _BATCH = 5, 4.0  # sizes; the factor from one batch to the next
RUNS = _SIZES + 2 * (RATES - 1) + 8  # 8: batches at their rates, without the cell in the middle
_FEWEST = 3  # sizes, for a parabola


def pilot_cells(common: Common, budget: float, centre: float, spread: float) -> tuple[Cell, ...]:
    """Return the cells of a pilot: sizes from centre / spread^2 to centre x spread^2 (parameters)
    with `budget` FLOPs each. Raises UserError if fewer than three models exist there."""
    powers = [2 * (2 * i / (_SIZES - 1) - 1) for i in range(_SIZES)]
    least = common.family.smallest
    shapes = common.family.nearest([max(least, centre * spread**p) for p in powers])
    if len(shapes) < _FEWEST:
        problem = f"only {len(shapes)} different models exist around {centre:.3g} parameters"
        raise UserError("sizes", problem, "raise plan.spread, or take larger budgets")
    drafts = [
        partial(make_cell, common, f"pilot-n{i}", PILOT, shape, budget)
        for i, shape in enumerate(shapes)
    ]
    cells = with_rate_sweeps(drafts)
    middle = len(shapes) // 2
    cells += batch_variants(drafts[middle], cells[middle], joint=True, factor=_BATCH)
    return tuple(replace(c, role="pilot") if c.role == "grid" else c for c in cells)


def with_batch(common: Common, middle: Cell, best: RateBatchResponse) -> Common:
    """Return the common settings with the batch that a pilot found, and its learning rate. common:
    with a rule that was fitted to the pilot's sweeps; middle: the cell whose batch was varied.
    Where the best batch or rate is at an end of those tried, rates change as the square root of the
    batch does (Malladi et al. 2022, arXiv 2205.10286)."""
    rule = common.rule
    factor = best.batch / middle.global_batch
    # Without an optimum inside, the best of a few noisy runs says little of the rate.
    of_rate = best.learning_rate / middle.learning_rate if best.inside else math.sqrt(factor)
    k, a, b = rule.rate
    low, high = rule.bounds
    changed = replace(
        rule, scale=rule.scale * factor, bounds=(low * factor, high),
        rate=(k * of_rate, a, b), highest=rule.highest * max(1.0, of_rate),
    )  # fmt: skip
    # What a rank feeds at once divides what it fed before, and isn't more than its batch.
    each = 2 ** math.floor(math.log2(max(1.0, best.batch / common.ranks)))
    micro_batch = common.ranks * math.gcd(common.micro_batch // common.ranks, each)
    return replace(common, rule=changed, micro_batch=micro_batch)
