"""Dataclasses as the schema of a config: a tree goes in, an object and all problems come out.

A field says what it means in its metadata (help, kind, bounds); rules over several fields are the
`problems()` method of their dataclass, which returns (field, what is wrong, what to do). Invariant:
nothing here stops at the first fault, and nothing here knows a key by name.

Kinds of keys, which decide what may differ when a run goes on: *identity* changes the trajectory,
*numerics* only its last bits, *free* nothing of it.
"""

import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, Union

from forescale.config.duration import Duration
from forescale.config.suggest import meant, nearest_first
from forescale.errors import UserError

Kind = Literal["identity", "numerics", "free"]
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_BOUNDS = {
    "ge": ("at least", lambda value, bound: value >= bound),
    "gt": ("more than", lambda value, bound: value > bound),
    "le": ("at most", lambda value, bound: value <= bound),
    "lt": ("less than", lambda value, bound: value < bound),
}


class Problem(NamedTuple):
    """One fault of a config: the key, what is wrong, what to do."""

    key: str
    what: str
    todo: str

    def __str__(self) -> str:
        return f"{self.key}: {self.what}; {self.todo}."


class ConfigError(UserError):
    """Every problem of a config at once; `str()` has a line for each."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(dict.fromkeys(problems))
        super().__init__(*self.problems[0])

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


def key(default: Any, help: str, *, kind: Kind | None = None, name: str = "", **bounds: float):
    """A field of a section. `kind` None: the section's; `name`: where Python can't spell the key;
    bounds are ge, gt, le, lt (at least, more than, at most, less than)."""
    made: dict[str, Any] = {"help": help, "kind": kind, "name": name, "bounds": bounds}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=made)
    return field(default=default, metadata=made)


def section(cls: type, help: str, kind: Kind | None = None, name: str = ""):
    """A field that is a section of its own."""
    return field(default_factory=cls, metadata={"help": help, "kind": kind, "name": name})


@dataclass
class TargetConfig:
    """A class of the user's own, `_target_`, and the keyword arguments that it is made with."""

    target: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> list[tuple[str, str, str]]:
        if re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", str(self.target)):
            return []
        todo = "name a class that Python can import, such as mypackage.Model"
        return [("_target_", f"{self.target!r} is not a dotted name", todo)]


class Leaf(NamedTuple):
    """A key that a user may set: its path, type, kind, help, and the section's title line."""

    path: str
    type: Any
    kind: Kind
    help: str
    bounds: Mapping[str, float]


def name_of(f: Field) -> str:
    return f.metadata.get("name") or f.name


