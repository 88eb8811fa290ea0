"""Dataclasses as the schema of a config: read a tree, and return the object and all its problems.

The comment beside or above a field is its help text; its metadata hold its kind and bounds. A rule
over several fields belongs into the `problems()` method of their dataclass, which returns (field,
what is wrong, what to do).

A block is a section whose keys follow from its kind: the metadata `kinds` of its field map each
word to the dataclass of that kind's keys. Its value is an instance of one of them. In a tree a
block is a mapping with the key `kind`, or the word alone. A list with `kinds` has blocks as items.

The kind of a key decides whether it may change when a run resumes: *identity* keys change the
trajectory, *numerics* keys only its last bits, *free* keys nothing.

Invariant: nothing here stops at the first problem, and nothing here knows a key by name.
"""

import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, Literal, NamedTuple, Union

from forescale.config.duration import Duration
from forescale.config.sizes import Sizes
from forescale.config.suggest import meant
from forescale.ground.errors import UserError, shortened

Kind = Literal["identity", "numerics", "free"]
_LONGEST = 200  # characters of a value in a message


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

    def facts(self) -> dict[str, Any]:
        """Return the parts of the first problem, and those of all."""
        return super().facts() | {"problems": [UserError(*p).facts() for p in self.problems]}


def key(
    default: Any,
    help: str = "",
    *,
    kind: Kind | None = None,
    name: str = "",
    common: bool = False,
    **bounds: float,
) -> Any:
    """Return a dataclass field for a key.

    help: a text that no comment can be, because it is computed. kind: None takes the kind of the
    section. name: the key's name where the field can't have it, such as `from`. common: it is on
    the short page of --help. bounds: ge, gt, le, lt (at least, more than, at most, less than); of a
    Duration: gt=0, and wall_time: whether it must be one.
    """
    metadata: dict[str, Any] = {"help": help, "kind": kind, "name": name, "bounds": bounds}
    metadata["common"] = common
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type, kind: Kind | None = None, name: str = "") -> Any:
    """Return a dataclass field for a section, which has keys of its own."""
    return field(default_factory=cls, metadata={"kind": kind, "name": name})


def block(kinds: Mapping[str, type], default: type, kind: Kind | None = None) -> Any:
    """Return a dataclass field for a block, which has an instance of `default` if none is chosen.

    kinds: each kind's dataclass by its word, or a function that returns this mapping. models/ has
    no imports from here and writes the same metadata by hand: {"kinds": kinds}.
    """
    return field(default_factory=default, metadata={"kind": kind, "kinds": kinds})


@dataclass
class TargetConfig:
    """The user's own class, named by the key `_target_`, and its keyword arguments."""

    target: str = key("", name="_target_")  # your class, such as mypackage.Mine
    arguments: dict[str, Any] = field(default_factory=dict)  # keyword arguments of your class

    def problems(self) -> list[tuple[str, str, str]]:
        """Return a problem if `target` can't name a class."""
        if re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)+", str(self.target)):
            return []
        todo = "name a class that Python can import, such as mypackage.Model"
        return [("_target_", f"{display(self.target)} is not a dotted name", todo)]


class Leaf(NamedTuple):
    """A key that a user may set, with its full path. source: its class, and the field's name."""

    path: str
    type: Any
    kind: Kind
    help: str
    bounds: Mapping[str, float]
    source: tuple[type, str]
    common: bool = False


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
    values = (Duration, Sizes, TargetConfig)
    sections = [t for t in options(type_) if is_dataclass(t) and t not in values]
    return typing.cast(type, sections[0]) if sections else None


def kinds_of(f: Field[Any]) -> Mapping[str, type]:
    """Return the kinds of a block, or of a list's items, by their words; else an empty mapping."""
    kinds = f.metadata.get("kinds") or {}
    return kinds() if callable(kinds) else kinds


def is_block(f: Field[Any], type_: Any) -> bool:
    """Return True if the field is a block, and not a list of blocks."""
    is_list = any(list in (t, typing.get_origin(t)) for t in options(type_))
    return "kinds" in f.metadata and not is_list


