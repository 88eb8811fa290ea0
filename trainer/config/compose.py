"""From a command line to a job: Hydra composes the conf tree, untyped, and this file checks it.

Invariant: all problems of the overrides and of the composed tree are reported together, in one
ConfigError. Hydra loads the files of the chosen groups. Values of the command line are read with
Hydra's grammar but set here, because Hydra would stop at the first unknown key, suggest no other,
and accept `+new.key=`.
"""

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_origin

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from forescale import conf
from forescale.config.job import Find, Job, overrides_of
from forescale.config.layers import LENGTHS, keep_one_length, keys_of, lay, over_frozen, over_origin
from forescale.config.schema import (
    ConfigError,
    Leaf,
    Problem,
    check,
    display,
    flatten,
    leaves,
    options,
    plain,
    unknown_key,
    unread,
)
from forescale.config.suggest import nearest_first
from forescale.config.target import refuse_stored
from forescale.config.tree import build, example
from forescale.ground.errors import PREFIX, UserError, masked, secret_in, shortened

CONF = Path(next(iter(conf.__path__))).resolve()
_NAME, _ROOT = "run.name", "run.root"
VARIABLE = "FORESCALE_CONF"  # environment variable: directories with the user's own choices
_TARGET = "model._target_"  # the class of the user's own model
_NAME_IT = (
    f"it would be stored: export it as {PREFIX}NAME and write ${PREFIX}NAME in its place "
    "(single quotes keep the shell from filling it in), or use ~/.netrc"
)
_LONGEST = 200  # characters of an argument in a message
_STUDY = "give one value; to train several runs, see forescale study --help"
J = TypeVar("J", bound=Job)
_parsed = lru_cache(maxsize=1024)(OverridesParser.create().parse_override)


@dataclass(frozen=True)
class Group:
    """A group of the conf tree: `name=CHOICE` loads that file into the section of this name."""

    name: str
    default: str | None
    files: dict[str, Path]


def parse(schema: type[J], arguments: Sequence[str]) -> J:
    """Return the job that the arguments of a command describe. Raises ConfigError."""
    return compose(schema, overrides_of(schema, arguments))


def arguments(schema: type[J], values: Mapping[str, Any]) -> J:
    """Return the arguments of a Python function as a job of class `schema`. Raises ConfigError."""
    # A number of numpy or pandas is one of Python's.
    plain = {name: v.item() if hasattr(v, "item") else v for name, v in values.items()}
    job, unknown, wrong = build(schema, plain)
    wrong += [unknown_key(name, leaves(schema), schema.VERB) for name in unknown]
    if wrong := wrong + check(job, wrong):
        raise ConfigError(wrong)
    return job


def compose(
    schema: type[J],
    overrides: Sequence[str] = (),
    conf_dirs: Sequence[str | Path] = (),
    find: Find | None = None,
) -> J:
    """Return the job of class `schema` that `key=value` overrides describe.

    conf_dirs: the user's own directories with more choices for the groups; by default those in the
    environment variable FORESCALE_CONF. find: returns the frozen config of the run in a directory,
    or None. What the overrides don't set has the values of the run that they name, if there is one,
    not the defaults; so has the model in a new branch. Raises ConfigError with all problems; and
    UserError if a directory doesn't exist, or if only the frozen config names the user's class.
    """
    known, keys = groups(schema, conf_dirs), leaves(schema)
    faults: list[Problem] = []
    picks, typed, earlier = _read(overrides, known, keys, faults, schema.FLAGS)
    if _TARGET in typed and "model" in known:
        picks.setdefault("model", "custom")  # without the keys of our default model
    composed = _hydra(schema, picks, conf_dirs)
    chosen = keys_of(picks, {name: group.files for name, group in known.items()})
    keep_one_length(composed, chosen)
    run = None  # the directory of the run that the command line names
    if find and _NAME in typed:
        root = _resolve(composed["run"], "run", [])["root"]
        if _ROOT in typed:
            root = _value(_ROOT, typed[_ROOT], keys[_ROOT])
        run = Path(root).expanduser() / _value(_NAME, typed[_NAME], keys[_NAME])
    frozen = find(run) if find and run else None
    tree, unknown, laid = _lay_over(composed, typed, earlier, schema, keys, faults, frozen or {})
    tree = _resolve(tree, "", faults)
    taken = {*chosen, *laid}
    if frozen:
        tree = over_frozen(schema, tree, frozen, taken)
    elif find:
        tree = over_origin(schema, tree, find, taken)
    job, unbuilt, wrong = build(schema, tree, typed=laid)
    faults += wrong
    job = job.for_machine(find)
    unknowns = [unknown_key(p, [*known, *keys], schema.VERB) for p in unknown + unbuilt]
    problems = unknowns + faults + check(job, faults) + _secrets(job)
    if frozen is None:  # an existing run has had these keys since it began
        refused = {problem.key for problem in problems}
        problems += [p for p in unread(job, laid, faults) if p.key not in refused]
    if problems:
        raise ConfigError(problems)
    if frozen is not None and run is not None:
        refuse_stored(job, run, taken)
    return job


