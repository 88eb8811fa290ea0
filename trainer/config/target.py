"""The user's own classes, named by `_target_` keys: how they are imported and instantiated.

Invariant: the working directory is searched last, so a file there never replaces a module of the
standard library, of a package or of this project. All verbs, ranks and workers search alike. A
class is imported only if a command of this user names it, or has named it before for the same run
with the same arguments. This is remembered in the user's state directory: somebody else may have
written the run's.
"""

import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import fields
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, TypeGuard

from platformdirs import user_state_path

from forescale.config.schema import TargetConfig, plain
from forescale.ground.errors import UserError

STORED = "--stored"  # of `train`: the arguments come from a file, which may name no code
# The class for model=transformers: ours, so that no command must name it.
ANY_CLASS = "forescale.models.hf.any_class.AnyModel"
CELL = "--cell"  # of `train`: a run of a study, which compares losses and needs no sample of text


def is_any_class(model: Any) -> TypeGuard[TargetConfig]:
    """Return True for the model of a job that is a class of transformers."""
    return isinstance(model, TargetConfig) and model.target == ANY_CLASS


def targets(job: Any) -> dict[str, str]:
    """Return the classes of the user's own that a job names, by their keys."""
    values: dict[str, Any] = {}
    for f in fields(job):
        value = getattr(job, f.name)
        is_list = isinstance(value, list)
        values |= {f"{f.name}.{i}": v for i, v in enumerate(value)} if is_list else {f.name: value}
    if is_any_class(values.get("model")):
        del values["model"]
    named = {k: v.target for k, v in values.items() if isinstance(v, TargetConfig) and v.target}
    return {f"{key}._target_": target for key, target in named.items()}


def refuse_targets(job: Any, trust: bool) -> None:
    """Raise UserError if a job whose arguments are stored in a file names a class of the user's
    own, and `trust` is False: it would run code that no command has named."""
    for key, target in targets(job).items() if not trust else ():
        problem = f"would run the class {target}, which a stored file names, and not your command"
        raise UserError(key, problem, "give launch.trust=true if you trust the study")


def refuse_stored(job: Any, run: Path, typed: Collection[str]) -> None:
    """Raise UserError if the job of an existing run names a class of the user's own that only the
    run's config names: none of the keys and sections `typed` has it, no earlier command of this
    user named it for this run, and there is no trust=true."""
    if job.trust or not (named := targets(job)) or _memory(job, run).exists():
        return
    for key, target in named.items():
        if not any(key.startswith(f"{path}.") or key == path for path in typed):
            problem = f"the run's config names the class {target}, and your command doesn't"
            raise UserError(
                key, problem, f"give {key}={target}, or trust=true if you trust the run"
            )


def remember(job: Any, run: Path) -> None:
    """Remember that this user's command named the classes of `job` for the run in a directory, so
    that the run's name alone resumes it. Without a state directory, they must be named again."""
    if targets(job):
        with suppress(OSError):
            path = _memory(job, run)
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            path.touch()


def _memory(job: Any, run: Path) -> Path:
    """Return the file that is there if this user has named the classes of `job` for a run."""
    sections = sorted({key.partition(".")[0] for key in targets(job)})
    named = {"run": str(run.resolve()), **{name: plain(getattr(job, name)) for name in sections}}
    digest = hashlib.sha256(json.dumps(named, sort_keys=True, default=str).encode()).hexdigest()
    return user_state_path("forescale") / "named" / digest


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
        if is_any_class(config) and isinstance(e, ValueError):
            problem, _, todo = str(e).partition("; ")
            raise UserError(f"model.name={config.arguments['name']}", problem, todo) from e
        problem = f"can't be instantiated ({e})"
        todo = f"check the keys of section {where}"
        raise UserError(f"{where}._target_={config.target}", problem, todo) from e
