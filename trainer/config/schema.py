"""Dataclasses as the schema of a config: read a tree, and return the object and all its problems.

The metadata of a field hold its help text, kind and bounds. A rule over several fields belongs into
the `problems()` method of their dataclass, which returns (field, what is wrong, what to do).

The kind of a key decides whether it may change when a run resumes: *identity* keys change the
trajectory, *numerics* keys only its last bits, *free* keys nothing.

Invariant: nothing here stops at the first problem, and nothing here knows a key by name.
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
from forescale.errors import UserError, shortened

Kind = Literal["identity", "numerics", "free"]
_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
# Of any number, so that no product of some of them is infinite or 0, and each whole number fits 64
# bits.
LARGEST, SMALLEST = 1e40, 1e-40
_WHOLE = 2**63 - 1
_LONGEST = 200  # characters of a value in a message
_BOUNDS = {
    "ge": ("at least", lambda value, bound: value >= bound),
    "gt": ("more than", lambda value, bound: value > bound),
    "le": ("at most", lambda value, bound: value <= bound),
    "lt": ("less than", lambda value, bound: value < bound),
}


class Problem(NamedTuple):
    """One problem of a config: the key, what is wrong, what to do."""

    key: str
    problem: str
    todo: str

    def __str__(self) -> str:
        return str(UserError(*self))


class ConfigError(UserError):
    """All problems of a config; `str()` has one line for each."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(dict.fromkeys(problems))
        super().__init__(*self.problems[0])

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by the problems: rank 0 sends its errors to the other ranks."""
        return type(self), (self.problems,)

    def __str__(self) -> str:
        return "\n".join(map(str, self.problems))


def key(
    default: Any, help: str, *, kind: Kind | None = None, name: str = "", **bounds: float
) -> Any:
    """Return a dataclass field for a key.

    kind: None takes the kind of the section. name: the key's name where the field can't have it,
    such as `from`. bounds: ge, gt, le, lt (at least, more than, at most, less than).
    """
    made: dict[str, Any] = {"help": help, "kind": kind, "name": name, "bounds": bounds}
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=made)
    return field(default=default, metadata=made)


def section(cls: type, help: str, kind: Kind | None = None, name: str = "") -> Any:
    """Return a dataclass field for a section, which has keys of its own."""
    return field(default_factory=cls, metadata={"help": help, "kind": kind, "name": name})


@dataclass
class TargetConfig:
    """The user's own class, named by the key `_target_`, and its keyword arguments."""

    target: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)

    def problems(self) -> list[tuple[str, str, str]]:
        """Return a problem if `target` can't name a class."""
        if re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", str(self.target)):
            return []
        todo = "name a class that Python can import, such as mypackage.Model"
        return [("_target_", f"{shown(self.target)} is not a dotted name", todo)]


class Leaf(NamedTuple):
    """A key that a user may set, with its full path."""

    path: str
    type: Any
    kind: Kind
    help: str
    bounds: Mapping[str, float]


def name_of(f: Field[Any]) -> str:
    """Return the key's name, which Python may not allow as the field's name."""
    return f.metadata.get("name") or f.name


@cache
def hints(cls: type) -> dict[str, Any]:
    """Return the resolved type of each field."""
    return typing.get_type_hints(cls)


def options(type_: Any) -> tuple[Any, ...]:
    """Return the members of a union, or the type alone."""
    is_union = typing.get_origin(type_) in (Union, types.UnionType)
    return typing.get_args(type_) if is_union else (type_,)


def section_class(type_: Any) -> type | None:
    """Return the dataclass of a section, or None if a field of this type is a key."""
    found = [t for t in options(type_) if is_dataclass(t) and t not in (Duration, TargetConfig)]
    return typing.cast(type, found[0]) if found else None


def leaves(cls: type, prefix: str = "", kind: Kind = "free") -> dict[str, Leaf]:
    """Return every key of a schema by its full path, in the order of the fields."""
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