def _secrets(job: Any) -> list[Problem]:
    """Return a problem for each address with a secret in it: what a job says is stored."""
    problems = []
    for path, value in flatten(plain(job), ""):
        for text in _texts(value):
            if problem := secret_in(re.sub(r"^[\w.+]+=(?=\w+://)", "", text)):
                problems.append(Problem(path, f"{masked(text)} has {problem} in it", _NAME_IT))
    return problems


def _texts(value: Any) -> Iterator[str]:
    """Yield all texts of a value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def defaults(schema: type[J]) -> J:
    """Return the job of a verb with the default of every key."""
    job: J = build(schema, _resolve(_hydra(schema, {}, ()), "", []))[0]
    return job


def groups(schema: type[Job], conf_dirs: Sequence[str | Path] = ()) -> dict[str, Group]:
    """Return the groups of a verb's config, with their files.

    Raises UserError if a directory is missing, or holds a choice that another directory holds too
    (Hydra would silently take one of them).
    """
    result: dict[str, Group] = {}
    for name, default in _choices_of(_primary(schema)).items():
        files: dict[str, Path] = {}
        for root in (CONF, *_user_directories(conf_dirs)):
            if not root.is_dir():
                raise UserError(str(root), "no such directory", f"correct {VARIABLE}")
            for path in sorted((root / name).glob("*.yaml")):
                if path.stem in files:
                    problem = f"{name}={path.stem} is also defined in {files[path.stem].parent}"
                    raise UserError(str(path), problem, "rename this file")
                files[path.stem] = path
        result[name] = Group(name, default, files)
    return result


def _user_directories(conf_dirs: Sequence[str | Path]) -> list[Path]:
    """Return the user's directories: `conf_dirs`, or those in FORESCALE_CONF if it is empty."""
    folders = conf_dirs or [d for d in os.environ.get(VARIABLE, "").split(os.pathsep) if d]
    return [Path(d).expanduser() for d in folders]


def _primary(schema: type[Job]) -> str:
    """Return the name of a verb's primary config: submit-eval for `submit eval`."""
    return schema.VERB.replace(" ", "-")


@cache
def _choices_of(primary: str) -> dict[str, str | None]:
    """Return group -> default choice of a config's defaults list, included configs first."""
    path = CONF / f"{primary}.yaml"
    entries = yaml.safe_load(path.read_text()).get("defaults", []) if path.exists() else []
    trees = [e if isinstance(e, dict) else _choices_of(e) for e in entries if e != "_self_"]
    return {group: choice for tree in trees for group, choice in tree.items()}


