"""From a command line to a job: Hydra composes the conf tree, untyped, and we judge the result.

Invariant: every fault of the overrides and of the composed tree is reported at once, as one
ConfigError in our words. Hydra picks the files of the groups; the typed values are read with its
grammar and laid over them here, since Hydra would stop at the first unknown key, suggest nothing,
and let `+new.key=` pass.
"""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_origin

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from forescale import conf
from forescale.config.frozen import Change, diff, freeze, may_resume, thaw
from forescale.config.job import Job
from forescale.config.schema import (
    ConfigError,
    Leaf,
    Problem,
    build,
    check,
    flatten,
    leaves,
    options,
    plain,
    unknown_key,
)
from forescale.config.suggest import nearest_first
from forescale.errors import UserError

__all__ = [
    "Change",
    "ConfigError",
    "Group",
    "compose",
    "diff",
    "freeze",
    "groups",
    "may_resume",
    "thaw",
]

CONF = Path(next(iter(conf.__path__))).resolve()
VARIABLE = "FORESCALE_CONF"  # of the environment: directories with files of the user's own
_TARGET = "model._target_"  # the class of a model of the user's own
_LENGTHS = ("train.steps", "train.tokens")
_STUDY = "one run takes one value; plan several runs as a study (forescale study)"
J = TypeVar("J", bound=Job)


@dataclass(frozen=True)
class Group:
    """A group of the conf tree: `name=CHOICE` lays that file over the section of its name."""

    name: str
    default: str | None
    files: dict[str, Path]


def compose(
    schema: type[J], overrides: Sequence[str] = (), conf_dirs: Sequence[str | Path] = ()
) -> J:
    """The job of this class that `key=value` overrides describe.

    `conf_dirs` are directories of the user's, with further files for the groups; those that the
    environment's FORESCALE_CONF names, unless others are given. Raises ConfigError
    with all problems; UserError for a directory that isn't there.
    """
    known = groups(schema, conf_dirs)
    faults: list[Problem] = []
    picks, typed = _read(overrides, known, leaves(schema), faults)
    if _TARGET in typed and "model" in known:
        picks.setdefault("model", "custom")  # not the keys of a model that the user didn't ask for
    config = _hydra(schema, picks, conf_dirs)
    unknown = _lay_over(config, typed, schema, faults)
    job, more, wrong = build(schema, _resolve(config, "", faults))
    faults += wrong
    paths = [*known, *leaves(schema)]
    unknowns = [unknown_key(path, paths, schema.VERB) for path in unknown + more]
    if problems := unknowns + faults + check(job, faults):
        raise ConfigError(problems)
    return job


def defaults(schema: type[Job]) -> dict[str, Any]:
    """The value of every key by its path, where nothing is typed."""
    job, _, _ = build(schema, _resolve(_hydra(schema, {}, ()), "", []))
    return dict(flatten(plain(job), ""))


def groups(schema: type[Job], conf_dirs: Sequence[str | Path] = ()) -> dict[str, Group]:
    """The groups that a verb's config has, with their files; raises UserError for a directory that
    is missing, or that names a choice which exists already (Hydra would silently pick one)."""
    found: dict[str, Group] = {}
    for name, default in _choices_of(schema.VERB):
        files: dict[str, Path] = {}
        for root in (CONF, *_own(conf_dirs)):
            if not root.is_dir():
                raise UserError(str(root), "no such directory", "check the path of your configs")
            for path in sorted((root / name).glob("*.yaml")):
                if path.stem in files:
                    what = f"{name}={path.stem} exists already in {files[path.stem].parent}"
                    raise UserError(str(path), what, "give the file another name")
                files[path.stem] = path
        found[name] = Group(name, default, files)
    return found


def _own(conf_dirs: Sequence[str | Path]) -> list[Path]:
    """The user's directories: those that are given, else those that FORESCALE_CONF names."""
    given = conf_dirs or [d for d in os.environ.get(VARIABLE, "").split(os.pathsep) if d]
    return [Path(d).expanduser() for d in given]


