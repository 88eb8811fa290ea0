"""From an untyped tree, such as YAML or a command line, to the dataclasses of a schema.

Invariant: nothing here stops at the first problem. Numbers may be given as text, and whole numbers
as 1e9 if that is exact.
"""

import math
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, Literal

from forescale.config.duration import Duration
from forescale.config.schema import (
    Problem,
    TargetConfig,
    display,
    flatten,
    hints,
    is_block,
    kinds_of,
    leaves,
    name_of,
    options,
    section_class,
    word_of,
)
from forescale.config.sizes import Sizes
from forescale.config.suggest import nearest_first

_TYPES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
# Of any number, so that no product of some of them is infinite or 0, and each whole number fits 64
# bits.
LARGEST, SMALLEST = 1e40, 1e-40
_WHOLE = 2**63 - 1
_BOUNDS = {
    "ge": ("at least", lambda value, bound: value >= bound),
    "gt": ("more than", lambda value, bound: value > bound),
    "le": ("at most", lambda value, bound: value <= bound),
    "lt": ("less than", lambda value, bound: value < bound),
}


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
        if "kinds" in f.metadata:
            if value is None:
                problem, todo = "expects a list of words or blocks, got null", f"write {path}=[]"
                self.wrong.append(Problem(path, problem, todo))
                return MISSING
            items = value if isinstance(value, list | tuple) else [value]
            parts = [self._block(f, item, f"{path}.{i}") for i, item in enumerate(items)]
            return MISSING if MISSING in parts else parts
        if inner and "kinds" not in f.metadata:
            if not isinstance(value, Mapping):
                first = next(iter(leaves(inner, path + ".")))
                problem = f"is a section and takes no value, got {display(value)}"
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
            todo = f"write, for example, {_typed(path, example(type_, f))}"
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
            owners = [w for w, cls in kinds.items() if name in _names(cls)]
            if not owners and is_kind and not default:
                near = nearest_first(name, _names(kinds[word]))
                todo = f"did you mean {near[0]}?" if near else "leave it out"
                self.wrong.append(Problem(f"{path}.{name}", "no such key", todo))
            elif not owners:
                self.unknown += keys
            elif is_kind and (not default or any(map(self._is_typed, keys))):
                where = path.rpartition(".")[2] if default else "kind"
                problem = f"is a key of {where}={' or '.join(owners)}, and this is {word}"
                key = path if default else f"{path}.kind"
                todo = f"write {_typed(key, owners[0])}, or leave the key out"
                self.wrong.append(Problem(f"{path}.{name}", problem, todo))
        if is_kind:
            return self.section(kinds[word], tree, path + ".")
        nearest = nearest_first(str(word), kinds)
        problem = f"{display(word)} is not one of {', '.join(nearest)}"
        self.wrong.append(Problem(path, problem, f"write, for example, {_typed(path, nearest[0])}"))
        return MISSING


def _typed(path: str, value: str) -> str:
    """Return how a value is typed at a path. An item of a list has no key of its own: its keys
    stand inside of its block."""
    if re.search(r"\.\d+$", path):
        return value
    inside = re.search(r"\.\d+\.(.+)$", path)
    return f"{inside[1]}: {value}" if inside else f"{path}={value}"


def _names(cls: type) -> list[str]:
    return [name_of(f) for f in fields(cls)]