@cache
def hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def options(type_: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type alone."""
    is_union = typing.get_origin(type_) in (Union, types.UnionType)
    return typing.get_args(type_) if is_union else (type_,)


def section_class(type_: Any) -> type | None:
    """The dataclass that a field of this type holds, if it is a section."""
    found = [t for t in options(type_) if is_dataclass(t) and t not in (Duration, TargetConfig)]
    return typing.cast(type, found[0]) if found else None


def leaves(cls: type, prefix: str = "", kind: Kind = "free") -> dict[str, Leaf]:
    """Every key of a schema by its full path, in the order of the fields."""
    return _leaves(cls, prefix, kind)


@cache
def _leaves(cls: type, prefix: str, kind: Kind) -> dict[str, Leaf]:
    found: dict[str, Leaf] = {}
    for f in fields(cls):
        path, type_ = prefix + name_of(f), hints(cls)[f.name]
        own: Kind = f.metadata.get("kind") or kind
        if inner := section_class(type_):
            found |= leaves(inner, path + ".", own)
        else:
            bounds = f.metadata.get("bounds", {})
            found[path] = Leaf(path, type_, own, f.metadata.get("help", ""), bounds)
    return found


def build(cls: type, tree: Mapping, prefix: str = "") -> tuple[Any, list[str], list[Problem]]:
    """Make `cls` of an untyped tree: (object, paths of unknown keys, wrong values).

    A key that is missing or wrong has its default in the object.
    """
    unknown: list[str] = []
    wrong: list[Problem] = []
    values: dict[str, Any] = {}
    known = {name_of(f): f for f in fields(cls)}
    for name, value in tree.items():
        path = f"{prefix}{name}"
        if (f := known.get(name)) is None:
            unknown += [inner for inner, _ in flatten(value, path)]
            continue
        type_ = hints(cls)[f.name]
        inner = section_class(type_)
        if inner and not isinstance(value, Mapping):
            first = next(iter(leaves(inner, path + ".")))
            what = f"is a section, which has keys, and not {shown(value)}"
            wrong.append(Problem(path, what, f"set its keys, such as {first}"))
        elif inner and "_target_" in value and TargetConfig in options(type_):
            rest = {k: v for k, v in value.items() if k != "_target_"}
            values[f.name] = TargetConfig(value["_target_"], rest)
        elif inner:
            values[f.name], more, faults = build(inner, value, path + ".")
            unknown, wrong = unknown + more, wrong + faults
        else:
            try:
                values[f.name] = convert(type_, value, f.metadata.get("bounds", {}))
            except ValueError as e:
                wrong.append(Problem(path, str(e), f"write it like {path}={example(type_, f)}"))
    return cls(**values), unknown, wrong


def check(job: Any, faults: Iterable[Problem] = ()) -> list[Problem]:
    """The broken rules of a job, section by section; those over several sections only where no
    value is wrong in itself (`faults`: what `build` found), since they would only echo it."""
    faults = list(faults)
    found: list[Problem] = []

    def visit(node: Any, prefix: str) -> None:
        for f in fields(node):
            value = getattr(node, f.name)
            if is_dataclass(value) and not isinstance(value, Duration):
                visit(value, f"{prefix}{name_of(f)}.")
        ill = any(p.key.startswith(prefix) or prefix.startswith(p.key + ".") for p in faults)
        if not ill and hasattr(node, "problems"):
            found.extend(Problem(prefix + k, what, todo) for k, what, todo in node.problems())

    visit(job, "")
    return list(dict.fromkeys(found))


def convert(type_: Any, value: Any, bounds: Mapping[str, float] = types.MappingProxyType({})):
    """`value` as `type_`. Raises ValueError with what is wrong. Numbers may come as text, and whole
    ones as 1e9, where nothing is lost."""
    alternatives = options(type_)
    if value is None and type(None) in alternatives:
        return None
    kind = next(t for t in alternatives if t is not type(None))
    if typing.get_origin(kind) is Literal:
        return _choice(typing.get_args(kind), value)
    if kind is Duration:
        return Duration.parse(value)
    if typing.get_origin(kind) is list:
        items = value if isinstance(value, list | tuple) else [value]
        return [convert(typing.get_args(kind)[0], item) for item in items]
    if kind is list:
        if isinstance(value, list | tuple):
            return list(value)
        raise ValueError(f"expects a list, not {shown(value)}")
    if typing.get_origin(kind) is dict or kind is dict:
        if isinstance(value, Mapping):
            return dict(value)
        raise ValueError(f"expects keys and values, not {shown(value)}")
    made = _plain(kind, value)
    for name, bound in bounds.items():
        words, holds = _BOUNDS[name]
        if not holds(made, bound):
            raise ValueError(f"must be {words} {bound:g}, not {shown(value)}")
    return made


def _plain(kind: Any, value: Any) -> Any:
    if kind in (int, float) and isinstance(value, int | float | str) and type(value) is not bool:
        try:
            number = float(value) if not isinstance(value, int) else value
        except ValueError:
            number = math.nan
        if kind is int and math.isfinite(number) and number == int(number):
            return int(value) if isinstance(value, str) and _digits(value) else int(number)
        if kind is float and math.isfinite(number):
            return float(number)
    elif kind is Any or (kind in (bool, str) and type(value) is kind):
        return value
    raise ValueError(f"expects {_WORDS.get(kind, kind)}, not {shown(value)}")


def _digits(text: str) -> bool:
    return bool(re.fullmatch(r"\s*[+-]?[0-9_]+\s*", text))


def _choice(choices: tuple, value: Any) -> Any:
    if type(value) is bool and "on" in choices:  # YAML reads a bare on or off as a boolean
        return "on" if value else "off"
    for choice in choices:
        if str(value) == str(choice) and type(value) is not bool:
            return choice
    nearest = nearest_first(str(value), map(str, choices))
    raise ValueError(f"{shown(value)} is not one of {', '.join(nearest)}")


def example(type_: Any, f: Field) -> str:
    """A value that a user could write for this field."""
    kind = next(t for t in options(type_) if t is not type(None))
    if f.default not in (None, MISSING, "") and not isinstance(f.default, bool):
        text = str(f.default)
    elif typing.get_origin(kind) is Literal:
        text = str(typing.get_args(kind)[0])
    else:
        made = {int: "8", float: "0.1", bool: "true", str: "TEXT", Duration: "500 steps"}
        text = made.get(kind, "[...]" if "list" in str(kind) else "{name: value}")
    return f"'{text}'" if " " in text else text


def shown(value: Any) -> str:
    """A value as a message shows it."""
    if value is None or value == "":
        return "nothing" if value == "" else "null"
    if isinstance(value, Mapping):
        return "a section with keys (" + ", ".join(map(str, value)) + ")"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def flatten(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """(full path, value) of every leaf of a tree of mappings; an empty mapping is a leaf."""
    if not isinstance(value, Mapping) or not value:
        yield path, value
        return
    for name, inner in value.items():
        yield from flatten(inner, f"{path}.{name}" if path else str(name))


def plain(node: Any) -> Any:
    """A job as mappings, lists and scalars, as YAML holds it."""
    if isinstance(node, Duration):
        return str(node)
    if isinstance(node, TargetConfig):
        return {"_target_": node.target, **node.arguments}
    if is_dataclass(node):
        return {name_of(f): plain(getattr(node, f.name)) for f in fields(node)}
    return node


def unknown_key(path: str, paths: Iterable[str], verb: str) -> Problem:
    """The problem of a key that isn't among `paths`."""
    near = meant(path, paths)
    todo = f"did you mean {near}" if near else f"forescale {verb} --help lists all keys"
    return Problem(path, "no such key", todo)
