"""The base class of every verb's job. A job is a dataclass whose fields are the verb's keys.

Invariant: the command line, `--help` and shell completion learn a verb's keys from its job alone. A
field whose type is a dataclass is a section, and its fields are keys `section.name`.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from forescale.config.schema import ConfigError, Problem, flatten, key, leaves, options, section
from forescale.ground.errors import UserError, shortened

Find = Callable[[Path], Mapping[str, Any] | None]
Problems = list[tuple[str, str, str]]  # (key, what is wrong, what to do)
ProblemIterator = Iterator[tuple[str, str, str]]
_LONGEST = 100  # characters of a value in a message


class Action(NamedTuple):
    """An action of a verb, such as `plan` of `forescale study plan`.

    keys: the keys that it reads; `section.*` stands for all keys of a section. prints: Job.PRINTS
    """

    purpose: str
    keys: tuple[str, ...]
    examples: tuple[str, ...]
    prints: Mapping[str, Any]
    lines: str = ""

    def reads(self, path: str) -> bool:
        return path in self.keys or f"{path.partition('.')[0]}.*" in self.keys


class Job:
    """The keys of a verb; an instance is one command.

    VERB: the verb's name, such as plan or submit eval. If it has groups of choices, conf/VERB.yaml
        is its primary config, with - for a space.
    TARGET: the key that an argument without `=` sets; "" if the verb takes no such argument.
    FLAGS: each flag, such as --live, with the key that it sets to true. (--json is of all verbs.)
    TYPED: the keys that a command types by another name, by that name (it is a section's too).
    ACTIONS: the actions by name, if the verb has several; each reads some of the keys.
    PRINTS: the types of fields that its document has with --json, NotRequired of some documents.
    LINES: which such objects are printed a line each, instead of one document; "": none.
    """

    VERB: ClassVar[str] = ""
    TARGET: ClassVar[str] = ""
    FLAGS: ClassVar[Mapping[str, str]] = {}
    TYPED: ClassVar[Mapping[str, str]] = {}
    ACTIONS: ClassVar[Mapping[str, Action]] = {}
    PRINTS: ClassVar[Mapping[str, Any]] = {}
    LINES: ClassVar[str] = ""

    def for_machine(self, find: Find | None = None) -> Self:
        """Return the job with the values that follow from the machine it is for, or from the frozen
        config that `find` returns for the directory of its run."""
        return self


@dataclass
class RootConfig:
    """Where runs are looked for."""

    root: str = key("runs", common=True)  # the directory that holds the runs


@dataclass
class RunJob(Job):
    """The job of a verb that works on one existing run."""

    TARGET: ClassVar[str] = "target"

    target: str | None = None  # a run (its name or its directory)
    run: RootConfig = section(RootConfig)  # where runs are looked for

    def problems(self) -> Problems:
        if self.target:
            return []
        return [("target", "is missing", f"name a run or a path: forescale {self.VERB} first")]


@dataclass
class ModelJob(RunJob):
    """The job of a verb that runs the model of a checkpoint."""

    # a run (its name or its directory), a checkpoint or a Hugging Face directory
    target: str | None = None
    step: int | None = key(None, ge=0)  # the checkpoint of this step; null: the newest
    trust: bool = False  # allow running the model class (_target_) that the run's config names


def overrides_of(schema: type[Job], arguments: Sequence[str]) -> list[str]:
    """Return a verb's arguments as overrides: flags and names become `key=value`.

    Raises UserError if there are more names than the verb takes.
    """
    target, verb = schema.TARGET, schema.VERB
    arguments = [f"{schema.FLAGS[a]}=true" if a in schema.FLAGS else a for a in arguments]
    for i, argument in enumerate(arguments):
        name, is_set, value = argument.partition("=")
        if is_set and name in schema.TYPED:
            arguments[i] = f"{schema.TYPED[name]}={_quoted(value)}"
    names = [a for a in arguments if "=" not in a and not a.startswith(("-", "~", "+"))]
    rest = [a for a in arguments if a not in names]
    if not names:
        return rest
    if not target:
        todo = f"see forescale {verb} --help"
        raise UserError(" ".join(names), f"forescale {verb} takes no name", todo)
    if target == "input":
        quoted = ",".join(_quoted(name) for name in names)
        return [f"input=[{quoted}]", *rest]
    if len(names) > 1:
        todo = f"leave out all but one, and write settings as KEY=VALUE (forescale {verb} --help)"
        raise UserError(" ".join(names), f"forescale {verb} takes one name, not {len(names)}", todo)
    if target == "run.name" and "/" in names[0]:
        root, _, name = names[0].rstrip("/").rpartition("/")
        return [f"run.root={_quoted(root or '/')}", f"run.name={_quoted(name)}", *rest]
    return [f"{target}={_quoted(names[0])}", *rest]


def words_of(
    keys: Mapping[str, Any], above: str = "", schema: type[Job] | None = None
) -> list[str]:
    """Return nested keys as words of a command line: {"run": {"name": "a"}} -> ["run.name=a"].
    schema: check the values as those of its keys. Raises ConfigError."""
    if schema is not None:
        _check_values(schema, keys)
    words: list[str] = []
    for name, value in keys.items():
        if isinstance(value, Mapping):
            words += words_of(value, f"{above}{name}.")
        else:
            words.append(f"{above}{name}={_text(value)}")
    return words


def _check_values(schema: type[Job], keys: Mapping[str, Any]) -> None:
    """Raise ConfigError for values of Python that no command line can have, and for a number where
    a verb takes text, such as a path. All others are checked as words."""
    known, problems = leaves(schema), []
    for path, value in flatten(keys, ""):
        leaf = known.get(schema.TYPED.get(path, path))
        types = options(leaf.type) if leaf else ()
        if not _has_text(value):
            problem = f"{shortened(repr(value), _LONGEST)} is no number, text or list of them"
            problems.append(
                Problem(
                    path,
                    problem,
                    "give one of these, a dict for a section, or a class (Model, not Model())",
                )
            )
        elif str in types and isinstance(value, bool | int | float) and type(value) not in types:
            problems.append(Problem(path, f"takes text, not {value!r}", "write it in quotes"))
    if problems:
        raise ConfigError(problems)


def _has_text(value: Any) -> bool:
    if isinstance(value, Mapping | list | tuple):
        return all(map(_has_text, value.values() if isinstance(value, Mapping) else value))
    is_number = getattr(value, "ndim", None) == 0  # of numpy
    return is_number or isinstance(value, bool | int | float | str | os.PathLike | None)


def _text(value: Any, is_inside: bool = False) -> str:
    """Return a value as a command line has it. is_inside: of a list or a section."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(_text(item, is_inside=True) for item in value)}]"
    if isinstance(value, Mapping):
        inside = ",".join(f"{name}:{_text(v, is_inside=True)}" for name, v in value.items())
        return f"{{{inside}}}"
    text = os.fspath(value) if isinstance(value, os.PathLike) else str(value)
    return _quoted(text) if is_inside and re.search(r"[^\w.+/-]", text) else text


def _quoted(text: str) -> str:
    """Return text in quotes, so that Hydra's grammar reads it back unchanged."""
    # In that grammar a backslash is literal, except before a quote.
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", "\\'")
    return f"'{escaped}'"
