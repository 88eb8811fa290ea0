"""The pages of `forescale VERB --help`: a short one, one of a section, and one of everything.

Invariant: every help text has one source. That of a key is the comment beside or above its field
in the schema, that of a choice the first sentence of its file; defaults come from the composed
config, and a key is on the short page if its field is marked `common`.
"""

import ast
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin

from forescale.config.compose import Group, defaults, groups
from forescale.config.job import Job
from forescale.config.schema import Kind, Leaf, flatten, kinds_of, leaves, name_of, options, plain
from forescale.config.suggest import meant, nearest_first
from forescale.ground.document import FLAG
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

    def only(self, holds: Callable[[str], bool]) -> "_Keys":
        """Return it with the keys whose paths hold."""
        return self._replace(leaves={p: leaf for p, leaf in self.leaves.items() if holds(p)})


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
    verb, choices, (keys, *others) = schema.VERB, groups(schema, conf_dirs), tables_of(schema)
    if schema.ACTIONS:
        action = section if section in schema.ACTIONS else action
        section = "" if section == action else section
        if action not in schema.ACTIONS:
            rows = [_row(f"  {name:<10} ", one.purpose) for name, one in schema.ACTIONS.items()]
            note = f"forescale {verb} ACTION --help shows the keys and examples of an action."
            usage = f"forescale {verb} ACTION [KEY=VALUE ...]\n\n{purpose}"
            return "\n\n".join([usage, "Actions\n" + "\n".join(rows), note]) + "\n"
        verb, (purpose, _, examples, *_) = f"{verb} {action}", schema.ACTIONS[action]
        keys = keys.only(schema.ACTIONS[action].reads)
    tables = [keys, *(others if not schema.ACTIONS else [])]
    if section not in ("", ALL):
        return _section(f"forescale {verb}", section, choices, tables)
    target = _TARGET.get(schema.TARGET, schema.TARGET.upper())
    target = f" [{target}]" if schema.TARGET in keys.leaves else ""
    flags = "".join(f" [{flag}]" for flag, name in schema.FLAGS.items() if name in keys.leaves)
    flags += f" [{FLAG}]"
    usage = f"forescale {verb}{target} [KEY=VALUE ...]{flags}\n\n{purpose}"
    lines = "\n".join(f"  forescale {example}" for example in examples)
    head = [usage, "Examples\n" + lines]
    page = "\n\n".join([*head, *_paragraphs(choices, tables)]) + "\n"
    if section == ALL or page.count("\n") <= SCREENS:
        return page
    return "\n\n".join([*head, *_short(f"forescale {verb}", choices, keys)]) + "\n"


def tables_of(schema: type[Job]) -> list[_Keys]:
    """Return the keys of a verb with their defaults; after them those of other kinds of blocks."""
    job = defaults(schema)
    keys = _Keys("", leaves(schema, job=job), dict(flatten(plain(job), "")))
    return [keys, *_other_kinds(schema, job)]


def _paragraphs(
    choices: Mapping[str, Group], tables: Sequence[_Keys], word: str = "GROUP"
) -> list[str]:
    """Return the paragraphs of choices and keys, those of each section and kind apart."""
    parts, rows = [], []
    for group in choices.values():
        for n, (choice, path) in enumerate(sorted(group.files.items())):
            name = choice + (" *" if choice == group.default else "")
            head = f"  {group.name if n == 0 else '':<11} {name:<15} "
            rows.append(_row(head, first_sentence(path)))
    if rows:
        parts.append(f"Choices, written {word}=CHOICE (* is the default)\n" + "\n".join(rows))
    paragraphs: dict[str, list[str]] = {}
    for table in tables:
        for leaf in table.leaves.values():
            title = leaf.path.partition(".")[0] if "." in leaf.path else ""
            start = [f"With {table.title}"] if table.title else []
            paragraphs.setdefault(table.title or title, start).append(_key(leaf, table.values))
    if tables and not tables[0].title:
        kinds = {leaf.kind for table in tables for leaf in table.leaves.values()}
        legend = _LEGEND if kinds - {"free"} else ""
        parts.append(f"Keys, written KEY=VALUE, with their defaults{legend}")
    return [*parts, *map("\n".join, paragraphs.values())]


