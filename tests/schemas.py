"""Values against JSON Schemas, by the words that `forescale schema` writes."""

import json
import re
from collections.abc import Sequence
from typing import Any

_TYPES = {
    "null": lambda v: v is None,
    "boolean": lambda v: isinstance(v, bool),
    "integer": lambda v: isinstance(v, int) and not isinstance(v, bool),
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "string": lambda v: isinstance(v, str),
    "array": lambda v: isinstance(v, list),
    "object": lambda v: isinstance(v, dict),
}
_BOUNDS = {
    "minimum": lambda v, b: v >= b,
    "exclusiveMinimum": lambda v, b: v > b,
    "maximum": lambda v, b: v <= b,
    "exclusiveMaximum": lambda v, b: v < b,
    "pattern": lambda v, p: not isinstance(v, str) or re.search(p, v),
}
_NOTES = {"description", "default", "title"}


def faults(value: Any, schema: dict[str, Any], defs: dict[str, Any], at: str = "") -> list[str]:
    """Return where a value isn't as a schema says; a word that isn't known here is a fault, too."""
    result = []
    for word, fact in schema.items():
        match word:
            case "type":
                types = fact if isinstance(fact, list) else [fact]
                ok = any(_TYPES[t](value) for t in types)
            case "enum":
                ok = value in fact
            case "const":
                ok = value == fact
            case "anyOf" | "oneOf":
                counts = [not faults(value, one, defs, at) for one in fact]
                ok = any(counts) if word == "anyOf" else sum(counts) == 1
            case "required":
                ok = not isinstance(value, dict) or {*fact} <= {*value}
            case "properties" | "additionalProperties" | "items":
                ok = True
                pairs = enumerate(value if isinstance(value, list) and word == "items" else [])
                is_object = isinstance(value, dict) and word != "items"
                for name, inner in value.items() if is_object else pairs:
                    one = fact.get(name, {}) if word == "properties" else fact
                    result += faults(inner, one, defs, f"{at}/{name}")
            case "$ref":
                ok = True
                result += faults(value, defs[fact.rpartition("/")[2]], defs, at)
            case _ if word in _BOUNDS:
                is_number = _TYPES["number"](value) or word == "pattern"
                ok = not is_number or _BOUNDS[word](value, fact)
            case _:
                ok = word in _NOTES or word.startswith("x-")
        result += [] if ok else [f"{at or '/'}: {value!r:.80} is not {word} {fact!r:.80}"]
    return result


def expect_document(words: Sequence[str], out: str) -> None:
    """Assert that what a command with --json printed is as `forescale schema` says."""
    words = [str(word) for word in words]
    from forescale.config.json_schema import error
    from forescale.verbs import VERBS
    from forescale.verbs.schema import schemas_of

    if not words or words[0] not in VERBS or "--help" in words:
        return
    schemas = {"error": error(), **schemas_of(words[0])}
    names = (" ".join([*words[:n], "--json"]) for n in (2, 1))
    schema = schemas[next((name for name in names if name in schemas), "study fit --json")]
    is_lines = "Each line" in schema["description"]
    for text in out.splitlines() if is_lines and not out.startswith("{\n") else [out]:
        assert not faults(json.loads(text), schema, schemas), text[:500]