def build(
    cls: type, tree: Mapping[str, Any], prefix: str = ""
) -> tuple[Any, list[str], list[Problem]]:
    """Build `cls` from an untyped tree: return (object, paths of unknown keys, wrong values).

    In the object, a key that is missing or wrong has its default.
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
            problem = f"is a section and takes no value, got {shown(value)}"
            wrong.append(Problem(path, problem, f"set one of its keys, such as {first}=VALUE"))
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
                wrong.append(
                    Problem(path, str(e), f"write, for example, {path}={example(type_, f)}")
                )
    return cls(**values), unknown, wrong


def check(job: Any, faults: Iterable[Problem] = ()) -> list[Problem]:
    """Return the problems that the `problems()` methods of a job and its sections report.

    A section with a wrong value (`faults`, from `build`) isn't asked: its rules would only repeat
    that value's problem.
    """
    return _reported(job, "problems", list(faults))


def unread(job: Any, typed: Iterable[str], faults: Iterable[Problem] = ()) -> list[Problem]:
    """Return the problems of the keys in `typed` that have no effect, as the `unread()` methods of
    a job and its sections report them. Of a section with `faults`, as check has them, none."""
    typed = list(typed)

    def is_typed(key: str) -> bool:
        return any(path == key or path.startswith(key + ".") for path in typed)

    return [p for p in _reported(job, "unread", list(faults)) if is_typed(p.key)]


def _reported(node: Any, method: str, faults: list[Problem], prefix: str = "") -> list[Problem]:
    """Return what the methods of this name report, in a job and its sections, each problem once."""
    found: list[Problem] = []
    for f in fields(node):
        value = getattr(node, f.name)
        if is_dataclass(value) and not isinstance(value, Duration):
            found += _reported(value, method, faults, f"{prefix}{name_of(f)}.")
    wrong = any(p.key.startswith(prefix) or prefix.startswith(p.key + ".") for p in faults)
    if not wrong and hasattr(node, method):
        found += [
            Problem(prefix + k, problem, todo) for k, problem, todo in getattr(node, method)()
        ]
    return list(dict.fromkeys(found))


def convert(
    type_: Any, value: Any, bounds: Mapping[str, float] = types.MappingProxyType({})
) -> Any:
    """Return `value` as `type_`. Raises ValueError with what is wrong.

    Numbers may be given as text, and whole numbers as 1e9 if that is exact.
    """
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
        (inner,) = typing.get_args(kind)
        return [_text(item) if inner is str else convert(inner, item) for item in items]
    if kind is TargetConfig:
        return _target(value)
    if kind is list:
        if isinstance(value, list | tuple):
            return list(value)
        raise ValueError(f"expects a list, got {shown(value)}")
    if typing.get_origin(kind) is dict or kind is dict:
        if isinstance(value, Mapping):
            inner = typing.get_args(kind)
            return {k: _text(v) for k, v in value.items()} if inner == (str, str) else dict(value)
        raise ValueError(f"expects a mapping, got {shown(value)}")
    made = _plain(kind, value)
    for name, bound in bounds.items():
        words, holds = _BOUNDS[name]
        if not holds(made, bound):
            raise ValueError(f"must be {words} {bound:g}, got {shown(value)}")
    return made


def _text(value: Any) -> str:
    """Return a value of a list or mapping of texts as it was typed: 3 is a text there too."""
    if isinstance(value, str | int | float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    raise ValueError(f"expects texts, got {shown(value)}")


def _target(value: Any) -> TargetConfig:
    if not isinstance(value, Mapping) or "_target_" not in value:
        raise ValueError(f"expects a mapping with _target_, got {shown(value)}")
    made = TargetConfig(value["_target_"], {k: v for k, v in value.items() if k != "_target_"})
    for _, problem, _ in made.problems():
        raise ValueError(problem)
    return made


def _plain(kind: Any, value: Any) -> Any:
    if kind in (int, float) and isinstance(value, int | float | str) and type(value) is not bool:
        number = _number(value)
        if math.isfinite(number) and number and not SMALLEST <= abs(number) <= LARGEST:
            problem = "large" if abs(number) > 1 else "close to 0"
            raise ValueError(f"{shown(value)} is too {problem}")
        if kind is int and math.isfinite(number) and number == int(number):
            is_exact = isinstance(value, int) or (isinstance(value, str) and _digits(value))
            whole = int(value) if is_exact else int(number)
            if abs(whole) > _WHOLE:
                raise ValueError(f"{shown(value)} is too large")
            return whole
        if kind is float and math.isfinite(number):
            return number
    elif kind is Any or (kind in (bool, str) and type(value) is kind):
        return value
    raise ValueError(f"expects {_TYPES.get(kind, kind)}, got {shown(value)}")


def _number(value: int | float | str) -> float:
    """Return a number, or the number that a text means; NaN if it means none."""
    try:
        return float(value)
    except ValueError:
        return math.nan
    except OverflowError:  # a whole number that no float can be
        return 2 * LARGEST


def _digits(text: str) -> bool:
    return bool(re.fullmatch(r"\s*[+-]?[0-9_]+\s*", text))


def _choice(choices: tuple[Any, ...], value: Any) -> Any:
    if type(value) is bool and "on" in choices:  # YAML reads a bare on or off as a boolean
        return "on" if value else "off"
    for choice in choices:
        if str(value) == str(choice) and type(value) is not bool:
            return choice
    nearest = nearest_first(str(value), map(str, choices))
    raise ValueError(f"{shown(value)} is not one of {', '.join(nearest)}")


def example(type_: Any, f: Field[Any]) -> str:
    """Return a value that a user could write for this field."""
    kind = next(t for t in options(type_) if t is not type(None))
    if f.default not in (None, MISSING, "") and not isinstance(f.default, bool):
        text = str(f.default)
    elif typing.get_origin(kind) is Literal:
        text = str(typing.get_args(kind)[0])
    else:
        made = {int: "8", float: "0.1", bool: "true", str: "TEXT", Duration: "500 steps"}
        made[list[TargetConfig]] = "[{_target_: mypackage.Mine}]"
        text = made.get(kind, "[...]" if "list" in str(kind) else "{name: value}")
    return f"'{text}'" if " " in text else text


def shown(value: Any) -> str:
    """Return a value as messages show it, shortened if it is long."""
    if value is None or value == "":
        return "an empty text" if value == "" else "null"
    if isinstance(value, Mapping):
        return shortened("a section with keys (" + ", ".join(map(str, value)) + ")", _LONGEST)
    try:
        return str(value).lower() if isinstance(value, bool) else shortened(repr(value), _LONGEST)
    except (ValueError, RecursionError):  # Python prints no number of 5,000 digits
        return f"a {type(value).__name__} that is too long to print"


def flatten(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Yield (full path, value) of every leaf of a tree of mappings; an empty mapping is a leaf."""
    if not isinstance(value, Mapping) or not value:
        yield path, value
        return
    for name, inner in value.items():
        yield from flatten(inner, f"{path}.{name}" if path else str(name))


def plain(node: Any) -> Any:
    """Return a job as dicts, lists and scalars, for YAML."""
    if isinstance(node, Duration):
        return str(node)
    if isinstance(node, TargetConfig):
        return {"_target_": node.target, **node.arguments}
    if is_dataclass(node):
        return {name_of(f): plain(getattr(node, f.name)) for f in fields(node)}
    if isinstance(node, list):
        return [plain(item) for item in node]
    return node


def unknown_key(path: str, paths: Iterable[str], verb: str) -> Problem:
    """Return the problem of a key that isn't one of `paths`, with the most similar key."""
    near = meant(path, paths)
    todo = f"did you mean {near}?" if near else f"see forescale {verb} --help for all keys"
    return Problem(path, "no such key", todo)
