"""Reads the recipes that a study names from a YAML file: NAME: [KEY=VALUE, ...].

Invariant: arguments of the base come first in each recipe, so that a candidate changes the base.
"""

from collections.abc import Sequence
from pathlib import Path

import yaml

from forescale.config.compose import CONF
from forescale.config.suggest import nearest_first
from forescale.errors import UserError
from forescale.scaling.design.recipe import BASE

_OURS = "candidates.yaml"


def read_recipes(
    path: str | None, base: Sequence[str], candidates: Sequence[str]
) -> dict[str, list[str]]:
    """Return the arguments of the base, under BASE, and of each candidate.

    path: None for the project's own file; a candidate A+B has the arguments of both. Raises
    UserError if the file can't be read, or if it has no recipe of a name.
    """
    where = Path(path).expanduser() if path else CONF / _OURS
    known = _read(where)
    own = [text for name in base for text in _named(where, known, name)]
    found = {BASE: own}
    for name in candidates:
        if name in found:
            problem = (
                f"names {name} twice" if name != BASE else f"can't have a recipe called {BASE}"
            )
            raise UserError("plan.candidates", problem, "give each candidate once, by another name")
        found[name] = own + [t for part in name.split("+") for t in _named(where, known, part)]
    return found


def _read(path: Path) -> dict[str, list[str]]:
    try:
        known = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        problem = f"can't be read as YAML ({' '.join(str(e).split())[:200]})"
        raise UserError(str(path), problem, "correct plan.recipes=FILE") from None
    if not isinstance(known, dict):
        raise UserError(str(path), "holds no recipes", "write NAME: [KEY=VALUE, ...]")
    for name, given in known.items():
        if not isinstance(given, list) or not all(isinstance(t, str) and "=" in t for t in given):
            problem = f"{name} is no list of arguments"
            raise UserError(str(path), problem, f"write {name}: [KEY=VALUE, ...]")
    return {str(name): given for name, given in known.items()}


def _named(path: Path, known: dict[str, list[str]], name: str) -> list[str]:
    if name not in known:
        near = ", ".join(nearest_first(name, known)[:5])
        raise UserError(str(path), f"has no recipe {name!r}", f"the nearest are {near}")
    return known[name]