def _short(command: str, choices: Mapping[str, Group], keys: _Keys) -> list[str]:
    """Return the paragraphs of the short page."""
    parts, rows = [], []
    for name, group in choices.items():
        words = sorted(group.files, key=lambda word: (word != group.default, word))
        words = [word + " *" * (word == group.default) for word in words]
        rows.append(_row(f"  {name:<12}", ", ".join(words)))
    if rows:
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
    chosen = [t.only(lambda path: f"{path}.".startswith(f"{section}.")) for t in tables]
    group = {name: group for name, group in choices.items() if name == section}
    if parts := _paragraphs(group, [table for table in chosen if table.leaves], section):
        return "\n\n".join([f"{command}: {section}", *parts]) + "\n"
    paths = [path.split(".") for table in tables for path in table.leaves]
    prefixes = {".".join(path[:n]) for path in paths for n in range(1, len(path) + 1)}
    names = sorted({*choices, ALL, *prefixes})
    near = meant(section, names) or nearest_first(section, names)[0]
    problem = "no such section, group or key"
    raise UserError(f"--help {section}", problem, f"did you mean {command} --help {near}?")


def _other_kinds(schema: type, job: Any, prefix: str = "", kind: Kind = "free") -> Iterator[_Keys]:
    """Yield the keys of each kind of each block that the job hasn't chosen, but for those that the
    chosen kind has too."""
    for f in fields(schema):
        path, part = prefix + name_of(f), getattr(job, f.name, None)
        own_kind: Kind = f.metadata.get("kind") or kind
        if not is_dataclass(part):
            continue
        chosen = leaves(type(part), path + ".")
        for other, inner in kinds_of(f).items():
            default = inner()
            keys = leaves(inner, path + ".", own_kind, default)
            keys = {name: leaf for name, leaf in keys.items() if name not in chosen}
            if inner is not type(part) and keys:
                yield _Keys(f"{path}={other}", keys, dict(flatten(plain(default), path)))
        yield from _other_kinds(type(part), part, path + ".", own_kind)


def first_sentence(path: Path) -> str:
    """Return the first sentence of the comment that opens a file of a choice."""
    lines = (line for line in path.read_text().splitlines() if not line.startswith("# @package"))
    comment = takewhile(lambda line: line.startswith("#") and line.strip("# "), lines)
    text = " ".join(line.removeprefix("#").strip() for line in comment)
    match = re.match(r".*?[.!?](?=\s+[A-Z`]|$)", text)
    return match[0] if match else text


def _key(leaf: Leaf, values: Mapping[str, Any], short: bool = False) -> str:
    """Return the row of a key. short: without its mark, and the help up to its first semicolon."""
    text = help_of(leaf)
    for type_ in options(leaf.type):
        if get_origin(type_) is Literal:
            text += f" ({' | '.join(map(str, get_args(type_)))})"
    text = text.partition(";")[0] if short else text
    default = values.get(leaf.path)  # shown as a user would type it
    if default is None or default == "" or isinstance(default, bool):
        default = {None: "null", "": '""'}.get(default, str(default).lower())
    elif isinstance(default, int) and default >= 10_000:
        default = f"{default:_}"
    mark = " " if short else _MARK[leaf.kind]
    return _row(f"{mark} {leaf.path:<30} {default!s:<12} ", text.strip())


def help_of(leaf: Leaf) -> str:
    """Return the help text of a key, without its choices."""
    cls, name = leaf.source
    return leaf.help or _comments(cls).get(name, "")


@cache
def _classes(module: str) -> dict[str, list[str]]:
    """Return the lines of each class of a module. Each file is parsed once: inspect parses it for
    each class, which takes a second."""
    source = inspect.getsource(sys.modules[module])
    nodes = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef))
    return {n.name: source.splitlines()[n.lineno - 1 : n.end_lineno] for n in nodes}


@cache
def _comments(cls: type) -> dict[str, str]:
    """Return the comment beside, or directly above, each field of a dataclass and its bases."""
    result: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        above: list[str] = []
        for line in _classes(base.__module__).get(base.__name__, ()):
            if f := re.match(r"    (\w+): .*?(?:  # (?!type: )(.*))?$", line):
                result[f[1]] = f[2] or " ".join(above)
            comment = re.fullmatch(r"    # (.*)", line)
            above = [*above, comment[1]] if comment else []
    return {name: text.replace("None:", "null:") for name, text in result.items()}


def _row(head: str, text: str) -> str:
    """Return `head` followed by `text`, wrapped in the column beside it."""
    lines = textwrap.wrap(text, max(30, _WIDTH - len(head))) or [""]
    return "\n".join([head + lines[0], *(" " * len(head) + line for line in lines[1:])]).rstrip()
