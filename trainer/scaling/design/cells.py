"""A cell: one planned run of a study, with its shape, length, recipe, cost and config keys.

    make_cell          (N, D) or (N, C) of one family -> whole steps, batch, learning rate, warm-up,
                       decay
    with_rate_sweeps   the smallest and largest size at three learning rates; the sizes between wait
    batch_variants     a cell at half and twice its batch
    seed_repeats       a cell with other seeds: of the weights alone, of the data order alone
    share_trunks       runs of one trajectory: the shorter ones branch off the longest

Invariant: a cell has all that its run needs: the config keys, and the cells that must end before
it (for its learning rate, or as its trunk).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

from forescale.config.sections.batch import BatchRamp
from forescale.ground.typed import Count, Number, Positive, Size
from forescale.scaling.design.search import Trial
from forescale.scaling.design.shapes import Common, Shape, overrides

RATES = 3  # learning rates of a sweep
FACTOR = 2.0  # between the learning rates of a sweep, and between its batches
GROWS = 0.2  # the share of a run's tokens over which a batch that is smaller at first grows
UNRULED = "batch and learning rate outside the range of their rule"  # a flag
# Limits of the flags: fewest steps, shortest warm-up, its largest share of the run, and the largest
# relative change of D by rounding to whole steps.
_STEPS, _WARMUP, _LONG, _ROUNDED = 500, 20, 0.1, 0.02
Role = Literal[
    "grid", "rate", "batch", "rate-batch", "seed", "target", "crossed", "confirm", "pilot"
]


@dataclass(frozen=True)
class Cell:
    """A planned run.

    role: grid (the law is fitted to these), rate or batch (sweeps), rate-batch (both differ), seed
    (a repeat), target, crossed (of a recipe at its own or another's settings, to choose between
    them), confirm (a recipe or winning mixture, with fresh seeds), or pilot (a size of pilot.py).
    tokens = steps x batch; global_batch: windows; micro_batch: those that a rank feeds at once.
    first_batch: windows of the first step, if the batch grows, which it does for ramp_steps.
    flops: of the whole run, by convention; cost: FLOPs that it adds (a branch: its decay alone).
    waits_for: the cells whose losses determine its learning rate; until then it has the rule's.
    trunk, trunk_step: the run that it branches off, and where; branches: steps at which other
    cells branch off it.
    cell_of: the grid cell that it repeats, varies or has the settings of (its own for grid cells).
    seed: of the data order, and of the weights unless init_seed is given.
    rate_factor: its learning rate divided by that of its size; shares: see Common.
    recipe: its recipe's name in a study that compares several; trial: its place in their search;
    edges: of a seed, what was best at the end of the values that its recipe's search tried.
    weights: of each source, in a study of mixtures.
    """

    name: str
    stage: Count
    role: Role
    budget: Positive | None
    shape: Shape
    tokens: Size
    steps: Size
    global_batch: Size
    sequence_length: Size
    micro_batch: Size
    learning_rate: Positive
    warmup_steps: Count
    decay_steps: Count
    seed: Count
    flops: dict[str, Positive]
    cost: Number
    flags: tuple[str, ...] = ()
    waits_for: tuple[str, ...] = ()
    trunk: str | None = None
    trunk_step: Count | None = None
    cell_of: str = ""
    init_seed: Count | None = None
    branches: tuple[Count, ...] = ()
    rate_factor: Positive = 1.0
    shares: tuple[tuple[str, Positive], ...] = ()
    recipe: str = ""
    trial: Trial | None = None
    edges: tuple[str, ...] = ()
    first_batch: Size | None = None
    ramp_steps: Count = 0
    weights: tuple[tuple[str, Number], ...] = ()

    @property
    def trajectory(self) -> tuple[Any, ...]:
        """What two runs must have in common to be identical until the first decays."""
        seeds = (self.seed, self.init_seed)
        recipe = (self.learning_rate, self.global_batch, self.warmup_steps, self.waits_for)
        return (*overrides(self.shape.model).items(), *recipe, *seeds)

    @property
    def keys(self) -> dict[str, Any]:
        """The config keys of its run, by full name."""
        ramp = f"{self.ramp_steps} steps"
        batches = {"train.first_batch": self.first_batch, "train.batch_ramp": ramp}
        return {
            "run.name": self.name,
            **overrides(self.shape.model),
            "train.steps": self.steps,
            "train.tokens": None,
            "train.global_batch": self.global_batch,
            **(batches if self.first_batch is not None else {}),
            "train.sequence_length": self.sequence_length,
            "train.micro_batch": self.micro_batch,
            "train.seed": self.seed,
            "train.init_seed": self.init_seed,
            "optimizer.learning_rate": self.learning_rate,
            **{name: self.learning_rate * share for name, share in self.shares},
            "schedule.kind": "wsd",
            "schedule.warmup": f"{self.warmup_steps} steps",
            "schedule.decay": f"{self.decay_steps} steps",
            **({"run.from.run": self.trunk} if self.trunk else {}),
            **({"run.from.step": self.trunk_step} if self.trunk else {}),
            **({"checkpoint.at": list(self.branches)} if self.branches else {}),
            **({"data.weights": dict(self.weights)} if self.weights else {}),
        }


def make_cell(
    common: Common, name: str, stage: int, shape: Shape, budget: float | None = None,
    tokens: float | None = None, recipe_of: float | None = None, role: Role = "grid",
    rate_factor: float = 1.0, batch_factor: float = 1.0, first_batch: float = 1.0,
    suffix: str = "",
) -> Cell:  # fmt: skip
    """Return the cell of this shape with `budget` FLOPs or `tokens`.

    recipe_of: the D that batch and learning rate are chosen for, None for its own; rate_factor,
    batch_factor: multiply the learning rate and batch of the rule; first_batch: the first batch
    divided by the later one, a power of a half.
    """
    length, rule, n = common.sequence_length, common.rule, shape.counts.non_embedding
    per = common.per_token(shape.model)
    budgeted = tokens or (budget or 0) / per[common.cost]
    aim = recipe_of or budgeted
    # The rule's batch, rounded to the study's micro-batch, times a factor. A smaller batch has a
    # smaller micro-batch, if it divides by the ranks.
    unit = common.micro_batch
    usual = max(1, round(rule.batch(aim) / (unit * length))) * unit
    least = unit * min(1.0, batch_factor)
    at_once = int(least) if least % common.ranks == 0 and least else unit
    windows = max(1, round(usual * batch_factor / at_once)) * at_once
    full = max(1, round(budgeted / (windows * length)))
    # Batches begin with the share `first_batch`, and double at equal intervals until GROWS of the
    # tokens: a power series.
    doublings = round(-math.log2(first_batch))
    each = max(1, round(GROWS * full / (1 - first_batch))) if doublings else 0
    ramp = BatchRamp(windows, (each,) * doublings)
    steps = ramp.steps_for(full * ramp.full)
    tokens = ramp.samples(steps) * length
    # Warm-up over N tokens: a constant one is too long for small models (Porian et al. 2024, arXiv
    # 2406.19146). Our bound to a tenth of the run: with D a few times N, N tokens are too long too.
    warmup = ramp.steps_for(math.ceil(min(shape.parameters, _LONG * aim) / length))
    off = abs(tokens / budgeted - 1)
    flags = {
        f"fewer than {_STEPS} steps": steps < _STEPS,
        f"warm-up over {_LONG:.0%}": warmup > ramp.steps_for(math.ceil(_LONG * full * ramp.full)),
        f"warm-up of fewer than {_WARMUP} steps": warmup < _WARMUP,
        "D beyond one epoch": common.unique is not None and tokens > common.unique,
        f"rounding to whole steps changes D by {off:.0%}": off > _ROUNDED,
        UNRULED: not rule.covers(n, budgeted),
    }
    flops = {convention: float(tokens * one) for convention, one in per.items()}
    decay, cost = math.ceil(common.decay * full), flops[common.cost]
    return Cell(
        name + suffix, stage, role, budget, shape, tokens, steps, windows, length,
        math.gcd(at_once, ramp.first) // common.ranks, rule.learning_rate(n, aim) * rate_factor,
        min(warmup, steps - decay), decay, common.seed, flops, cost,
        tuple(flag for flag, is_so in flags.items() if is_so), cell_of=name,
        rate_factor=rate_factor, shares=common.shares,
        first_batch=ramp.first if ramp.lengths else None, ramp_steps=ramp.steps,
    )  # fmt: skip


def with_rate_sweeps(drafts: Sequence[Callable[..., Cell]]) -> list[Cell]:
    """Return a cell of each size, and two more learning rates of the smallest and the largest size,
    which the sizes between wait for. drafts: make_cell with all but role and factors, by size."""
    cells, factors = [d() for d in drafts], ((1 / FACTOR, "low"), (FACTOR, "high"))
    ends = [(d, by, label) for d in (drafts[0], drafts[-1]) for by, label in factors]
    rates = [d(role="rate", rate_factor=by, suffix=f"-lr-{label}") for d, by, label in ends]
    sweep = tuple(c.name for c in (cells[0], cells[-1], *rates))
    return [cells[0], *(replace(c, waits_for=sweep) for c in cells[1:-1]), cells[-1], *rates]


def batch_variants(
    draft: Callable[..., Cell], middle: Cell, joint: bool, factor: float = FACTOR
) -> list[Cell]:
    """Return the cell `middle` at its batch divided by the factor, and times the factor. joint:
    each batch at three learning rates; draft: make_cell for this cell with all but role and
    factors. A batch that rounds to the cell's own is left out."""
    batches = [(1.0, ""), (1 / factor, "-batch-low"), (factor, "-batch-high")]
    rates = [(1.0, ""), (1 / FACTOR, "-rate-low"), (FACTOR, "-rate-high")]
    cells = list[Cell]()
    for (size, batch), (by, rate) in product(batches, rates if joint else rates[:1]):
        role: Role = "rate-batch" if rate else "batch"
        c = draft(role=role, batch_factor=size, rate_factor=by, suffix=f"{batch}{rate}")
        if (batch and c.global_batch != middle.global_batch) or (rate and not batch):
            cells.append(replace(c, waits_for=middle.waits_for))
    return cells


