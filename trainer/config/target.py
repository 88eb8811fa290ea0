"""The user's own classes, named by `_target_` keys: how they are imported and instantiated.

Invariant: the working directory is searched last, so a file there never replaces a module of the
standard library, of a package or of this project. All verbs, ranks and workers search alike.
"""

import importlib
import importlib.util
import inspect
import os
import sys
from dataclasses import fields
from importlib.machinery import ModuleSpec
from typing import Any

from forescale.config.objective import ObjectiveConfig
from forescale.config.optimizer import OptimizerConfig
from forescale.config.schema import TargetConfig
from forescale.errors import UserError

STORED = "--stored"  # of `train`: the arguments come from a file, which may name no code


def targets(job: Any) -> dict[str, str]:
    """Return the classes of the user's own that a job names, by their keys."""
    found: dict[str, Any] = {}
    for f in fields(job):
        value = getattr(job, f.name)
        is_list = isinstance(value, list)
        found |= {f"{f.name}.{i}": v for i, v in enumerate(value)} if is_list else {f.name: value}
    kinds = (TargetConfig, OptimizerConfig, ObjectiveConfig)
    named = {k: v.target for k, v in found.items() if isinstance(v, kinds) and v.target}
    return {f"{key}._target_": target for key, target in named.items()}


def refuse_targets(job: Any, trust: bool) -> None:
    """Raise UserError if a job whose arguments are stored in a file names a class of the user's
    own, and `trust` is False: it would run code that no command has named."""
    for key, target in targets(job).items() if not trust else ():
        what = f"would run the class {target}, which a stored file names, and not your command"
        raise UserError(key, what, "give launch.trust=true if you trust the study")


def _search_here() -> None:
    """Append the working directory to sys.path."""
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)


def find_package(name: str) -> ModuleSpec | None:
    """Return the spec of a top-level package or module without importing it; None if not found."""
    _search_here()
    return importlib.util.find_spec(name)


def import_target(where: str, dotted: str) -> Any:
    """Return the object with a dotted name such as mypackage.Model.

    where: the key that holds the name, for the message. Raises UserError if it can't be imported.
    """
    _search_here()
    module, _, name = dotted.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError) as e:
        todo = "install the package, or run the command in the directory that contains it"
        raise UserError(f"{where}={dotted}", f"can't be imported ({e})", todo) from e


def make(where: str, config: TargetConfig, **offered: Any) -> Any:
    """Return an instance of the class that `config` names.

    Its arguments are those of `config`, then those of `offered` that its signature takes. where:
    the section of the config, for the message. Raises UserError if the class can't be imported or
    instantiated.
    """
    cls = import_target(f"{where}._target_", config.target)
    try:
        parameters = inspect.signature(cls).parameters
        added = {k: v for k, v in offered.items() if k in parameters and k not in config.arguments}
        return cls(**config.arguments, **added)
    except (TypeError, ValueError) as e:
        what = f"can't be instantiated ({e})"
        todo = f"check the keys of section {where}"
        raise UserError(f"{where}._target_={config.target}", what, todo) from e
