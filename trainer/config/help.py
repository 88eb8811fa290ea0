"""The pages of `forescale VERB --help`: a short one, one of a section, and one of everything.

Invariant: every help text has one source. That of a key is the comment beside or above its field
in the schema, that of a choice the first sentence of its file; defaults come from the composed
config, and a key is on the short page if its field is marked `common`.
"""

import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from forescale.config.compose import Group, defaults, groups
from forescale.config.job import Job
from forescale.config.schema import (
    Kind,
    Leaf,
    flatten,
    kinds_of,
    leaves,
    name_of,
    options,
    plain,
    word_of,
)
from forescale.config.suggest import meant, nearest_first
from forescale.ground.errors import UserError

ALL = "all"  # the word after --help that shows everything
SCREENS = 60  # lines of the short page
_WIDTH = 100

_TARGET = {"run.name": "RUN", "input": "INPUT", "target": "RUN|PATH", "run.from.run": "FROM"}
_MARK = {"identity": "!", "numerics": "~", "free": " "}
_LEGEND = """
Between two starts of a run, a key marked ! must not change. If a key marked ~ changes, the run
prints a note and is no longer exact to the last bit. All other keys may change."""


class _Keys(NamedTuple):
    """Some keys, and the default of each. title: the kind of a block that has them; "": any."""

    title: str
    leaves: dict[str, Leaf]
    values: Mapping[str, Any]


def explain(
    schema: type[Job],
    purpose: str,
    examples: Sequence[str] = (),
    conf_dirs: Sequence[str | Path] = (),
    action: str = "",
    section: str = "",
) -> str:
    """Return the page of `forescale VERB [ACTION] --help [SECTION]`.

    For a verb with actions: the keys of this action, or the list of actions if it is none of them.
    section: "" gives the page of at most SCREENS lines, "all" everything, else the keys of this
    section and the choices of this group. Raises UserError if there is no such section.
    """
    verb, choices, job = schema.VERB, groups(schema, conf_dirs), defaults(schema)
    keys = _Keys("", leaves(schema, job=job), dict(flatten(plain(job), "")))
    if schema.ACTIONS:
        action = section if section in schema.ACTIONS else action
        if action not in schema.ACTIONS:
            return _actions(schema, purpose)
        verb, (purpose, _, examples) = f"{verb} {action}", schema.ACTIONS[action]
        reads = schema.ACTIONS[action].reads
        keys = keys._replace(leaves={p: leaf for p, leaf in keys.leaves.items() if reads(p)})
        section = "" if section == action else section
    tables = [keys, *(t for t in _other_kinds(schema, job) if not schema.ACTIONS)]
    if section not in ("", ALL):
        return _section(f"forescale {verb}", section, choices, tables)
    target = _TARGET.get(schema.TARGET, schema.TARGET.upper())
    target = f" [{target}]" if schema.TARGET in keys.leaves else ""
    flags = "".join(f" [{flag}]" for flag, name in schema.FLAGS.items() if name in keys.leaves)
    usage = f"forescale {verb}{target} [KEY=VALUE ...]{flags}\n\n{purpose}"
    lines = "\n".join(f"  forescale {example}" for example in examples)
    head = [usage, "Examples\n" + lines]
    page = "\n\n".join([*head, *_everything(choices, tables)]) + "\n"
    if section == ALL or page.count("\n") <= SCREENS:
        return page
    return "\n\n".join([*head, *_short(f"forescale {verb}", choices, keys)]) + "\n"


def _actions(schema: type[Job], purpose: str) -> str:
    """Return the page of a verb with actions: one line for each."""
    verb = schema.VERB
    rows = [_row(f"  {name:<10} ", action.purpose) for name, action in schema.ACTIONS.items()]
    note = f"forescale {verb} ACTION --help shows the keys and examples of an action."
    head = f"forescale {verb} ACTION [KEY=VALUE ...]\n\n{purpose}"
    return "\n\n".join([head, "Actions\n" + "\n".join(rows), note]) + "\n"