def _read(
    overrides: Iterable[str],
    known: dict[str, Group],
    schema: dict[str, Leaf],
    faults: list[Problem],
    flags: Iterable[str] = (),
) -> tuple[dict[str, str], dict[str, str], list[tuple[str, str]]]:
    """Return (group -> choice, key -> text of its value, earlier values of repeated sections).

    Of a repeated key the last value counts; those of a section or block are laid over each other.
    """
    picks: dict[str, str] = {}
    typed: dict[str, str] = {}
    earlier: list[tuple[str, str]] = []
    for text in overrides:
        name, equals, value = text.partition("=")
        where = text if text.strip() and text.isprintable() else repr(text)
        where = shortened(where, _LONGEST)
        name = name.removeprefix("+").removeprefix("+").strip()
        if text in ("-m", "--multirun"):
            faults.append(Problem(where, "one command trains one run", _STUDY))
        elif name.startswith("~"):
            todo = f"set another value, such as {name[1:]}=null"
            faults.append(Problem(where, "a key can't be removed", todo))
        elif not equals or not re.fullmatch(r"[^\W\d][\w-]*(\.[\w-]+)*", name):
            if name.startswith("--"):
                todo = f"did you mean {nearest_first(name, ['--help', '--json', *flags])[0]}?"
            else:
                todo = f"write, for example, {nearest_first(name, [*schema, *known])[0]}=VALUE"
            faults.append(Problem(where, "is not KEY=VALUE", todo))
        elif name not in known or value.startswith("{"):
            if name in typed and name not in schema:
                earlier.append((name, typed[name]))
            typed.pop(name, None)  # a repeated key takes the place of its last occurrence
            typed[name] = value
        elif value in known[name].files or (value == "null" and known[name].default is None):
            picks[name] = value
        elif re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)+", value):
            faults.append(Problem(name, f"got several choices, {value}", _STUDY))
        else:
            near = ", ".join(nearest_first(value, known[name].files))
            faults.append(
                Problem(name, f"{display(value)} is not a choice", f"choose one of {near}")
            )
    return picks, typed, earlier


def _hydra(
    schema: type[Job], picks: dict[str, str], conf_dirs: Sequence[str | Path]
) -> dict[str, Any]:
    """Return the conf tree with the chosen files, not yet resolved; empty if the verb has none."""
    primary = _primary(schema)
    if not (CONF / f"{primary}.yaml").exists():
        return {}
    chosen = tuple(f"{group}={choice}" for group, choice in picks.items())
    if directories := _user_directories(
        conf_dirs
    ):  # whose files may change while this process lives
        paths = ",".join(f'"file://{path.resolve()}"' for path in directories)
        return _tree(primary, (*chosen, f"hydra.searchpath=[{paths}]"))
    return deepcopy(_tree_of_ours(primary, chosen))


def _tree(primary: str, chosen: tuple[str, ...]) -> dict[str, Any]:
    """Return what Hydra composes. Raises UserError if a file can't be read."""
    try:
        with initialize_config_dir(str(CONF), job_name="forescale", version_base="1.3"):
            config = hydra_compose(primary, overrides=list(chosen))
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{mark.name}, line {mark.line + 1}" if mark else " ".join(chosen)
        problem = f"the config can't be composed ({' '.join(str(e).split())[:300]})"
        raise UserError(where, problem, "correct the file named there") from e
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=False))


_tree_of_ours = lru_cache(maxsize=128)(_tree)  # Hydra takes 80 ms, a copy less than one


