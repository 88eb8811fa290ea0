"""The recipes that a study compares, and its layout: a base and candidates at equal compute.

    a recipe     a name and arguments of `forescale train`, laid over those of the base; with the
                 factors batch=X, first_batch=X and aspect=X, which are no keys of `train`
    the layout   budgets of all recipes, and budgets of the base alone at both ends, so that no
                 multiplier is extrapolated: one at 2/5 of the lowest, and `beyond` above the
                 highest, each 5/2 of the one before
    a budget     of each recipe three learning rates, and runs with other seeds, which wait for the
                 best of them
    size         the base's layers and width; a recipe with other parts has another N, and as many
                 tokens as its budget pays for by its own FLOPs a token

Invariant: all recipes have the same number of learning rates and of seeds. Arguments of the base
come first in each recipe, so that a candidate changes the base.
"""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from forescale.config.compose import CONF, compose
from forescale.config.suggest import nearest_first
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.ground.foreign import read_text
from forescale.ground.typed import Count, Positive
from forescale.models.config import ModelConfig
from forescale.scaling.config import PlanKeys
from forescale.scaling.design.cells import FACTOR, GROWS, RATES, Cell, Role, make_cell
from forescale.scaling.design.shapes import Common, Shape, StoredModel
from forescale.scaling.design.tuning import updated_rule

BASE = "base"
_BELOW, _ABOVE = 0.4, 2.5  # from the lowest budget, and from the highest, to one of the base alone
_EXTRA = (4, 2)  # extra rates that the first stages pay for, of each recipe; a later one pays for 1
_ROUNDING = 0.97  # of the cap: budgets round to whole steps
_RATE = "optimizer.learning_rate"
_FACTORS = ("batch", "first_batch", "aspect")
_SIZES = ("model.width", "model.num_layers", "model.depth")  # of a cell, by its budget
BestRates = Sequence[tuple[float, float, float]]  # (non-embedding N, D, best rate) of sweeps


@dataclass(frozen=True)
class Recipe:
    """A recipe. arguments: of `forescale train`, those of the base first; model: its kind of
    layers; rate: the learning rate at which its first sweep is centred, None by the rule;
    adam_share: see Common; batch: factor of the batch; first_batch: the first batch divided by the
    later one, 1 or a half of it so many times; aspect: factor of layers over width."""

    name: str
    arguments: tuple[str, ...]
    model: StoredModel
    rate: Positive | None = None
    adam_share: Positive | None = None
    batch: Positive = 1.0
    aspect: Positive = 1.0
    first_batch: Positive = 1.0

    def common(self, common: Common, rates: BestRates = ()) -> Common:
        """Return what its cells have in common. rates: of its sweeps so far. Raises UserError for a
        batch of no whole windows, or for sizes without a ratio."""
        unit, ranks = common.micro_batch, common.ranks
        least = unit * min(1.0, self.batch)
        if least % ranks or least * self.first_batch % ranks:
            problem = f"of {unit} windows makes no whole ones a rank of batch={self.batch:g}"
            problem += f" first_batch={self.first_batch:g}" if self.first_batch < 1 else ""
            todo = f"write another factor, or plan.micro_batch={8 * ranks}"
            raise UserError("plan.micro_batch", problem, todo)
        rule = common.rule
        if self.rate is not None:
            rule = replace(rule, rate=(self.rate, 0.0, 0.0), highest=max(self.rate, rule.highest))
        aspect = common.aspect * self.aspect
        parts: dict[str, Any] = {
            "base": self.model,
            "adam_share": self.adam_share,
            "aspect": aspect,
        }
        return replace(common, rule=updated_rule(rule, rates), **parts)

    def shape(self, common: Common, budget: float, ratio: float) -> Shape:
        """Return its model at a budget: with the base's layers and width, or, where its aspect or
        heads forbid that, the model with the nearest N. common: the base's."""
        family = self.common(common).family
        (base,) = common.family.nearest([common.centre(budget, ratio)])
        if self.aspect == 1.0:
            with suppress(UserError):
                model = family.model(base.model.sizes.width, base.model.sizes.num_layers)
                return Shape(float(base.parameters), common.size, model)
        return family.nearest([base.parameters])[0]


