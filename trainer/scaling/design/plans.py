"""A plan as JSON and back.

Invariant: `load(dump(plan)) == plan`: what was decided is read again as it was, whatever the rules
of a later version would make of it.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from forescale.models.config import ModelConfig
from forescale.scaling.design.cells import Cell
from forescale.scaling.design.plan import Grid, Plan, Stage
from forescale.scaling.design.shapes import Aspect, Common, Rule, Shape
from forescale.scaling.design.tuning import Tuned


def dump(plan: Plan) -> dict[str, Any]:
    return asdict(plan)


def load(facts: Mapping[str, Any]) -> Plan:
    """Raises KeyError or TypeError for what `dump` didn't write."""
    common = {
        **facts["common"],
        "base": ModelConfig(**facts["common"]["base"]),
        "aspect": Aspect(**facts["common"]["aspect"]),
        "rule": _made(Rule, facts["common"]["rule"]),
    }
    grid = _made(Grid, facts["grid"]) if facts["grid"] else None
    stages = tuple(map(_stage, facts["stages"]))
    more = {"common": _made(Common, common), "grid": grid, "stages": stages}
    return _made(Plan, {**facts, **more})


def _stage(facts: Mapping[str, Any]) -> Stage:
    tuned = tuple((int(n), _made(Tuned, t)) for n, t in facts["tuned"])
    return _made(Stage, {**facts, "cells": tuple(map(_cell, facts["cells"])), "tuned": tuned})


def _cell(facts: Mapping[str, Any]) -> Cell:
    shape = Shape(**{**facts["shape"], "model": ModelConfig(**facts["shape"]["model"])})
    return _made(Cell, {**facts, "shape": shape})


def _made(cls: type, facts: Mapping[str, Any]) -> Any:
    """JSON has lists where ours are tuples."""
    known = {f.name for f in fields(cls)}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in facts.items() if k in known}
    return cls(**values)
