"""What `forescale VERB --help` prints: every key with its default, every group with its choices.

Invariant: nothing is said twice in the project. Help texts come from the schema's fields, for the
model's from the comments beside them; choices from the first comment of their files; defaults
from the composed tree.
"""

import inspect
import re
import textwrap
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from forescale.config.compose import Group, defaults, groups
from forescale.config.job import Job
from forescale.config.schema import Leaf, leaves, options
from forescale.models.config import ModelConfig

_WORD = {"run.name": "RUN", "input": "TEXT", "target": "RUN|PATH", "": ""}
_MARK = {"identity": "!", "numerics": "~", "free": " "}
_LEGEND = """\
A run that goes on refuses another value of a key marked !, and takes one of a key marked ~
with a note that it isn't exact to the bit from there. All others may change at any time."""


def explain(
    schema: type[Job],
    purpose: str,
    examples: Sequence[str] = (),
    conf_dirs: Sequence[str | Path] = (),
) -> str:
    """The page of `forescale VERB --help`, as text."""
    verb, choices = schema.VERB, groups(schema, conf_dirs)
    found, composed = leaves(schema), defaults(schema)
    word = _WORD[schema.TARGET]
    usage = f"forescale {verb}{f' [{word}]' if word else ''} [KEY=VALUE ...]"
    parts = [f"{usage}\n\n{purpose}", "Examples\n" + _lines(examples)]
    if choices:
        tables = "\n".join(_choices(group) for group in choices.values())
        parts.append("Choices, GROUP=CHOICE (* unless told otherwise)\n" + tables)
    sections: dict[str, list[str]] = {}
    for leaf in found.values():
        title = leaf.path.partition(".")[0] if "." in leaf.path else ""
        sections.setdefault(title, []).append(_key(leaf, composed.get(leaf.path)))
    legend = f"\n{_LEGEND}" if verb == "train" else ""
    parts.append("Keys, KEY=VALUE, with their defaults" + legend)
    return "\n\n".join(parts + ["\n".join(lines) for lines in sections.values()]) + "\n"


def _lines(examples: Sequence[str]) -> str:
    return "\n".join(f"  forescale {example}" for example in examples)


def _choices(group: Group) -> str:
    rows = []
    for n, (choice, path) in enumerate(sorted(group.files.items())):
        name = choice + (" *" if choice == group.default else "")
        rows.append(_row(f"  {group.name if n == 0 else '':<11} {name:<15} ", _first_comment(path)))
    return "\n".join(rows)


def _first_comment(path: Path) -> str:
    lines = (line for line in path.read_text().splitlines() if not line.startswith("# @package"))
    return next(lines, "").removeprefix("#").strip()


def _key(leaf: Leaf, default: Any) -> str:
    return _row(f"{_MARK[leaf.kind]} {leaf.path:<30} {_value(default):<12} ", _help(leaf))


def _value(default: Any) -> str:
    """A default as a user would type it."""
    if default is None or default == "" or isinstance(default, bool):
        return {None: "null", "": '""'}.get(default, str(default).lower())
    return f"{default:_}" if isinstance(default, int) and default >= 10_000 else str(default)


def _help(leaf: Leaf) -> str:
    text = leaf.help or _comments().get(leaf.path, "")
    for type_ in options(leaf.type):
        if get_origin(type_) is Literal:
            text += f" ({' | '.join(map(str, get_args(type_)))})"
    return text.strip()


@cache
def _comments() -> dict[str, str]:
    """The comment beside each field of the model's schema, which knows no metadata of ours."""
    source = inspect.getsource(ModelConfig)
    beside = re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE)
    return {f"model.{name}": text.replace("None:", "null:") for name, text in beside}


def _row(head: str, text: str) -> str:
    """`head`, then `text` wrapped in the column beside it."""
    lines = textwrap.wrap(text, max(30, 100 - len(head))) or [""]
    return "\n".join([head + lines[0], *(" " * len(head) + line for line in lines[1:])]).rstrip()
