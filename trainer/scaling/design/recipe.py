"""A recipe of a study, and the layout of a study that compares several.

    a recipe     a name and arguments of `forescale train`, laid over those of the base; with the
                 factors batch=X, first_batch=X and aspect=X, which are no keys of `train`
    the layout   budgets of all recipes, and some of the base alone at both ends, so that no
                 multiplier is extrapolated: one at 2/5 of the lowest, and `beyond` above the
                 highest, each 5/2 of the one before

Invariant: all recipes have the same number of learning rates and of seeds.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from forescale.config.compose import compose
from forescale.config.train import TrainJob
from forescale.errors import UserError
from forescale.models.config import ModelConfig
from forescale.scaling.design.cells import GROWS
from forescale.scaling.design.shapes import Common
from forescale.scaling.design.tuning import updated_rule

BASE = "base"
RATES = 3  # learning rates of a sweep
_BELOW, _ABOVE = 0.4, 2.5  # from the lowest budget, and from the highest, to one of the base alone
_MORE = (4, 2)  # extra rates that the first stages pay for, of each recipe; a later one pays for 1
_ROUNDING = 0.97  # of the cap: budgets round to whole steps
_RATE = "optimizer.learning_rate"
_DIALS = ("batch", "first_batch", "aspect")
_SIZES = ("model.width", "model.num_layers", "model.depth")  # of a cell, by its budget
Found = Sequence[tuple[float, float, float]]  # (non-embedding N, D, best rate) of sweeps


@dataclass(frozen=True)
class Recipe:
    """A recipe. arguments: of `forescale train`, those of the base first; model: its kind of
    layers; rate: the learning rate at which its first sweep is centred, None by the rule;
    adam_share: see Common; batch: factor of the batch; first_batch: the first batch divided by the
    later one, 1 or a half of it so many times; aspect: factor of layers over width."""

    name: str
    arguments: tuple[str, ...]
    model: ModelConfig
    rate: float | None = None
    adam_share: float | None = None
    batch: float = 1.0
    aspect: float = 1.0
    first_batch: float = 1.0

    def common(self, common: Common, found: Found = ()) -> Common:
        """Return what its cells have in common. found: (non-embedding N, D, best rate) of its
        sweeps so far. Raises UserError for a batch of no whole windows."""
        self._expect_windows(common.micro_batch, common.ranks)
        rule = common.rule
        if self.rate is not None:
            rule = replace(rule, rate=(self.rate, 0.0, 0.0), highest=max(self.rate, rule.highest))
        layers = common.aspect.layers * self.aspect
        return replace(
            common, base=self.model, adam_share=self.adam_share, rule=updated_rule(rule, found),
            aspect=replace(common.aspect, layers=layers),
        )  # fmt: skip

    def _expect_windows(self, unit: int, ranks: int) -> None:
        least = unit * min(1.0, self.batch)
        if least % ranks or least * self.first_batch % ranks:
            problem = f"of {unit} windows makes no whole ones a rank of batch={self.batch:g}"
            problem += f" first_batch={self.first_batch:g}" if self.first_batch < 1 else ""
            todo = f"write another factor, or plan.micro_batch={8 * ranks}"
            raise UserError("plan.micro_batch", problem, todo)


def recipes_of(
    shared: Sequence[str], named: Mapping[str, Sequence[str]], owned: frozenset[str]
) -> tuple[Recipe, ...]:
    """Return the recipes, the base first.

    shared: arguments of all; named: of each recipe beside those, the base's under BASE; batch=X,
    first_batch=X and aspect=X are factors, not keys of `train`; owned: keys that the study itself
    sets, as it does width and layers. Heads and MLP widths are kept as ratios, see Family. Raises
    UserError (ConfigError is one) if `train` would refuse them.
    """
    base = None
    found = list[Recipe]()
    for name, given in named.items():
        dials = {k: _factor(name, k, given) for k in _DIALS}
        if name == BASE and set(dials.values()) != {1.0}:
            problem = "has batch=, first_batch= or aspect=, which are factors of its own"
            raise UserError("plan.base", problem, "give them to a candidate")
        own = tuple(a for a in given if a.partition("=")[0] not in dials)
        for argument in own:
            key = argument.partition("=")[0].lstrip("+")
            is_free = key.startswith("schedule.") or key == _RATE
            if key in _SIZES or (key in owned and not is_free):
                todo = (
                    "leave it out; batch=2 doubles a recipe's batch, aspect=2 its layers by width"
                )
                raise UserError(f"recipe {name}", f"{key} is set by the study itself", todo)
        job = compose(TrainJob, ["train.steps=1000", *shared, *own])
        if not isinstance(job.model, ModelConfig) or not job.objective.is_next_token:
            problem = (
                "has a model or an objective whose compute and loss the base's can't be compared to"
            )
            raise UserError(f"recipe {name}", problem, "leave it out")
        if job.train.first_batch is not None:
            problem = "train.first_batch is a number of windows, for batches of any size"
            todo = f"write first_batch=0.25: a quarter at first, over {GROWS:.0%} of the tokens"
            raise UserError(f"recipe {name}", problem, todo)
        base = base or job
        optimizer = job.optimizer
        is_typed = any(a.startswith(f"{_RATE}=") for a in own)
        is_own = is_typed or optimizer.kind != base.optimizer.kind
        adam = optimizer.adam_learning_rate
        share = adam / optimizer.learning_rate if adam else None
        rate = optimizer.learning_rate if is_own else None
        found.append(Recipe(name, own, job.model, rate, share, **dials))
    return tuple(found)


def _factor(name: str, key: str, arguments: Sequence[str]) -> float:
    """Return the factor that a recipe gives as KEY=X; 1 if it gives none. Raises UserError for
    what is none."""
    for text in reversed(arguments):
        if text.partition("=")[0] == key:
            try:
                value = float(text.partition("=")[2])
            except ValueError:
                value = 0.0
            if not 0 < value < math.inf:
                raise UserError(f"recipe {name}", f"{text} is no factor", f"write {key}=0.5")
            if key == "first_batch" and not (value < 1 and math.log2(value).is_integer()):
                todo = "write first_batch=0.5, 0.25, 0.125 or so on"
                raise UserError(f"recipe {name}", f"{text} is not doubled to 1", todo)
            return value
    return 1.0


@dataclass(frozen=True)
class RecipeGrid:
    """The layout of a study of recipes. budgets: FLOPs, increasing, those of the base alone at both
    ends; seeds: runs of a recipe at its best rate, below the highest budget and from there on;
    fresh: runs that confirm a winner; beyond: number of budgets of the base alone at the upper
    end."""

    budgets: tuple[float, ...]
    ratio: float
    seeds: tuple[int, int]
    fresh: int
    beyond: int = 1

    @classmethod
    def within_cap(
        cls, cap: float, recipes: int, budgets: int, step: float, ratio: float,
        seeds: tuple[int, int], fresh: int, beyond: int = 1,
    ) -> "RecipeGrid":  # fmt: skip
        """Return the grid with the most expensive budgets, a factor of `step` apart, that the cap
        (FLOPs) pays for, whichever rates and winners turn out. recipes: with the base."""
        shares = [step ** (i + 1 - budgets) for i in range(budgets)]
        above = [_ABOVE ** (i + 1) for i in range(beyond)]
        every = (shares[0] * _BELOW, *shares, *above)
        made = cls(every, ratio, seeds, fresh, beyond)
        runs = [made.runs(i + 1) + made.extra(i + 1) for i in range(len(every))]
        counts = [1, *[recipes] * budgets, *[1] * beyond]
        cost = sum(n * k * s for n, k, s in zip(runs, counts, every, strict=True))
        top = _ROUNDING * cap / (cost + fresh * recipes)
        return replace(made, budgets=tuple(top * s for s in every))

    @property
    def top(self) -> int:
        """The stage of the highest budget that all recipes have."""
        return len(self.budgets) - self.beyond

    def is_high(self, stage: int) -> bool:
        """True for the highest budget of all recipes, and those of the base above it."""
        return stage >= self.top

    def runs(self, stage: int) -> int:
        """Return the number of runs of a recipe in stage 1, 2, ..."""
        return RATES + self.seeds[self.is_high(stage)]

    def extra(self, stage: int) -> int:
        """Return the number of extra rates of a recipe that a stage pays for."""
        return _MORE[stage - 1] if stage <= len(_MORE) else 1

    def has_candidates(self, stage: int) -> bool:
        """True if the stage has all recipes, and not the base alone."""
        return 1 < stage <= self.top