def read_recipes(
    path: str | None, base: Sequence[str], candidates: Sequence[str]
) -> dict[str, list[str]]:
    """Return the arguments of the base, under BASE, and of each candidate, from a YAML file. path:
    None for the project's own file; a candidate A+B has the arguments of both. Raises UserError if
    the file can't be read, or if it has no recipe of a name."""
    file = Path(path).expanduser() if path else CONF / "candidates.yaml"
    try:
        known = yaml.safe_load(read_text(file))
    except yaml.YAMLError as e:
        problem = f"can't be read as YAML ({' '.join(str(e).split())[:200]})"
        raise UserError(str(file), problem, "correct plan.recipes=FILE") from None
    if not isinstance(known, dict):
        raise UserError(str(file), "holds no recipes", "write NAME: [KEY=VALUE, ...]")
    known = {str(name): texts for name, texts in known.items()}
    for name, texts in known.items():
        if not isinstance(texts, list) or not all(isinstance(t, str) and "=" in t for t in texts):
            problem = f"{name} is no list of arguments"
            raise UserError(str(file), problem, f"write {name}: [KEY=VALUE, ...]")

    def arguments(names: Sequence[str]) -> list[str]:
        for name in names:
            if name not in known:
                near = ", ".join(nearest_first(name, known)[:5])
                raise UserError(str(file), f"has no recipe {name!r}", f"the nearest are {near}")
        return [text for name in names for text in known[name]]

    recipes = {BASE: arguments(base)}
    for name in candidates:
        if name in recipes:
            problem = f"names {name} twice"
            if name == BASE:
                problem = f"can't have a recipe called {BASE}"
            todo = "give each candidate once, by another name"
            raise UserError("plan.candidates", problem, todo)
        recipes[name] = recipes[BASE] + arguments(name.split("+"))
    return recipes


def recipes_of(
    shared: Sequence[str], named: Mapping[str, Sequence[str]], owned: frozenset[str]
) -> tuple[Recipe, ...]:
    """Return the recipes, the base first.

    shared: arguments of all; named: of each recipe beside those, the base's under BASE; owned: keys
    that the study itself sets. Heads and MLP widths are kept as ratios, see Family. Raises
    UserError (ConfigError is one) if `train` would refuse them.
    """
    recipes, kind = list[Recipe](), ""
    for name, texts in named.items():
        factors = {key: _factor(name, key, texts) for key in _FACTORS}
        if name == BASE and set(factors.values()) != {1.0}:
            problem = "has batch=, first_batch= or aspect=, which are factors of the base itself"
            raise UserError("plan.base", problem, "give them to a candidate")
        arguments = tuple(text for text in texts if text.partition("=")[0] not in factors)
        job = _job(name, shared, arguments, owned)
        optimizer = job.optimizer
        kind = kind or optimizer.kind
        has_rate = any(a.startswith(f"{_RATE}=") for a in arguments) or optimizer.kind != kind
        adam = getattr(optimizer, "adam_learning_rate", None)
        share = adam / optimizer.learning_rate if adam else None
        rate = optimizer.learning_rate if has_rate else None
        assert isinstance(job.model, ModelConfig)
        recipes.append(Recipe(name, arguments, job.model, rate, share, **factors))
    return tuple(recipes)


def _job(
    name: str, shared: Sequence[str], arguments: Sequence[str], owned: frozenset[str]
) -> TrainJob:
    """Return the job of a recipe. Raises UserError for one that a study can't compare."""
    for argument in arguments:
        key = argument.partition("=")[0].lstrip("+")
        is_free = key.startswith("schedule.") or key == _RATE
        if key in _SIZES or (key in owned and not is_free):
            todo = "leave it out; batch=2 doubles a recipe's batch, aspect=2 its layers by width"
            raise UserError(f"recipe {name}", f"{key} is set by the study itself", todo)
    job = compose(TrainJob, ["train.steps=1000", *shared, *arguments])
    if not isinstance(job.model, ModelConfig) or not job.objective.is_next_token:
        problem = "has a model or objective whose compute or loss can't be compared to the base's"
        raise UserError(f"recipe {name}", problem, "leave it out")
    if job.train.first_batch is not None:
        problem = "train.first_batch is a number of windows, for batches of any size"
        todo = f"write first_batch=0.25: a quarter at first, over {GROWS:.0%} of the tokens"
        raise UserError(f"recipe {name}", problem, todo)
    return job


