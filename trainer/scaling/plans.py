"""A plan as JSON and back.

Invariant: `load(dump(plan)) == plan`: what was decided is read again as it was, whatever the rules
of a later version would make of it.
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from models.config import ModelConfig
from trainer.scaling.cells import Cell
from trainer.scaling.design import Grid, Plan, Stage
from trainer.scaling.shapes import Aspect, Common, Rule, Shape
from trainer.scaling.tuning import Tuned


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
