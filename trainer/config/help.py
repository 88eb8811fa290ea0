"""The page of `forescale VERB --help`: every key with its default, every group with its choices.

Invariant: every help text has one source. That of a key is its field in the schema (for
`model.*` the comment beside the field), that of a choice the first comment of its file; defaults
come from the composed config.
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
from forescale.config.schema import Leaf, flatten, leaves, options, plain
from forescale.models.config import ModelConfig

_TARGET = {"run.name": "RUN", "input": "INPUT", "target": "RUN|PATH", "run.from.run": "FROM"}
_MARK = {"identity": "!", "numerics": "~", "free": " "}
_LEGEND = """\
Between two starts of a run, a key marked ! must not change. If a key marked ~ changes, the run
prints a note and is no longer exact to the last bit. All other keys may change."""


def explain(
    schema: type[Job],
    purpose: str,
    examples: Sequence[str] = (),
    conf_dirs: Sequence[str | Path] = (),
    action: str = "",
) -> str:
    """Return the page of `forescale VERB [ACTION] --help`.

    For a verb with actions: the keys of this action, or the list of actions if it is none of them.
    """
    verb, choices = schema.VERB, groups(schema, conf_dirs)
    job = defaults(schema)
    found, composed = leaves(schema, job=job), dict(flatten(plain(job), ""))
    if schema.ACTIONS:
        if action not in schema.ACTIONS:
            return _actions(schema, purpose)
        verb, (purpose, _, examples) = f"{verb} {action}", schema.ACTIONS[action]
        found = {path: leaf for path, leaf in found.items() if schema.ACTIONS[action].reads(path)}
    target = _TARGET.get(schema.TARGET, schema.TARGET.upper())
    target = f" [{target}]" if schema.TARGET in found else ""
    flags = "".join(f" [{flag}]" for flag, name in schema.FLAGS.items() if name in found)
    usage = f"forescale {verb}{target} [KEY=VALUE ...]{flags}"
    parts = [f"{usage}\n\n{purpose}", "Examples\n" + _lines(examples)]
    if choices:
        tables = "\n".join(_choices(group) for group in choices.values())
        parts.append("Choices, written GROUP=CHOICE (* is the default)\n" + tables)
    sections: dict[str, list[str]] = {}
    for leaf in found.values():
        title = leaf.path.partition(".")[0] if "." in leaf.path else ""
        sections.setdefault(title, []).append(_key(leaf, composed.get(leaf.path)))
    legend = f"\n{_LEGEND}" if verb == "train" else ""
    parts.append("Keys, written KEY=VALUE, with their defaults" + legend)
    return "\n\n".join(parts + ["\n".join(lines) for lines in sections.values()]) + "\n"


def _actions(schema: type[Job], purpose: str) -> str:
    """Return the page of a verb with actions: one line for each."""
    verb = schema.VERB
    rows = [_row(f"  {name:<10} ", action.purpose) for name, action in schema.ACTIONS.items()]
    more = f"forescale {verb} ACTION --help shows the keys and examples of an action."
    head = f"forescale {verb} ACTION [KEY=VALUE ...]\n\n{purpose}"
    return "\n\n".join([head, "Actions\n" + "\n".join(rows), more]) + "\n"


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
    """Return a default as a user would type it."""
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
    """Return the comment beside or above each field of the model's schema, which has no help
    metadata."""
    source = inspect.getsource(ModelConfig)
    beside = re.findall(r"^    (\w+): .*?  # (.*)$", source, re.MULTILINE)
    above = re.findall(r"^((?:    # .*\n)+)    (\w+): [^#\n]*$", source, re.MULTILINE)
    joined = {name: " ".join(re.findall("# (.*)", lines)) for lines, name in above}
    found = {**joined, **dict(beside)}
    return {f"model.{name}": text.replace("None:", "null:") for name, text in found.items()}


def _row(head: str, text: str) -> str:
    """Return `head` followed by `text`, wrapped in the column beside it."""
    lines = textwrap.wrap(text, max(30, 100 - len(head))) or [""]
    return "\n".join([head + lines[0], *(" " * len(head) + line for line in lines[1:])]).rstrip()
