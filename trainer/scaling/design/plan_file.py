"""A study's plan as JSON and back.

Invariant: `load(dump(plan)) == plan`. A plan is read as it was decided, even by a later version
that would decide otherwise.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from forescale.models.config import ModelConfig
from forescale.scaling.design.cells import Cell
from forescale.scaling.design.plan import Grid, StudyPlan, StudyStage
from forescale.scaling.design.recipe import Recipe, RecipeGrid
from forescale.scaling.design.shapes import Aspect, Common, Rule, Shape
from forescale.scaling.design.tuning import Tuned


def dump(plan: StudyPlan) -> dict[str, Any]:
    """Return the plan as JSON values."""
    return asdict(plan)


def load(facts: Mapping[str, Any]) -> StudyPlan:
    """Return the plan that `dump` wrote. Raises KeyError, TypeError or ValueError for anything
    else."""
    common = {
        **facts["common"],
        "base": ModelConfig(**facts["common"]["base"]),
        "aspect": Aspect(**facts["common"]["aspect"]),
        "rule": _made(Rule, facts["common"]["rule"]),
    }
    grid = _made(Grid, facts["grid"]) if facts["grid"] else None
    stages = tuple(map(_stage, facts["stages"]))
    recipes = tuple(map(_recipe, facts.get("recipes", [])))
    layout = facts.get("recipe_grid")
    more = {"common": _made(Common, common), "grid": grid, "stages": stages, "recipes": recipes,
            "recipe_grid": _made(RecipeGrid, layout) if layout else None}  # fmt: skip
    return _made(StudyPlan, {**facts, **more})


def _recipe(facts: Mapping[str, Any]) -> Recipe:
    return _made(Recipe, {**facts, "model": ModelConfig(**facts["model"])})


def _stage(facts: Mapping[str, Any]) -> StudyStage:
    tuned = tuple((int(n), _made(Tuned, t)) for n, t in facts["tuned"])
    return _made(StudyStage, {**facts, "cells": tuple(map(_cell, facts["cells"])), "tuned": tuned})


def _cell(facts: Mapping[str, Any]) -> Cell:
    for name in (facts["name"], facts["trunk"]):  # directories and log files are named by them
        if name is not None and not re.fullmatch(r"\w[\w.+-]*", name):
            raise ValueError(f"{name!r} is no name of a cell")
    shape = Shape(**{**facts["shape"], "model": ModelConfig(**facts["shape"]["model"])})
    return _made(Cell, {**facts, "shape": shape})


def _made(cls: type, facts: Mapping[str, Any]) -> Any:
    """An object of a dataclass from JSON, whose lists become tuples."""
    known = {f.name for f in fields(cls)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items() if k in known}
    return cls(**values)