def _lay_over(
    composed: dict[str, Any],
    typed: dict[str, str],
    earlier: list[tuple[str, str]],
    schema: type,
    known: dict[str, Leaf],
    faults: list[Problem],
    frozen: Mapping[str, Any],
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return `composed` with the values of the command line, its unknown keys, and those set."""
    free = [p for p, leaf in known.items() if get_origin(leaf.type) is dict]
    if _TARGET in typed or _TARGET in {*dict(flatten(composed, "")), *dict(flatten(frozen, ""))}:
        free.append("model")
    unknown: list[str] = []
    laid: list[str] = []
    values: dict[str, Any] = {}
    if len(lengths := [name for name in LENGTHS if typed.get(name, "null") != "null"]) == 1:
        for other in {*LENGTHS} - {*lengths}:  # giving one length unsets the others
            _nest(composed, other, None)
    for name, text in [*earlier, *typed.items()]:
        is_section = name not in known and any(path.startswith(name + ".") for path in known)
        if not (name in known or is_section or any(name.startswith(f + ".") for f in free)):
            unknown.append(name)
            continue
        try:
            value = _value(name, text, known.get(name))
            if "${" in text or isinstance(value, dict | list):
                OmegaConf.create({"value": value})  # raises an error for a reference without an end
            _nest(values, name, value)
            is_argument = "model" in free and name.startswith("model.")
            if is_section and not is_argument:
                below = lay(schema, {}, _nest({}, name, value))
                laid += [p for p, v in flatten(below, "") if v != {} or p in known]
            else:
                laid.append(name)
        except UserError as e:
            faults.append(Problem(e.where, e.problem, e.todo))
        except OmegaConfBaseException:
            faults.append(_no_reference(name, text))
    return lay(schema, lay(schema, {}, composed), values), unknown, laid


def _nest(tree: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """Set the value of a full path in a tree, and return it. A word with keys below its path is
    their kind, in any order."""
    *sections, name = path.split(".")
    above = tree
    for section in sections:
        below = above.get(section)
        if not isinstance(below, str | Mapping | None):
            return tree  # no section: it stays, and is refused
        above[section] = {"kind": below} if isinstance(below, str) else below or {}
        above = above[section]
    below = above.get(name)
    if isinstance(below, str) and isinstance(value, Mapping):
        below = {"kind": below}
    if isinstance(below, Mapping) and isinstance(value, str | Mapping):
        value = lay(None, below, {"kind": value} if isinstance(value, str) else value)
    above[name] = value
    return tree


def _value(name: str, text: str, leaf: Leaf | None) -> Any:
    """Return the value that `text` stands for.

    A key of type text takes it unchanged, so a prompt or a path needs no quotes for Hydra. Raises
    UserError if Hydra's grammar can't read it.
    """
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    alternatives = options(leaf.type) if leaf else ()
    wants_text = str in alternatives or (list[str] in alternatives and not text.startswith("["))
    if wants_text and not is_quoted:
        return None if text == "null" and type(None) in alternatives else text
    if list[str] in alternatives:  # 40_2, a task of an array of jobs, is no number
        text = re.sub(r"(?<=[\[,\s])(\d+(?:_\d+)+)(?=\s*[,\]])", r"'\1'", text)
    try:
        override = _parsed(f"x={text}")
        is_several = override.is_sweep_override()
        value = None if is_several else override.value()
        readable = isinstance(value, bool | int | float | str | list | dict | None)
    except (HydraException, ValueError, RecursionError):  # a number of 5,000 digits; "[" * 1000
        is_several = readable = False
    if wants_text and (is_several or not readable):
        return text  # the quotes at its ends are part of the text
    if is_several:
        raise UserError(name, f"got several values, {shortened(text, _LONGEST)}", _STUDY)
    if not readable and list[str] in alternatives and (items := _items(text)) is not None:
        return items
    if not readable:
        todo = "put it in '\"quotes\"'"
        if list[str] in alternatives:
            todo = f'write it as \'{name}=["FIRST","SECOND"]\''
        elif leaf:
            cls, attribute = leaf.source
            field = next(f for f in fields(cls) if f.name == attribute)
            todo = f"write, for example, {name}={example(leaf.type, field)}"
        raise UserError(name, f"{display(text)} can't be read as a value", todo)
    return value


def _items(text: str) -> list[str] | None:
    """Return the texts of a list whose items Hydra's grammar can't read, such as [--a=1,--b="x,y"];
    None if it is not one."""
    words = shlex.shlex(text[1:-1], posix=True)
    words.whitespace, words.whitespace_split, words.commenters = ",", True, ""
    try:
        items = [word.strip() for word in words]
    except ValueError:  # a quotation without an end
        return None
    return items if text[-1:] == "]" and not any("[" in item for item in items) else None


def _resolve(tree: Any, path: str, faults: list[Problem]) -> Any:
    """Return a tree of dicts, lists and scalars with its interpolations resolved."""
    if not any("${" in text or text == "???" for text in _texts(tree)):
        return tree  # so is nearly every job's, and OmegaConf's nodes cost more than all the rest
    return _resolve_node(OmegaConf.create(tree), path, faults)


def _resolve_node(node: Any, path: str, faults: list[Problem]) -> Any:
    if not isinstance(node, DictConfig | ListConfig):
        return node
    names: Any = node if isinstance(node, DictConfig) else range(len(node))
    raw: Any = OmegaConf.to_container(node, resolve=False)
    result: dict[Any, Any] = {}
    for name in names:
        here = f"{path}.{name}" if path else str(name)
        try:
            result[name] = _resolve_node(node[name], here, faults)
        except MissingMandatoryValue:
            faults.append(Problem(here, "is required", f"give {here}=VALUE"))
        except OmegaConfBaseException:
            faults.append(_no_reference(here, raw[name]))
    return result if isinstance(node, DictConfig) else list(result.values())


def _no_reference(name: str, text: str) -> Problem:
    problem = f"{text} refers to a key that doesn't exist"
    return Problem(name, problem, r"correct the reference, or write \${ for a literal ${")
