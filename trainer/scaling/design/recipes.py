"""The recipes that a study compares: a base and candidates at equal compute.

    a recipe     a name and arguments of `forescale train`, laid over those of the base; with the
                 factors batch=X, first_batch=X and aspect=X, which are no keys of `train`
    size         layers and width of one menu, the base's; a recipe with other parts has another N,
                 and as many tokens as its budget pays for by its own FLOPs a token

Invariant: arguments of the base come first in each recipe, so that a candidate changes the base.
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
from forescale.ground.typed import Positive
from forescale.models.config import ModelConfig
from forescale.scaling.design.cells import GROWS, Cell
from forescale.scaling.design.search import Dial
from forescale.scaling.design.shapes import Common, Shape, StoredModel, shares_of
from forescale.scaling.design.tuning import updated_rule

BASE = "base"
_RATE = "optimizer.learning_rate"
_FACTORS = ("batch", "first_batch", "aspect")
_SIZES = ("model.width", "model.num_layers", "model.depth")  # of a cell, by its budget
# What a recipe sets itself if it has one of these arguments; a dial that it sets isn't varied.
_SETS = {
    "tables": ("optimizer.adam_learning_rate", "optimizer.table_learning_rate"),
    "scalars": ("optimizer.adam_learning_rate", "optimizer.scalar_learning_rate"),
}


@dataclass(frozen=True)
class Recipe:
    """A recipe. arguments: of `forescale train`, those of the base first; model: its kind of
    layers; rate: the learning rate at which its first sweep is centred, None by the rule;
    shares: see Common; batch: factor of the batch; first_batch: the first batch divided by the
    later one, 1 or a half of it so many times; aspect: factor of layers over width."""

    name: str
    arguments: tuple[str, ...]
    model: StoredModel
    rate: Positive | None = None
    shares: tuple[tuple[str, Positive], ...] = ()
    batch: Positive = 1.0
    aspect: Positive = 1.0
    first_batch: Positive = 1.0

    def common(self, common: Common, earlier: Sequence[Cell] = ()) -> Common:
        """Return what its cells have in common. earlier: a seed of each budget, or of the base.
        Raises UserError for a batch of no whole windows, or for sizes without a ratio."""
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
        parts: dict[str, Any] = {"base": self.model, "shares": self.shares, "aspect": aspect}
        known = [c for c in earlier if c.recipe == self.name or self.rate is None]
        rates = [(c.shape.counts.non_embedding, c.tokens, c.learning_rate) for c in known]
        return replace(common, rule=updated_rule(rule, rates), **parts)

    def dials(self, names: Sequence[Dial]) -> list[Dial]:
        """Return those of the dials that it doesn't set itself."""
        keys = {text.partition("=")[0].lstrip("+") for text in self.arguments}
        fixed = {name for name, sets in _SETS.items() if keys & {*sets}}
        fixed |= {n for n in ("warmup", "decay") if is_set_by(self.arguments, f"schedule.{n}")}
        fixed |= {"batch"} if self.batch != 1 else set()
        return [name for name in names if name not in fixed]

    def shape(self, common: Common, size: float) -> Shape:
        """Return its model with the layers and width of the base's of this size, or, where its
        aspect or heads forbid that, the model with the nearest N. common: the base's."""
        family = self.common(common).family
        (base,) = common.family.nearest([size])
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
        rate = optimizer.learning_rate if has_rate else None
        assert isinstance(job.model, ModelConfig)
        recipes.append(Recipe(name, arguments, job.model, rate, shares_of(optimizer), **factors))
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


def is_set_by(recipe: Sequence[str], key: str) -> bool:
    """True if a recipe sets this key of a cell's schedule itself. All other keys are the cell's: it
    was planned and priced with them."""
    if not key.startswith("schedule."):
        return False
    settings = dict(text.lstrip("+").split("=", 1) for text in recipe)
    is_other = "schedule" in settings or settings.get("schedule.kind", "wsd") != "wsd"
    return key in settings or (is_other and key in ("schedule.kind", "schedule.decay"))


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
