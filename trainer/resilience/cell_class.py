"""Classes of the user's own as values: forescale.train(model=Model), also of a notebook's cell.

A class of a cell exists in one process alone, and ranks are processes of their own. So its source,
and that of the cells' functions and classes, imports and constants that it names, becomes a module
in the working directory, notebook_classes/NAME_DIGEST.py, and is from then on a class like others.

Invariant: the same source gives the same name, also in another kernel, so that the same call goes
on; a changed class has another name, so that a run never goes on with it. What the source doesn't
tell is refused.
"""

import ast
import dis
import hashlib
import importlib
import inspect
import linecache
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from forescale.ground.errors import UserError, storage_error
from forescale.ground.storage import write_file

_FOLDER = "notebook_classes"
_CELL = "__main__"  # the module of a cell, and of a script
_SECTIONS = ("optimizer", "objective")  # sections in which `own` chooses a class of the user's
_TODO = "write the class with all it needs into a file, such as mine.py, and import it from there"


def with_names(keys: Mapping[str, Any]) -> dict[str, Any]:
    """Return keys with the dotted names of classes in the place of the classes: of values such as
    model=Model, optimizer={"_target_": Mine, "arguments": {}} or callbacks=[Mine]. Raises
    UserError if the source of a cell's class doesn't tell what it is."""
    named: dict[str, Any] = {}
    for name, value in keys.items():
        value = _named(value)
        if name in _SECTIONS and isinstance(value, Mapping) and "_target_" in value:
            named |= {name: "own", **{f"{name}.{key}": inner for key, inner in value.items()}}
        else:
            named[name] = value
    return named


def _named(value: Any) -> Any:
    if isinstance(value, type):
        return {"_target_": dotted_name(value)}
    if isinstance(value, list | tuple):
        return [_named(item) for item in value]
    if isinstance(value, Mapping) and isinstance(cls := value.get("_target_"), type):
        return {**value, "_target_": dotted_name(cls)}
    return value


def dotted_name(cls: type) -> str:
    """Return the name by which a rank imports a class; the module of a cell's class is written."""
    if cls.__module__ != _CELL:
        return f"{cls.__module__}.{cls.__qualname__}"
    parts = _Source(vars(sys.modules[_CELL]))
    parts.add(cls.__name__, cls)
    text = "\n\n\n".join([f'"""{cls.__name__}, as a notebook defined it."""', *parts.texts]) + "\n"
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    name = f"{cls.__name__.lower()}_{digest}"
    path = Path(_FOLDER) / f"{name}.py"
    try:
        path.parent.mkdir(exist_ok=True)
        if not path.exists() or path.read_bytes() != text.encode():
            write_file(path, text.encode())
    except OSError as e:
        raise storage_error(e) or e from None
    return f"{_FOLDER}.{name}.{cls.__name__}"


class _Source:
    """The source of definitions and of all that they name. texts: in the order of a module."""

    def __init__(self, names: Mapping[str, Any]):
        self._names, self._texts, self._imports = names, dict[str, str](), dict[str, str]()

    @property
    def texts(self) -> list[str]:
        """The imports, then each definition behind those that it names."""
        return ["\n".join(sorted(self._imports.values())), *self._texts.values()]

    def add(self, name: str, value: Any) -> None:
        """Add what a name of the cells stands for. Raises UserError if no source tells it."""
        if name in self._texts or name in self._imports:
            return
        if isinstance(value, ModuleType):
            self._imports[name] = f"import {value.__name__} as {name}"
        elif getattr(value, "__module__", None) == _CELL and hasattr(value, "__name__"):
            self._define(name, value)
        elif _is_literal(value):
            self._texts[name] = f"{name} = {value!r}"
        elif (place := _place_of(name, value)) is not None:
            self._imports[name] = f"from {place[0]} import {place[1]} as {name}"
        else:
            problem = f"is {value!r:.100}, which is no number, text, module, class or function"
            raise UserError(name, problem, _TODO)

    def _define(self, name: str, value: Any) -> None:
        own_name = value.__name__
        if name != own_name and self._names.get(own_name) is value:  # one definition, two names
            self.add(own_name, value)
            self._texts[name] = f"{name} = {own_name}"
            return
        self._texts[name] = ""  # meanwhile: it may name itself
        text = source_of(value)
        if text.startswith("@") and self._names.get(own_name) is not value:
            problem = (
                "differs from its definition in the cell: a decorator or a later line replaced it"
            )
            raise UserError(name, problem, _TODO)
        for other in dict.fromkeys(_globals_of(compile(text, own_name, "exec", dont_inherit=True))):
            if other not in (own_name, "__name__") and other in self._names:
                self.add(other, self._names[other])
        self._texts[name] = self._texts.pop(name) or text  # behind what it names
        if own_name != name:
            self._texts[name] += f"\n\n\n{name} = {own_name}"


def source_of(value: Any) -> str:
    """Return the text of a class or a function of a cell. Raises UserError if it isn't known, or if
    a method of the class comes from elsewhere."""
    name, function = value.__name__, inspect.unwrap(value)
    codes = {name: function.__code__} if isinstance(function, FunctionType) else {}
    bases = {base.__qualname__ for base in getattr(value, "__mro__", ())}
    for method_name, member in vars(value).items() if isinstance(value, type) else ():
        method = inspect.unwrap(getattr(member, "__func__", getattr(member, "fget", member)))
        if isinstance(method, FunctionType):
            owner = method.__qualname__.rpartition(".")[0]
            if owner == value.__qualname__:
                codes[method_name] = method.__code__
            elif method.__module__ == _CELL and owner not in bases:
                problem = f"has a method, {method_name}, that its own source doesn't define"
                raise UserError(name, problem, "define it inside the class")
    files = {code.co_filename for code in codes.values()}
    files = {file for file in files if linecache.getlines(file)}
    with suppress(SyntaxError, ValueError):
        (file,) = files
        lines = linecache.getlines(file)
        kinds = ast.ClassDef if isinstance(value, type) else ast.FunctionDef
        nodes = [n for n in ast.parse("".join(lines)).body if isinstance(n, kinds)]
        (*_, node) = (node for node in nodes if node.name == name == value.__qualname__)
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
        return "".join(lines[first - 1 : node.end_lineno]).rstrip()
    raise UserError(name, "is not defined at the top of a cell, or has no method", _TODO)


def _globals_of(code: CodeType) -> Iterator[str]:
    """Yield the global names that code reads, that of inner functions too."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            yield instruction.argval
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            yield from _globals_of(inner)


def _place_of(name: str, value: Any) -> tuple[str, str] | None:
    """Return the module and the name by which a value can be imported; None if there is none."""
    module, own_name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if own_name and isinstance(module, str) and module != _CELL:
        with suppress(ImportError, AttributeError):
            if getattr(importlib.import_module(module), own_name) is value:
                return module, own_name
    modules = [(m, getattr(module, "__dict__", {})) for m, module in [*sys.modules.items()]]
    places = [m for m, names in modules if name in names and names[name] is value]
    cells = sys.modules[_CELL]  # maybe under other names, too
    places = [m for m in places if sys.modules[m] is not cells]
    return (min(places, key=lambda m: (m.count("_"), len(m), m)), name) if places else None


def _is_literal(value: Any) -> bool:
    with suppress(ValueError, SyntaxError):
        literal = ast.literal_eval(repr(value))
        # The text of a set is another one in each process.
        has_set = any(isinstance(node, ast.Set) for node in ast.walk(ast.parse(repr(value))))
        return type(literal) is type(value) and literal == value and not has_set
    return False
