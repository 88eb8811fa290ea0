"""The layers of a config: a run's frozen config, the files that a command chooses, the typed keys.

Invariant: a command replaces only those values of a frozen config that it sets. The keys that say
how one command resumes, and what it trusts, never come from a frozen config.
"""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from forescale.config.job import Find
from forescale.config.schema import (
    TargetConfig,
    flatten,
    hints,
    is_block,
    kinds_of,
    name_of,
    options,
    section_class,
)
from forescale.config.target import ANY_CLASS

LENGTHS = ("train.steps", "train.tokens", "train.tokens_per_parameter")  # a run has one of them
_OF_COMMAND = ("run.name", "run.root", "run.resume", "trust")


def keys_of(picks: Mapping[str, str], files: Mapping[str, Mapping[str, Path]]) -> list[str]:
    """Return the paths that the chosen files set: of a group its whole section, of a recipe or an
    experiment its keys. Files that lie below come first.

    picks: the choice of each group; files: all choices of each group, the lowest layer first.
    """
    keys: list[str] = []

    def visit(group: str, path: Path) -> None:
        text = path.read_text()
        is_global = any(line.startswith("# @package _global_") for line in text.splitlines())
        tree = yaml.load(text, yaml.CSafeLoader) or {}
        for entry in tree.pop("defaults", None) or []:
            if isinstance(entry, dict):
                for name, choice in entry.items():
                    named = str(name).split()[-1].lstrip("/")
                    if named in picks:  # typed, so it is visited by itself
                        continue
                    if choice in files.get(named, {}):
                        visit(named, files[named][choice])
                    else:
                        keys.append(named)
            elif entry in files[group]:
                visit(group, files[group][entry])
        keys.extend(p for p, _ in flatten(tree, "") if p) if is_global else keys.append(group)

    for group, choices in files.items():
        if picks.get(group) in choices:
            visit(group, choices[picks[group]])
    return keys


def keep_one_length(tree: dict[str, Any], chosen: Sequence[str]) -> None:
    """Unset the length of a lower file if a higher one sets another key of the run's length."""
    lengths = dict(flatten(tree, ""))
    if changed := [name for name in chosen if name in LENGTHS and lengths.get(name) is not None]:
        for other in {*LENGTHS} - {changed[-1]}:
            tree["train"][other.removeprefix("train.")] = None


def lay(cls: type | None, tree: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return `tree` with nested `values` laid over it; both are of the schema `cls`, and blocks
    that are a word alone become mappings with a kind. None: without blocks.

    If `values` choose another kind of a block than `tree` has, the keys of the block in `tree` fall
    away, but for those that both kinds have from a base class, such as a learning rate.
    """
    return _lay((cls,) if cls else (), tree, values)


def _lay(classes: Collection[type], tree: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Lay over a section; classes: those that it may have, of which the first with a key counts."""
    result = dict(tree) if isinstance(tree, Mapping) else {}
    known = {
        name_of(f): (f, hints(cls)[f.name]) for cls in reversed([*classes]) for f in fields(cls)
    }
    for name, value in values.items():
        f, type_ = known.get(name, (None, None))
        below = result.get(name)
        if f and is_block(f, type_) and isinstance(value, str | Mapping):
            result[name] = _lay_block(f, below, value)
        elif isinstance(value, Mapping):
            inner = section_class(type_) if f else None
            if not classes and isinstance(below, str):  # the word of a block
                below = {"kind": below}
            is_foreign = TargetConfig in options(type_) and "_target_" in {**value, **(below or {})}
            result[name] = _lay((inner,) if inner and not is_foreign else (), below, value)
        elif not classes and isinstance(value, str) and isinstance(below, Mapping):
            result[name] = {**below, "kind": value}
        else:
            result[name] = value
    return result


def _lay_block(f: Field[Any], tree: Any, value: str | Mapping[str, Any]) -> dict[str, Any]:
    below, part = (
        v if isinstance(v, Mapping) else {} if v is None else {"kind": v} for v in (tree, value)
    )
    kinds = kinds_of(f)
    old, new = (kinds.get(str(v.get("kind"))) for v in (below, {**below, **part}))
    if old and new and old is not new:
        bases = [cls for cls in new.__mro__ if cls in old.__mro__ and is_dataclass(cls)]
        shared = {name_of(f) for cls in bases for f in fields(cls)}
        below = {name: inner for name, inner in below.items() if name in shared}
    return _lay([new] if new else kinds.values(), below, part)


def over_frozen(
    schema: type, tree: Any, frozen: Mapping[str, Any], taken: Iterable[str]
) -> dict[str, Any]:
    """Return the frozen config with the values of `tree` at the paths `taken`, and with sections
    that only `tree` has. A path names a key, or a section with all its keys."""
    result = {**tree, **copy.deepcopy(dict(frozen))}
    paths = [*taken, *_OF_COMMAND]
    paths += LENGTHS if any(name in paths for name in LENGTHS) else ()
    values: dict[str, Any] = {}
    for path in paths:
        *sections, name = path.split(".")
        here, there, above = tree, result, values
        for section in sections:
            here, there = here.get(section) or {}, there.setdefault(section, {})
            above = above.setdefault(section, {})
        if name not in here or isinstance(here[name], Mapping):
            there.pop(name, None)  # a section is replaced as a whole
        if name in here:
            above[name] = copy.deepcopy(here[name])
    return lay(schema, result, values)


def over_origin(
    schema: type, tree: dict[str, Any], find: Find, taken: Iterable[str]
) -> dict[str, Any]:
    """Return `tree` with the model of the run that it branches from, and the keys `taken` of the
    model over it. `tree` keeps its own model if a file is chosen for it, or if the origin's model
    is a class of the user's own, which a command must name. Sizes that follow from the origin's
    sequence length follow from the branch's, if that is longer.

    find: returns the frozen config of the run in a directory, or None.
    """
    run: Any = tree.get("run")
    source = run.get("from") if isinstance(run, dict) else None  # else a value where keys belong
    origin = str(source.get("run") or "") if isinstance(source, dict) else ""
    typed = [path for path in taken if path.partition(".")[0] == "model"]
    if not origin or "model" in typed:
        return tree
    places = (Path(origin), Path(str(run.get("root"))).expanduser() / origin)
    frozen = next(filter(None, map(find, places)), None)
    if frozen is None or frozen["model"].get("_target_", ANY_CLASS) != ANY_CLASS:
        return tree
    model = copy.deepcopy(frozen["model"])
    if "_target_" in model:
        return {**tree, "model": over_frozen(schema, tree, {"model": model}, typed)["model"]}
    model["source_length"] = None  # it always follows
    length, longest = tree["train"]["sequence_length"], model["max_sequence_length"]
    position = model["position"]
    is_scaled = position.get("scaling", {"kind": "none"})["kind"] != "none"
    is_free = position["kind"] != "learned" and not is_scaled
    if is_free and longest and isinstance(length, int) and length > longest:
        model["max_sequence_length"] = None
    return {**tree, "model": over_frozen(schema, tree, {"model": model}, typed)["model"]}
