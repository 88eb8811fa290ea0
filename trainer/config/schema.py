"""Dataclasses as the schema of a config: read a tree, and return the object and all its problems.

The metadata of a field hold its help text, kind and bounds. A rule over several fields belongs into
the `problems()` method of their dataclass, which returns (field, what is wrong, what to do).

A block is a section whose keys follow from its kind: the metadata `kinds` of its field map each
word to the dataclass of that kind's keys. Its value is an instance of one of them. In a tree a
block is a mapping with the key `kind`, or the word alone. A list with `kinds` has blocks as items.

The kind of a key decides whether it may change when a run resumes: *identity* keys change the
trajectory, *numerics* keys only its last bits, *free* keys nothing.

Invariant: nothing here stops at the first problem, and nothing here knows a key by name.
"""

# ruff: noqa: RUF009 (key makes fields, as dataclasses.field does)

import math
import re
import types
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
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
    default: Any,
    help: str,
    *,
    kind: Kind | None = None,
    name: str = "",
    common: bool = False,
    **bounds: float,
) -> Any:
    """Return a dataclass field for a key.

    kind: None takes the kind of the section. name: the key's name where the field can't have it,
    such as `from`. common: it is on the short page of --help. bounds: ge, gt, le, lt (at least,
    more than, at most, less than); of a Duration: gt=0, and wall_time: whether it must be one.
    """
    metadata: dict[str, Any] = {"help": help, "kind": kind, "name": name, "bounds": bounds}
    metadata["common"] = common
    if isinstance(default, list | dict):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def section(cls: type, help: str, kind: Kind | None = None, name: str = "") -> Any:
    """Return a dataclass field for a section, which has keys of its own."""
    return field(default_factory=cls, metadata={"help": help, "kind": kind, "name": name})


def block(
    kinds: Mapping[str, type], default: type, help: str, kind: Kind | None = None, name: str = ""
) -> Any:
    """Return a dataclass field for a block, which has an instance of `default` if none is chosen.

    kinds: each kind's dataclass by its word, or a function that returns this mapping. models/ has
    no imports from here and writes the same metadata by hand: {"kinds": kinds}.
    """
    metadata = {"help": help, "kind": kind, "name": name, "kinds": kinds}
    return field(default_factory=default, metadata=metadata)


@dataclass
class TargetConfig:
    """The user's own class, named by the key `_target_`, and its keyword arguments."""

    target: str = key("", "your class, such as mypackage.Mine", name="_target_")
    arguments: dict[str, Any] = key({}, "keyword arguments of your class")

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
    found = [t for t in options(type_) if is_dataclass(t) and t not in (Duration, TargetConfig)]
    return typing.cast(type, found[0]) if found else None


def kinds_of(f: Field[Any]) -> Mapping[str, type]:
    """Return the kinds of a block, or of a list's items, by their words; else an empty mapping."""
    kinds = f.metadata.get("kinds") or {}
    return kinds() if callable(kinds) else kinds


def is_block(f: Field[Any], type_: Any) -> bool:
    """Return True if the field is a block, and not a list of blocks."""
    return "kinds" in f.metadata and not _is_list(type_)


def _is_list(type_: Any) -> bool:
    return any(list in (t, typing.get_origin(t)) for t in options(type_))


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
            result[path + ".kind"] = Leaf(path + ".kind", words, own_kind, text, {})
            for inner in [type(part)] if is_dataclass(part) else kinds_of(f).values():
                of_kind = leaves(inner, path + ".", own_kind, part)
                result |= {name: leaf for name, leaf in of_kind.items() if name not in result}
        elif (section := section_class(type_)) and "kinds" not in f.metadata:
            result |= leaves(section, path + ".", own_kind, part)
        else:
            bounds, common = f.metadata.get("bounds", {}), f.metadata.get("common", False)
            result[path] = Leaf(path, type_, own_kind, text, bounds, common)
    return result


def build(
    cls: type, tree: Mapping[str, Any], prefix: str = "", typed: Collection[str] | None = None
) -> tuple[Any, list[str], list[Problem]]:
    """Build `cls` from an untyped tree: return (object, paths of unknown keys, wrong values).

    In the object, a key that is missing or wrong has its default. typed: the keys that a command
    sets. A key of another kind of a block is wrong if it is one of them; else it falls away,
    because a file or a run below set it for the kind there. None: each of them is wrong.
    """
    builder = _Builder(typed)
    return builder.section(cls, tree, prefix), builder.unknown, builder.wrong


