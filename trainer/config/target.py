"""The user's own classes, named by `_target_` keys: where Python finds them, and how they are made.

Invariant: the directory of the command is searched last. A file there never replaces a module of
Python's, of a library's or of ours; every verb, rank and worker searches alike.
"""

import importlib
import importlib.util
import inspect
import os
import sys
from importlib.machinery import ModuleSpec
from typing import Any

from forescale.config.schema import TargetConfig
from forescale.errors import UserError


def _search_here() -> None:
    if (here := os.getcwd()) not in sys.path:
        sys.path.append(here)


def find_package(name: str) -> ModuleSpec | None:
    """The spec of a top-level package or module, without importing it; None where there is none."""
    _search_here()
    return importlib.util.find_spec(name)


def import_target(where: str, dotted: str) -> Any:
    """What a dotted name such as mypackage.Model stands for.

    where: the key that names it, for the message. Raises UserError where it can't be imported.
    """
    _search_here()
    module, _, name = dotted.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, SyntaxError) as e:
        todo = "install the package, or run from the directory that it is in"
        raise UserError(f"{where}={dotted}", f"can't be imported ({e})", todo) from e


def make(where: str, config: TargetConfig, **offered: Any) -> Any:
    """An object of the class that `config` names, made with its arguments and with those of
    `offered` that its signature has and the arguments lack.

    where: the section of the config, for the message. Raises UserError where the class can't be
    imported or made.
    """
    cls = import_target(f"{where}._target_", config.target)
    try:
        parameters = inspect.signature(cls).parameters
        added = {k: v for k, v in offered.items() if k in parameters and k not in config.arguments}
        return cls(**config.arguments, **added)
    except (TypeError, ValueError) as e:
        todo = f"check the keys under {where}"
        raise UserError(f"{where}._target_={config.target}", f"can't be made ({e})", todo) from e
