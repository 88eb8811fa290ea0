"""JSON Schema (draft 2020-12) of a verb: its keys, and what it prints with --json.

Invariant: all of it follows from the verb's job, as --help does: types, bounds, defaults, help of
its keys, the files of its groups, and PRINTS and LINES for what it prints.
"""

import types
from collections.abc import Mapping
from typing import Any, Literal, NotRequired, get_args, get_origin

from forescale.config.compose import Group, groups
from forescale.config.duration import EXAMPLES, Duration
from forescale.config.help import first_sentence, help_of, tables_of
from forescale.config.job import Job
from forescale.config.schema import Leaf, options
from forescale.config.sizes import Sizes
from forescale.ground.errors import EXIT_CODES

DRAFT = "https://json-schema.org/draft/2020-12/schema"
_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_SIMPLE = {bool: "boolean", int: "integer", str: "string", types.NoneType: "null", list: "array",
           dict: "object", tuple: "array"}  # fmt: skip
_KEYS = "The keys of this command, written KEY=VALUE. Of a block, KEY=KIND is short for KEY.kind."


def arguments(schema: type[Job], purpose: str, action: str = "") -> dict[str, Any]:
    """Return the schema of a verb's keys, or of those that an action of it reads."""
    known = schema.ACTIONS.get(action)
    keys: dict[str, list[dict[str, Any]]] = {}  # kinds of a block may have keys of one name
    for title, leaves, values in tables_of(schema):
        for path, leaf in leaves.items():
            if not known or known.reads(path):
                of_kind = {"title": f"with {title}"} if title else {}
                keys.setdefault(path, []).append(_key(leaf, values.get(path)) | of_kind)
    properties = {name: _group(group) for name, group in groups(schema).items()}
    properties |= {path: {"anyOf": some} if some[1:] else some[0] for path, some in keys.items()}
    properties.setdefault("json", {"type": "boolean", "default": False})  # of drill: also a file
    flags = {flag: key for flag, key in schema.FLAGS.items() if key in properties}
    return {
        "description": f"{purpose} {_KEYS}",
        "type": "object",
        "x-target": schema.TARGET,
        "x-flags": {**flags, "--json": "json"},
        "properties": properties,
    }


def document(prints: Mapping[str, Any], lines: str) -> dict[str, Any]:
    """Return the schema of what a verb prints with --json: a document, or each of its lines."""
    required = [name for name, type_ in prints.items() if get_origin(type_) is not NotRequired]
    how = f"Each line is such an object: {lines}." if lines else "One document."
    properties = {name: type_schema(type_, nan=True) for name, type_ in prints.items()}
    mistake = {"anyOf": [*filter(None, [properties.get("error")]), {"$ref": "#/$defs/error"}]}
    return {
        "description": f"{how} Further fields may be added.",
        "type": "object",
        "properties": {**properties, "error": mistake},
        "anyOf": [{"required": ["error"]}, {"required": required}],
    }


def error() -> dict[str, Any]:
    """Return the schema of the object `error`."""
    codes = [{"const": code, "description": text} for code, text in EXIT_CODES.items() if code]
    names = ("verb", "subject", "problem", "todo")
    known = {"exit_code": {"oneOf": codes}, "problems": type_schema(list[dict[str, str]])}
    return {
        "description": "Why a command failed; problems: all of them, where there are several.",
        "type": "object",
        "properties": {**{key: {"type": "string"} for key in names}, **known},
        "required": [*names, "exit_code"],
    }


def type_schema(type_: Any, nan: bool = False) -> dict[str, Any]:
    """Return the schema of values of a type. nan: numbers may be null, which stands for NaN."""
    if get_origin(type_) is NotRequired:
        type_ = get_args(type_)[0]
    if len(alternatives := options(type_)) > 1:
        parts = [type_schema(one, nan) for one in alternatives]
        if all(part.keys() == {"type"} and isinstance(part["type"], str) for part in parts):
            return {"type": [part["type"] for part in parts]}
        return {"anyOf": parts}
    origin, inner = get_origin(type_), get_args(type_)
    if origin is Literal:
        return {"enum": [*inner]}
    if (origin in (list, tuple) and len(inner) != 2) or inner[1:] == (...,):
        return {"type": "array", "items": type_schema(inner[0], nan)}
    if origin is dict:
        return {"type": "object", "additionalProperties": type_schema(inner[1], nan)}
    if type_ is float:
        return {"type": ["number", "null"] if nan else "number"}
    if type_ is Duration:
        return {"type": ["string", "integer"], "description": f"A length, such as {EXAMPLES}."}
    if type_ is Sizes:
        return {"type": ["integer", "string"], "pattern": "^[0-9]+(-[0-9]+)?$"}
    return {"type": _SIMPLE[origin or type_]} if (origin or type_) in _SIMPLE else {}


def _key(leaf: Leaf, default: Any) -> dict[str, Any]:
    """Return the schema of a key's value."""
    facts = type_schema(leaf.type)
    text = " ".join(filter(None, (help_of(leaf), facts.pop("description", ""))))
    if Duration not in options(leaf.type):
        facts |= {_BOUNDS[name]: bound for name, bound in leaf.bounds.items() if name in _BOUNDS}
    kind = {} if leaf.kind == "free" else {"x-resume": leaf.kind}
    return {"description": text, **facts, "default": default, **kind}


def _group(group: Group) -> dict[str, Any]:
    """Return the schema of a group's choices."""
    none = {} if group.default else {None: "none of them"}
    texts = {name: first_sentence(path) for name, path in group.files.items()} | none
    choices = [{"const": name, "description": text} for name, text in texts.items()]
    return {"oneOf": choices, "default": group.default}
