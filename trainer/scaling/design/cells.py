"""A run to be: its shape, length, recipe and cost, and the config keys that make it.

    cell      (N, D) or (N, C) of one family -> whole steps, batch, learning rate, warm-up, decay
    crossed   the ends of a budget at three learning rates, which those between await
    again     a cell with other seeds: of the weights alone, of the data alone
    trunks    runs of one trajectory, of which the shorter branch off the longest

Invariant: what a cell says is all that its run needs: config keys, and the cells that must end
before (for a learning rate, a trunk).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from forescale.scaling.design.shapes import Common, Shape, overrides

FACTOR = 2.0  # between the three learning rates of a cross, and the batches of a check
# Habits: least steps, least warm-up, its greatest share; how far whole steps may take D off.
_STEPS, _WARMUP, _LONG, _ROUNDED = 500, 20, 0.1, 0.02
Role = Literal["grid", "rate", "batch", "cross", "seed", "target"]


@dataclass(frozen=True)
class Cell:
    """A run to be. tokens = steps x batch; batch in windows; flops: of the whole run by every
    convention; cost: FLOPs that it adds, a branch its decay alone; seconds: of one device, if its
    rate is known; awaits: the cells whose losses tell its learning rate (until then that of the
    rule); trunk, trunk_step: the run that it branches off; branches: steps at which others branch
    off it; of: the cell of the grid that it repeats, or tunes; seed: of the data, and of the
    weights unless init_seed is given; rate_by: its learning rate over that of its size;
    adam_share: see Common."""

    name: str
    stage: int
    role: Role
    budget: float | None
    shape: Shape
    tokens: int
    steps: int
    global_batch: int
    sequence_length: int
    micro_batch: int
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
    of: str = ""
    init_seed: int | None = None
    branches: tuple[int, ...] = ()
    rate_by: float = 1.0
    adam_share: float | None = None

    @property
    def trajectory(self) -> tuple[Any, ...]:
        """What two runs must share to be one until the first decays."""
        seeds = (self.seed, self.init_seed)
        recipe = (self.learning_rate, self.global_batch, self.warmup_steps, self.awaits)
        return (*overrides(self.shape.model).items(), *recipe, *seeds)

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
            "train.micro_batch": self.micro_batch,
            "train.seed": self.seed,
            "train.init_seed": self.init_seed,
            "optimizer.learning_rate": self.learning_rate,
            **self._adam_rate,
            "schedule.kind": "wsd",
            "schedule.warmup": f"{self.warmup_steps} steps",
            "schedule.decay": f"{self.decay_steps} steps",
            **({"run.from.run": self.trunk} if self.trunk else {}),
            **({"run.from.step": self.trunk_step} if self.trunk else {}),
            **({"checkpoint.at": list(self.branches)} if self.branches else {}),
        }

    @property
    def _adam_rate(self) -> dict[str, float]:
        """Both learning rates of Muon are tuned as one."""
        share = self.adam_share
        return {"optimizer.adam_learning_rate": self.learning_rate * share} if share else {}


def make_cell(
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
        common.micro_batch, rule.learning_rate(n, aim) * rate_by, min(warmup, steps - decay), decay,
        common.seed, flops, cost, cost / common.rate if common.rate else None,
        tuple(what for what, is_so in doubts.items() if is_so), of=name, rate_by=rate_by,
        adam_share=common.adam_share,
    )  # fmt: skip


def crossed(drafts: Sequence[Callable[..., Cell]]) -> list[Cell]:
    """The smallest and the largest size at three learning rates; those between await them."""
    found, words = [d() for d in drafts], ((1 / FACTOR, "low"), (FACTOR, "high"))
    ends = [(d, by, word) for d in (drafts[0], drafts[-1]) for by, word in words]
    more = [d(role="rate", rate_by=by, suffix=f"-lr-{word}") for d, by, word in ends]
    awaits = tuple(c.name for c in (found[0], found[-1], *more))
    return [found[0], *(replace(c, awaits=awaits) for c in found[1:-1]), found[-1], *more]


def basin_of(draft: Callable[..., Cell], middle: Cell, whole: bool) -> list[Cell]:
    """Half and twice the batch of a cell; whole: each batch at three learning rates, a cross of
    both. A batch that comes to be the cell's own, since it is the least there is, is left out."""
    batches = [(1.0, ""), (1 / FACTOR, "-batch-low"), (FACTOR, "-batch-high")]
    rates = [(1.0, ""), (1 / FACTOR, "-rate-low"), (FACTOR, "-rate-high")]
    found = list[Cell]()
    for batch_by, batch in batches:
        for rate_by, rate in rates if whole else rates[:1]:
            role: Role = "cross" if rate else "batch"
            c = draft(role=role, batch_by=batch_by, rate_by=rate_by, suffix=f"{batch}{rate}")
            if (batch and c.global_batch != middle.global_batch) or (rate and not batch):
                found.append(replace(c, awaits=middle.awaits))
    return found


def again(cell: Cell, seeds: int) -> list[Cell]:
    """The other seeds of a cell; `seeds` counts its own. Half of them, rounded up, begin with other
    weights on the same data in the same order, the others with the same weights on other data: what
    either makes of the noise can be told apart."""
    made = list[Cell]()
    for i in range(1, seeds):
        number = (i + 1) // 2
        other = replace(cell, role="seed", init_seed=cell.seed)
        if i % 2:
            other = replace(other, name=f"{cell.name}-init{number}", init_seed=cell.seed + number)
        else:
            other = replace(other, name=f"{cell.name}-data{number}", seed=cell.seed + number)
        made.append(other)
    return made


def wider(cells: Sequence[Cell], rate: float) -> Cell:
    """One more learning rate of a cross; cells: of one size, that were tried."""
    near = min(cells, key=lambda c: abs(math.log(c.learning_rate / rate)))
    tried = sum(c.role == "rate" for c in cells)
    name = f"{near.of}-lr-{'higher' if rate > near.learning_rate else 'lower'}{tried - 1}"
    return replace(near, name=name, role="rate", learning_rate=rate)


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
    off = {(c.trunk, c.trunk_step) for c in found if c.trunk and c.trunk_step}
    steps = {name: sorted(at for trunk, at in off if trunk == name) for name, _ in off}
    return tuple(replace(c, branches=tuple(steps.get(c.name, ()))) for c in found)