def _choices_of(primary: str) -> Iterator[tuple[str, str | None]]:
    """(group, default choice) of a config's defaults list, those of the configs that it takes in
    before its own."""
    path = CONF / f"{primary}.yaml"
    tree = yaml.safe_load(path.read_text()) if path.exists() else {}
    for entry in tree.get("defaults", []):
        if isinstance(entry, dict):
            yield from entry.items()
        elif entry != "_self_":
            yield from _choices_of(entry)


def _read(
    overrides: Iterable[str],
    known: dict[str, Group],
    schema: dict[str, Leaf],
    faults: list[Problem],
) -> tuple[dict[str, str], dict[str, str]]:
    """Overrides as (group -> choice, key -> text of its value); the last one of a key counts."""
    picks: dict[str, str] = {}
    typed: dict[str, str] = {}
    for text in overrides:
        name, equals, value = text.partition("=")
        said = text if text.strip() and text.isprintable() else repr(text)
        name = name.removeprefix("+").removeprefix("+").strip()
        if text in ("-m", "--multirun"):
            faults.append(Problem(said, "several runs at once are not a job", _STUDY))
        elif name.startswith("~"):
            todo = f"set it to another value, such as {name[1:]}=null"
            faults.append(Problem(said, "a key can't be taken out", todo))
        elif not equals or not re.fullmatch(r"[^\W\d][\w-]*(\.[\w-]+)*", name):
            near = nearest_first(name, [*schema, *known])[0]
            faults.append(Problem(said, "is not KEY=VALUE", f"write it like {near}=VALUE"))
        elif name not in known or value.startswith("{"):
            typed.pop(name, None)  # so that a repeated key takes its last place in the order
            typed[name] = value
        elif value in known[name].files or (value == "null" and known[name].default is None):
            picks[name] = value
        elif re.fullmatch(r"[\w.-]+(\s*,\s*[\w.-]+)+", value):
            faults.append(Problem(name, f"{value} is several choices", _STUDY))
        else:
            near = ", ".join(nearest_first(value, known[name].files))
            faults.append(Problem(name, f"no such choice, {value!r}", f"choose one of {near}"))
    return picks, typed


def _hydra(schema: type[Job], picks: dict[str, str], conf_dirs: Sequence[str | Path]) -> DictConfig:
    """The conf tree with the chosen files, not yet resolved; empty for a verb without one."""
    if not (CONF / f"{schema.VERB}.yaml").exists():
        return OmegaConf.create()
    chosen = [f"{group}={choice}" for group, choice in picks.items()]
    if own := _own(conf_dirs):
        paths = ",".join(f'"file://{path.resolve()}"' for path in own)
        chosen.append(f"hydra.searchpath=[{paths}]")
    try:
        with initialize_config_dir(str(CONF), job_name="forescale", version_base="1.3"):
            config = hydra_compose(schema.VERB, overrides=chosen)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{mark.name}, line {mark.line + 1}" if mark else " ".join(chosen)
        what = f"can't be composed ({' '.join(str(e).split())[:300]})"
        raise UserError(where, what, "mend the file that it names") from e
    OmegaConf.set_struct(config, False)
    return config


def _lay_over(
    config: DictConfig, typed: dict[str, str], schema: type, faults: list[Problem]
) -> list[str]:
    """Set the typed values in `config`; returns the unknown keys among them."""
    known = leaves(schema)
    free = [p for p, leaf in known.items() if get_origin(leaf.type) is dict]
    composed: Any = OmegaConf.to_container(config, resolve=False)
    if _TARGET in typed or _TARGET in dict(flatten(composed, "")):
        free.append("model")
    unknown: list[str] = []
    if len(given := [name for name in _LENGTHS if typed.get(name, "null") != "null"]) == 1:
        (other,) = set(_LENGTHS) - set(given)
        OmegaConf.update(config, other, None, force_add=True)  # typing one length unsets the other
    for name, text in typed.items():
        is_section = any(path.startswith(name + ".") for path in known)
        if not (name in known or is_section or any(name.startswith(f + ".") for f in free)):
            unknown.append(name)
            continue
        try:
            value = _value(name, text, known[name].type if name in known else None)
            OmegaConf.update(config, name, value, merge=True, force_add=True)
        except UserError as e:
            faults.append(Problem(e.where, e.what, e.todo))
        except OmegaConfBaseException:
            faults.append(_no_reference(name, text))
    return unknown