def _everything(choices: Mapping[str, Group], tables: Sequence[_Keys]) -> list[str]:
    """Return the paragraphs of all choices and all keys."""
    parts = []
    if choices:
        rows = "\n".join(_choices(group) for group in choices.values())
        parts.append("Choices, written GROUP=CHOICE (* is the default)\n" + rows)
    sections: dict[str, list[str]] = {}
    for leaf in tables[0].leaves.values():
        title = leaf.path.partition(".")[0] if "." in leaf.path else ""
        sections.setdefault(title, []).append(_key(leaf, tables[0].values))
    parts.append("Keys, written KEY=VALUE, with their defaults" + _legend(tables[0].leaves))
    return [*parts, *map("\n".join, sections.values()), *map(_of_kind, tables[1:])]


def _short(command: str, choices: Mapping[str, Group], keys: _Keys) -> list[str]:
    """Return the paragraphs of the short page."""
    parts = []
    if choices:
        rows = []
        for name, group in choices.items():
            words = sorted(group.files, key=lambda word: (word != group.default, word))
            words = [word + " *" * (word == group.default) for word in words]
            rows.append(_row(f"  {name:<12}", ", ".join(words)))
        parts.append("Choices, written GROUP=CHOICE (* is the default)\n" + "\n".join(rows))
    rows = [_key(leaf, keys.values, short=True) for leaf in keys.leaves.values() if leaf.common]
    parts.append("The keys that most users set, written KEY=VALUE\n" + "\n".join(rows))
    sections = dict.fromkeys(path.partition(".")[0] for path in keys.leaves if "." in path)
    names = ", ".join(dict.fromkeys([*choices, *sections]))
    rest = [
        (f"{command} --help SECTION", f"its keys and choices; SECTION is one of {names}"),
        (f"{command} --help {ALL}", "everything"),
        ("forescale help", "the pages of the manual"),
    ]
    wide = max(len(line) for line, _ in rest)
    rows = [_row(f"  {line:<{wide}}  ", text) for line, text in rest]
    return [*parts, "To read on\n" + "\n".join(rows)]


def _section(
    command: str, section: str, choices: Mapping[str, Group], tables: Sequence[_Keys]
) -> str:
    """Return the page of one section, which may be a group, a section within another, or a key.
    Raises UserError if there is none of this name."""
    chosen = []
    for table in tables:
        of_section = {
            path: leaf
            for path, leaf in table.leaves.items()
            if path == section or path.startswith(section + ".")
        }
        if of_section:
            chosen.append(table._replace(leaves=of_section))
    parts = []
    if section in choices:
        title = f"Choices, written {section}=CHOICE (* is the default)\n"
        parts.append(title + _choices(choices[section]))
    if chosen and not chosen[0].title:
        table = chosen.pop(0)
        rows = [_key(leaf, table.values) for leaf in table.leaves.values()]
        legend = _legend({path: leaf for t in tables for path, leaf in t.leaves.items()})
        parts.append(f"Keys, written KEY=VALUE, with their defaults{legend}\n\n" + "\n".join(rows))
    parts += map(_of_kind, chosen)
    if not parts:
        paths = [path.split(".") for table in tables for path in table.leaves]
        prefixes = {".".join(path[:n]) for path in paths for n in range(1, len(path) + 1)}
        names = sorted({*choices, ALL, *prefixes})
        near = meant(section, names) or nearest_first(section, names)[0]
        problem = "no such section, group or key"
        raise UserError(f"--help {section}", problem, f"did you mean {command} --help {near}?")
    return "\n\n".join([f"{command}: {section}", *parts]) + "\n"