def seed_repeats(cell: Cell, seeds: int) -> list[Cell]:
    """Return repeats of a cell with other seeds; `seeds` counts its own run too. Half of them,
    rounded up, have other initial weights and the same data order, the others the same weights and
    another data order, so that both parts of the noise can be measured."""
    repeats = list[Cell]()
    for i in range(1, seeds):
        kind, key = ("init", "init_seed") if i % 2 else ("data", "seed")
        number = (i + 1) // 2
        changes: dict[str, Any] = {"init_seed": cell.seed, key: cell.seed + number}
        repeats.append(replace(cell, name=f"{cell.name}-{kind}{number}", role="seed", **changes))
    return repeats


def extra_rate(cells: Sequence[Cell], rate: float) -> Cell:
    """Return a cell that adds this learning rate to the cells of a sweep."""
    near = min(cells, key=lambda c: abs(math.log(c.learning_rate / rate)))
    tried = sum(c.role == "rate" for c in cells)
    name = f"{near.cell_of}-lr-{'higher' if rate > near.learning_rate else 'lower'}{tried - 1}"
    return replace(near, name=name, role="rate", learning_rate=rate)


def share_trunks(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Return the cells, where all of one trajectory branch off the longest one, each where its
    decay begins. A branch costs its decay alone (Hägele et al. 2024, arXiv 2405.18392)."""
    longest = {c.trajectory: c for c in sorted(cells, key=lambda c: c.steps)}
    shared = list[Cell]()
    for c in cells:
        trunk, share = longest[c.trajectory], c.decay_steps / c.steps
        if c.steps < trunk.steps:
            at = c.steps - c.decay_steps
            c = replace(c, cost=c.cost * share, trunk=trunk.name, trunk_step=at)
        shared.append(c)
    off = {(c.trunk, c.trunk_step) for c in shared if c.trunk and c.trunk_step}
    steps = {name: sorted(at for trunk, at in off if trunk == name) for name, _ in off}
    return tuple(replace(c, branches=tuple(steps.get(c.name, ()))) for c in shared)