def _value(name: str, text: str, type_: Any) -> Any:
    """The value that a user typed. Where text is wanted it is taken as it stands, so that a prompt
    or a path needs no quotes of Hydra's; raises UserError for what its grammar doesn't know."""
    is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    alternatives = options(type_)
    wants_text = str in alternatives or (list[str] in alternatives and not text.startswith("["))
    if wants_text and not is_quoted:
        return None if text == "null" and type(None) in alternatives else text
    try:
        override = OverridesParser.create().parse_override(f"x={text}")
        is_several = override.is_sweep_override()
        value = None if is_several else override.value()
        readable = isinstance(value, bool | int | float | str | list | dict | None)
    except HydraException:
        is_several = readable = False
    if wants_text and (is_several or not readable):
        return text  # it only happens to begin and end with a quote
    if is_several:
        raise UserError(name, f"{text} is several values", _STUDY)
    if not readable:
        raise UserError(name, f"{text!r} can't be read as a value", "put it in '\"quotes\"'")
    return value


def _resolve(node: Any, path: str, faults: list[Problem]) -> Any:
    """Plain mappings, lists and values, without interpolations; what has no value is left out."""
    if not isinstance(node, DictConfig | ListConfig):
        return node
    names: Any = node if isinstance(node, DictConfig) else range(len(node))
    raw: Any = OmegaConf.to_container(node, resolve=False)
    made: dict[Any, Any] = {}
    for name in names:
        here = f"{path}.{name}" if path else str(name)
        try:
            made[name] = _resolve(node[name], here, faults)
        except MissingMandatoryValue:
            faults.append(Problem(here, "needs a value", f"give {here}=VALUE"))
        except OmegaConfBaseException:
            faults.append(_no_reference(here, raw[name]))
    return made if isinstance(node, DictConfig) else list(made.values())


def _no_reference(name: str, text: str) -> Problem:
    return Problem(name, f"{text} refers to nothing", r"mend it, or write \${ for the text ${")


def overrides_of(schema: type[Job], words: Sequence[str]) -> list[str]:
    """The words after a verb as overrides: those without `=` name the verb's target."""
    target, verb = schema.TARGET, schema.VERB
    bare = [w for w in words if "=" not in w and not w.startswith(("-", "~", "+"))]
    rest = [w for w in words if w not in bare]
    if not bare:
        return rest
    if not target:
        raise UserError(" ".join(bare), f"{verb} takes no name", f"see forescale {verb} --help")
    if target == "input":
        quoted = ",".join(_quoted(word) for word in bare)
        return [f"input=[{quoted}]", *rest]
    if len(bare) > 1:
        todo = f"give one; other words are key=value (see forescale {verb} --help)"
        raise UserError(" ".join(bare), f"{verb} takes one name, not {len(bare)}", todo)
    if target == "run.name" and "/" in bare[0]:
        root, _, name = bare[0].rstrip("/").rpartition("/")
        return [f"run.root={_quoted(root or '/')}", f"run.name={_quoted(name)}", *rest]
    return [f"{target}={_quoted(bare[0])}", *rest]


def _quoted(text: str) -> str:
    """Text as Hydra's grammar reads it back unchanged."""
    # A backslash is itself there, but before a quote.
    escaped = re.sub(r"(\\+)(?='|$)", r"\1\1", text).replace("'", "\\'")
    return f"'{escaped}'"