def convert(
    type_: Any, value: Any, bounds: Mapping[str, float] = types.MappingProxyType({})
) -> Any:
    """Return `value` as `type_`. Raises ValueError with what is wrong."""
    alternatives = options(type_)
    if value is None and type(None) in alternatives:
        return None
    kind = next(t for t in alternatives if t is not type(None))
    if typing.get_origin(kind) is Literal:
        return _choice(typing.get_args(kind), value)
    if kind is Duration:
        length = Duration.parse(value, wall_time=bounds.get("wall_time") == 1)
        if bounds.get("wall_time") == 0 and length.unit == "seconds":
            raise ValueError("must not be a wall time, on which the trajectory would depend")
        if "gt" in bounds and not length.amount:
            raise ValueError("must be longer than zero")
        return length
    if kind is Sizes:
        return Sizes.parse(value)
    if (origin := typing.get_origin(kind)) in (list, tuple):  # a tuple is tuple[T, ...]
        items = value if isinstance(value, list | tuple) else [value]
        inner = typing.get_args(kind)[0]
        return origin(_text(item) if inner is str else convert(inner, item) for item in items)
    if kind is TargetConfig:
        if not isinstance(value, Mapping) or "_target_" not in value:
            raise ValueError(f"expects a mapping with _target_, got {display(value)}")
        rest = {k: v for k, v in value.items() if k != "_target_"}
        target = TargetConfig(value["_target_"], rest)
        for _, problem, _ in target.problems():
            raise ValueError(problem)
        return target
    if kind is list:
        if isinstance(value, list | tuple):
            return list(value)
        raise ValueError(f"expects a list, got {display(value)}")
    if typing.get_origin(kind) is dict or kind is dict:
        if isinstance(value, Mapping):
            inner = typing.get_args(kind)
            return {k: _text(v) for k, v in value.items()} if inner == (str, str) else dict(value)
        raise ValueError(f"expects a mapping, got {display(value)}")
    result = _plain(kind, value)
    for name, bound in bounds.items():
        words, holds = _BOUNDS[name]
        if not holds(result, bound):
            raise ValueError(f"must be {words} {bound:g}, got {display(value)}")
    return result


def _text(value: Any) -> str:
    """Return a value of a list or mapping of texts as it was typed: 3 is a text there too."""
    if isinstance(value, str | int | float):
        return str(value).lower() if isinstance(value, bool) else str(value)
    raise ValueError(f"expects texts, got {display(value)}")


def _plain(kind: Any, value: Any) -> Any:
    if kind in (int, float) and isinstance(value, int | float | str) and type(value) is not bool:
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        except OverflowError:  # a whole number that no float can be
            number = 2 * LARGEST
        if math.isfinite(number) and number and not SMALLEST <= abs(number) <= LARGEST:
            problem = "large" if abs(number) > 1 else "close to 0"
            raise ValueError(f"{display(value)} is too {problem}")
        if kind is int and math.isfinite(number) and number == int(number):
            is_exact = isinstance(value, int) or re.fullmatch(r"\s*[+-]?[0-9_]+\s*", str(value))
            whole = int(value) if is_exact else int(number)
            if abs(whole) > _WHOLE:
                raise ValueError(f"{display(value)} is too large")
            return whole
        if kind is float and math.isfinite(number):
            return number
    elif kind is Any or (kind in (bool, str) and type(value) is kind):
        return value
    raise ValueError(f"expects {_TYPES.get(kind, kind)}, got {display(value)}")


def _choice(choices: tuple[Any, ...], value: Any) -> Any:
    if type(value) is bool and "on" in choices:  # YAML reads a bare on or off as a boolean
        return "on" if value else "off"
    for choice in choices:
        if str(value) == str(choice) and type(value) is not bool:
            return choice
    nearest = nearest_first(str(value), map(str, choices))
    raise ValueError(f"{display(value)} is not one of {', '.join(nearest)}")


def example(type_: Any, f: Field[Any]) -> str:
    """Return a value that a user could type for this field, and that is accepted."""
    if f.default not in (None, MISSING, "") and not isinstance(f.default, bool):
        text = str(f.default)
    else:
        text = _example(type_, f.metadata.get("bounds", {}), kinds_of(f))
    return f"'{text}'" if " " in text else text


def _example(type_: Any, bounds: Mapping[str, float], kinds: Iterable[str]) -> str:
    kind = next(t for t in options(type_) if t is not type(None))
    if typing.get_origin(kind) is Literal:
        return str(typing.get_args(kind)[0])
    if list in (kind, typing.get_origin(kind)):
        items = next(iter(kinds), None) or "".join(
            _example(t, {}, ()) for t in typing.get_args(kind)
        )
        return f"[{items}]"
    length = "24 h" if bounds.get("wall_time") else "500 steps"
    texts = {
        int: f"{min(8, bounds.get('le', 8)):g}",
        bool: "true",
        str: "TEXT",
        Duration: length,
        Sizes: "2-8",
    }
    texts |= {float: f"{bounds.get('ge') or 0.1:g}", TargetConfig: "{_target_: mypackage.Mine}"}
    return texts.get(kind, "{name: value}")