def _factor(name: str, key: str, arguments: Sequence[str]) -> float:
    """Return the factor that a recipe gives as KEY=X, 1 by default. Raises UserError if X is no
    factor."""
    values = [text.partition("=")[2] for text in arguments if text.partition("=")[0] == key]
    if not values:
        return 1.0
    text = f"{key}={values[-1]}"
    try:
        value = float(values[-1])
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise UserError(f"recipe {name}", f"{text} is no factor", f"write {key}=0.5")
    if key == "first_batch" and not (value < 1 and math.log2(value).is_integer()):
        todo = "write first_batch=0.5, 0.25, 0.125 or so on"
        raise UserError(f"recipe {name}", f"{text} is not doubled to 1", todo)
    return value


@dataclass(frozen=True)
class RecipeGrid:
    """The layout of a study of recipes. budgets: FLOPs, increasing, those of the base alone at both
    ends; seeds: runs of a recipe at its best rate, below the highest budget and from there on;
    fresh: runs that confirm a winner; beyond: number of budgets of the base alone at the upper
    end."""

    budgets: tuple[Positive, ...]
    ratio: Positive
    seeds: tuple[Count, Count]
    fresh: Count
    beyond: Count = 1

    @classmethod
    def within_cap(cls, keys: PlanKeys, common: Common, recipes: int) -> "RecipeGrid":
        """Return the grid with the most expensive budgets, a factor of `keys.step` apart, that the
        cap (FLOPs) pays for, whichever rates and winners turn out. recipes: with the base."""
        number, beyond = keys.budgets, keys.beyond
        shares = [keys.step ** (i + 1 - number) for i in range(number)]
        above = [_ABOVE ** (i + 1) for i in range(beyond)]
        shares = [shares[0] * _BELOW, *shares, *above]
        grid = cls(tuple(shares), keys.ratio, common.seeds, keys.fresh, beyond)
        runs = [RATES + grid.runs_with_seeds(i + 1) + grid.extra(i + 1) for i in range(len(shares))]
        counts = [1, *[recipes] * number, *[1] * beyond]
        cost = sum(n * k * s for n, k, s in zip(runs, counts, shares, strict=True))
        top = _ROUNDING * (keys.cap or 0.0) / (cost + keys.fresh * recipes)
        return replace(grid, budgets=tuple(top * s for s in shares))

    @property
    def top(self) -> int:
        """The stage of the highest budget that all recipes have."""
        return len(self.budgets) - self.beyond

    def runs_with_seeds(self, stage: int) -> int:
        """Return the number of runs of a recipe at its best rate in stage 1, 2, ..."""
        return self.seeds[stage >= self.top]

    def extra(self, stage: int) -> int:
        """Return the number of extra rates of a recipe that a stage pays for."""
        return _EXTRA[stage - 1] if stage <= len(_EXTRA) else 1

    def has_candidates(self, stage: int) -> bool:
        """True if the stage has all recipes, and not the base alone."""
        return 1 < stage <= self.top

    def cells(
        self, common: Common, recipe: Recipe, stage: int, rates: BestRates = ()
    ) -> list[Cell]:
        """Return the sweep of a recipe in stage 1, 2, ..., and its seeds, which wait for it."""
        budget, varied = self.budgets[stage - 1], recipe.common(common, rates)
        shape = recipe.shape(common, budget, self.ratio)
        name = f"b{stage}-{recipe.name}"

        def cell(suffix: str, factor: float, role: Role) -> Cell:
            planned = make_cell(
                varied, name, stage, shape, budget, role=role, rate_factor=factor,
                batch_factor=recipe.batch, first_batch=recipe.first_batch, suffix=suffix,
            )  # fmt: skip
            return replace(planned, recipe=recipe.name)

        factors = {"-lr-low": 1 / FACTOR, "-lr-high": FACTOR}
        sweep = [cell("", 1.0, "grid"), *(cell(s, by, "rate") for s, by in factors.items())]
        names = tuple(c.name for c in sweep)
        # Both seeds change at once, so that the noise of weights and data is measured together.
        seeds = [
            replace(cell(f"-seed{i}", 1.0, "seed"), seed=common.seed + i, waits_for=names)
            for i in range(1, self.runs_with_seeds(stage) + 1)
        ]
        return [*sweep, *seeds]