class _Builder:
    """Builds sections and blocks, and collects unknown keys and wrong values."""

    def __init__(self, typed: Collection[str] | None):
        self.typed = typed
        self.unknown: list[str] = []
        self.wrong: list[Problem] = []

    def section(self, cls: type, tree: Mapping[str, Any], prefix: str) -> Any:
        """Return an instance of `cls`."""
        values: dict[str, Any] = {}
        known = {name_of(f): f for f in fields(cls)}
        for name, value in tree.items():
            path = f"{prefix}{name}"
            if (f := known.get(name)) is None:
                self.unknown += [inner for inner, _ in flatten(value, path)]
            elif (result := self._value(f, hints(cls)[f.name], value, path)) is not MISSING:
                values[f.name] = result
        return cls(**values)

    def _is_typed(self, path: str) -> bool:
        return self.typed is None or any(f"{path}.".startswith(f"{key}.") for key in self.typed)

    def _value(self, f: Field[Any], type_: Any, value: Any, path: str) -> Any:
        """Return the value of a field; MISSING if it is wrong."""
        inner = section_class(type_)
        if is_block(f, type_) and not (value is None and type(None) in options(type_)):
            return self._block(f, value, path, word_of(f, f.default_factory()))  # type: ignore[operator]
        if "kinds" in f.metadata and value is not None:
            items = value if isinstance(value, list | tuple) else [value]
            parts = [self._block(f, item, f"{path}.{i}") for i, item in enumerate(items)]
            return MISSING if MISSING in parts else parts
        if inner and "kinds" not in f.metadata:
            if not isinstance(value, Mapping):
                first = next(iter(leaves(inner, path + ".")))
                problem = f"is a section and takes no value, got {shown(value)}"
                todo = f"set one of its keys, such as {first}=VALUE"
                self.wrong.append(Problem(path, problem, todo))
                return MISSING
            if "_target_" in value and TargetConfig in options(type_):
                rest = {k: v for k, v in value.items() if k != "_target_"}
                return TargetConfig(value["_target_"], rest)
            return self.section(inner, value, path + ".")
        try:
            return convert(type_, value, f.metadata.get("bounds", {}))
        except ValueError as e:
            todo = f"write, for example, {path}={example(type_, f)}"
            self.wrong.append(Problem(path, str(e), todo))
            return MISSING

    def _block(self, f: Field[Any], value: Any, path: str, default: str = "") -> Any:
        """Return the part that a word or a mapping describes; MISSING if it has no kind. default:
        the word of a mapping that names no kind; an item of a list has none."""
        kinds = kinds_of(f)
        tree = dict(value) if isinstance(value, Mapping) else {"kind": value}
        word = tree.pop("kind", default)
        is_kind = isinstance(word, str) and word in kinds
        for name in [name for name in tree if not is_kind or name not in _names(kinds[word])]:
            keys = [inner for inner, _ in flatten(tree.pop(name), f"{path}.{name}")]
            if not (owners := [w for w, cls in kinds.items() if name in _names(cls)]):
                self.unknown += keys
            elif is_kind and (not default or any(map(self._is_typed, keys))):
                where = path.rpartition(".")[2] if default else "kind"
                problem = f"is a key of {where}={' or '.join(owners)}, and this is {word}"
                todo = "choose it, or leave the key out"
                self.wrong.append(Problem(f"{path}.{name}", problem, todo))
        if is_kind:
            return self.section(kinds[word], tree, path + ".")
        nearest = nearest_first(str(word), kinds)
        problem, todo = f"{shown(word)} is not one of {', '.join(nearest)}", f"{path}={nearest[0]}"
        self.wrong.append(Problem(path, problem, f"write, for example, {todo}"))
        return MISSING


def _names(cls: type) -> set[str]:
    return {name_of(f) for f in fields(cls)}


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
        value, path = getattr(node, f.name), f"{prefix}{name_of(f)}."
        if isinstance(value, list) and "kinds" in f.metadata:
            for i, part in enumerate(value):
                found += _reported(part, method, faults, f"{path}{i}.")
        elif is_dataclass(value) and not isinstance(value, Duration):
            found += _reported(value, method, faults, path)
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
        return _duration(value, bounds)
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


def _duration(value: Any, bounds: Mapping[str, float]) -> Duration:
    length = Duration.parse(value)
    if bounds.get("wall_time") == 1 and length.unit != "seconds":
        raise ValueError(f"must be a wall time, got {shown(value)}")
    if bounds.get("wall_time") == 0 and length.unit == "seconds":
        raise ValueError("must not be a wall time, on which the trajectory would depend")
    if "gt" in bounds and not length.amount:
        raise ValueError("must be longer than zero")
    return length


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
    if type(node) is TargetConfig:
        return {"_target_": node.target, **node.arguments}
    if is_dataclass(node):
        return {name_of(f): _plain_field(f, getattr(node, f.name)) for f in fields(node)}
    if isinstance(node, list):
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
    todo = f"did you mean {near}?" if near else f"see forescale {verb} --help for all keys"
    return Problem(path, "no such key", todo)