def word_of(f: Field[Any], part: Any) -> str:
    """Return the word of a block's kind. part: the block's value, or the class of one."""
    cls = part if isinstance(part, type) else type(part)
    return next(word for word, inner in kinds_of(f).items() if inner is cls)


def leaves(cls: type, prefix: str = "", kind: Kind = "free", job: Any = None) -> dict[str, Leaf]:
    """Return every key of a schema by its full path, in the order of the fields.

    job: an instance of `cls`; with it, only the keys of its blocks' kinds. Without it, those of all
    kinds; a key that several kinds have is that of the first.
    """
    result: dict[str, Leaf] = {}
    for f in fields(cls):
        path, type_, text = prefix + name_of(f), hints(cls)[f.name], f.metadata.get("help", "")
        own_kind: Kind = f.metadata.get("kind") or kind
        part = getattr(job, f.name, None)
        if is_block(f, type_):
            words = Literal[tuple(kinds_of(f))]  # type: ignore[valid-type]
            result[path + ".kind"] = Leaf(path + ".kind", words, own_kind, text, {}, (cls, f.name))
            for inner in [type(part)] if is_dataclass(part) else kinds_of(f).values():
                of_kind = leaves(inner, path + ".", own_kind, part)
                result |= {name: leaf for name, leaf in of_kind.items() if name not in result}
        elif (section := section_class(type_)) and "kinds" not in f.metadata:
            result |= leaves(section, path + ".", own_kind, part)
        else:
            bounds, common = f.metadata.get("bounds", {}), f.metadata.get("common", False)
            result[path] = Leaf(path, type_, own_kind, text, bounds, (cls, f.name), common)
    return result


def check(job: Any, faults: Iterable[Problem] = ()) -> list[Problem]:
    """Return the problems that the `problems()` methods of a job and its sections report.

    A section with a wrong value (`faults`, from `build`) isn't asked: its rules would only repeat
    that value's problem. Values that no rule reads are the keys in ALONE of a section's class.
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
    """Return the problems that the methods of this name return, in a job and its sections, each
    once."""
    result: list[Problem] = []
    for f in fields(node):
        value, path = getattr(node, f.name), f"{prefix}{name_of(f)}."
        if isinstance(value, list) and "kinds" in f.metadata:
            for i, part in enumerate(value):
                result += _reported(part, method, faults, f"{path}{i}.")
        elif is_dataclass(value) and not isinstance(value, Duration | Sizes):
            result += _reported(value, method, faults, path)
    alone = {prefix + name for name in getattr(node, "ALONE", ())}
    faults = [p for p in faults if p.key not in alone]
    wrong = any(p.key.startswith(prefix) or prefix.startswith(p.key + ".") for p in faults)
    if not wrong and hasattr(node, method):
        result += [
            Problem(prefix + k, problem, todo) for k, problem, todo in getattr(node, method)()
        ]
    return list(dict.fromkeys(result))


def display(value: Any) -> str:
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
    if isinstance(node, Sizes):
        return node.plain
    if type(node) is TargetConfig:
        return {"_target_": node.target, **node.arguments}
    if is_dataclass(node):
        return {name_of(f): _plain_field(f, getattr(node, f.name)) for f in fields(node)}
    if isinstance(node, list | tuple):
        return [plain(item) for item in node]
    return node


def _plain_field(f: Field[Any], value: Any) -> Any:
    """Return the value of a field, as plain has it; a block with its kind in front."""
    if "kinds" not in f.metadata or value is None:
        return plain(value)
    if isinstance(value, list):
        return [_plain_field(f, part) for part in value]
    return {"kind": word_of(f, value), **plain(value)}


def unknown_key(path: str, paths: Iterable[str], verb: str) -> Problem:
    """Return the problem of a key that isn't one of `paths`, with the most similar key."""
    near = meant(path, paths)
    todo = f"did you mean {near}?" if near else f"see forescale {verb} --help all for the keys"
    return Problem(path, "no such key", todo)