def _other_kinds(schema: type, job: Any, prefix: str = "", kind: Kind = "free") -> Iterator[_Keys]:
    """Yield the keys of each kind of each block that the job hasn't chosen, but for those that the
    chosen kind has too."""
    for f in fields(schema):
        path, part = prefix + name_of(f), getattr(job, f.name, None)
        own_kind: Kind = f.metadata.get("kind") or kind
        if kinds := kinds_of(f):
            is_one = is_dataclass(part)
            word = word_of(f, part) if is_one else ""
            chosen = leaves(type(part), path + ".") if is_one else {}
            for other, inner in kinds.items():
                default = inner()
                keys = leaves(inner, path + ".", own_kind, default)
                keys = {name: leaf for name, leaf in keys.items() if name not in chosen}
                if other != word and keys and not isinstance(part, list):
                    yield _Keys(f"{path}={other}", keys, dict(flatten(plain(default), path)))
        if is_dataclass(part):
            yield from _other_kinds(type(part), part, path + ".", own_kind)


def _of_kind(table: _Keys) -> str:
    """Return the paragraph of the keys of a kind."""
    rows = [_key(leaf, table.values) for leaf in table.leaves.values()]
    return "\n".join([f"With {table.title}", *rows])


def _legend(keys: Mapping[str, Leaf]) -> str:
    return _LEGEND if any(leaf.kind == "identity" for leaf in keys.values()) else ""


def _choices(group: Group) -> str:
    rows = []
    for n, (choice, path) in enumerate(sorted(group.files.items())):
        name = choice + (" *" if choice == group.default else "")
        head = f"  {group.name if n == 0 else '':<11} {name:<15} "
        rows.append(_row(head, first_sentence(path)))
    return "\n".join(rows)


def first_sentence(path: Path) -> str:
    """Return the first sentence of the comment that opens a file of a choice."""
    lines = (line for line in path.read_text().splitlines() if not line.startswith("# @package"))
    comment: list[str] = []
    for line in lines:
        if not line.startswith("#") or not line.strip("# "):
            break
        comment.append(line.removeprefix("#").strip())
    text = " ".join(comment)
    match = re.match(r".*?[.!?](?=\s+[A-Z`]|$)", text)
    return match[0] if match else text


def _key(leaf: Leaf, values: Mapping[str, Any], short: bool = False) -> str:
    """Return the row of a key. short: without its mark, and the help up to its first semicolon."""
    mark, text = (" ", _help(leaf).partition(";")[0]) if short else (_MARK[leaf.kind], _help(leaf))
    return _row(f"{mark} {leaf.path:<30} {_value(values.get(leaf.path)):<12} ", text)


def _value(default: Any) -> str:
    """Return a default as a user would type it."""
    if default is None or default == "" or isinstance(default, bool):
        return {None: "null", "": '""'}.get(default, str(default).lower())
    return f"{default:_}" if isinstance(default, int) and default >= 10_000 else str(default)


def _help(leaf: Leaf) -> str:
    cls, name = leaf.source
    text = leaf.help or _comments(cls).get(name, "")
    for type_ in options(leaf.type):
        if get_origin(type_) is Literal:
            text += f" ({' | '.join(map(str, get_args(type_)))})"
    return text.strip()


@cache
def _comments(cls: type) -> dict[str, str]:
    """Return the comment beside, or directly above, each field of a dataclass and its bases."""
    result: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        above: list[str] = []
        for line in inspect.getsource(base).splitlines():
            if f := re.match(r"    (\w+): .*?(?:  # (?!type: )(.*))?$", line):
                result[f[1]] = f[2] or " ".join(above)
            comment = re.fullmatch(r"    # (.*)", line)
            above = [*above, comment[1]] if comment else []
    return {name: text.replace("None:", "null:") for name, text in result.items()}


def _row(head: str, text: str) -> str:
    """Return `head` followed by `text`, wrapped in the column beside it."""
    lines = textwrap.wrap(text, max(30, _WIDTH - len(head))) or [""]
    return "\n".join([head + lines[0], *(" " * len(head) + line for line in lines[1:])]).rstrip()
