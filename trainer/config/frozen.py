"""Jobs as YAML text, such as a run's config.yaml, and the differences between two jobs.

Invariant: `thaw(type(job), freeze(job)) == job`, and reading a frozen job needs nothing else: no
Hydra, no conf tree, no environment variables. Anybody may have written the file: whatever its bytes
are, reading it takes memory and time in proportion to them, or ends with a UserError.
"""

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from forescale.config.job import Job
from forescale.config.schema import (
    ConfigError,
    Kind,
    Leaf,
    Problem,
    check,
    display,
    flatten,
    leaves,
    plain,
    unknown_key,
)
from forescale.config.sections.ramp import length_ramp
from forescale.config.target import targets
from forescale.config.train import TrainJob
from forescale.config.tree import build
from forescale.ground.errors import UserError
from forescale.ground.foreign import read_bytes

_FIRST_LINE = re.compile(rb"# sha256: ([0-9a-f]{64})")
_DEEPEST = 100  # levels; our own files have fewer than ten
# Characters that libyaml takes where PyYAML doesn't: tabs, ? in plain scalars, byte order marks.
_ODD = re.compile(r"[^\n\r ->@-~\u00a0-\ud7ff\ue000-\ufefe\uff00-\ufffd\U00010000-\U0010ffff]")
_MOST_NODES = 200_000  # of a file with every anchor written out; our own have some hundred
J = TypeVar("J", bound=Job)


class Change(NamedTuple):
    """A key that differs between two configs; None means null or absent."""

    key: str
    old: Any
    new: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.key}: {display(self.old)} -> {display(self.new)}"


def freeze(job: Any) -> str:
    """Return a job as YAML: every key, in the order of the schema."""
    return yaml.safe_dump(plain(job), sort_keys=False, allow_unicode=True, width=1 << 16)


def frozen_file(job: Any) -> bytes:
    """Return the content of a job's file: the sha256 of the rest in the first line, then the job as
    YAML. `thaw` verifies it. One file holds both, so one rename replaces both."""
    text = freeze(job).encode()
    return b"# sha256: %s\n%s" % (hashlib.sha256(text).hexdigest().encode(), text)


def has_checksum(path: Path) -> bool:
    """Return True if the first line of a readable file is a checksum of the rest."""
    return _FIRST_LINE.match(read_bytes(path)) is not None


def thaw(schema: type[J], source: str | Path, trust: bool = False) -> J:
    """Return the job that `freeze` wrote. source: its text, or the Path of its file.

    Raises UserError if the file can't be read or differs from its checksum, if another version
    wrote it or keys or values are wrong, or if it has a `_target_` and `trust` is False: that names
    code to run, which the user did not type.
    """
    where = str(source) if isinstance(source, Path) else "config"
    tree = _read_yaml(source, where)
    job, unknown, wrong = build(schema, tree)
    if unknown and isinstance(source, Path) and has_checksum(source):  # nobody has edited it
        rest = f" and {len(unknown) - 1} others" if len(unknown) > 1 else ""
        problem = f"another version of forescale wrote it: this one has no key {unknown[0]}{rest}"
        raise UserError(where, problem, "use the version that run.json names, or begin a new run")
    for key, target in targets(job).items() if not trust else ():
        problem = f"{key} would run the class {target}"
        raise UserError(where, problem, "add trust=true if you trust this file")
    problems = (
        [unknown_key(p, leaves(schema), schema.VERB) for p in unknown] + wrong + check(job, wrong)
    )
    if problems:
        raise ConfigError(Problem(f"{where}: {p.key}", p.problem, p.todo) for p in problems)
    return job


def _read_yaml(source: str | Path, where: str) -> dict[str, Any]:
    raw = read_bytes(source) if isinstance(source, Path) else source.encode()
    if line := _FIRST_LINE.match(raw):  # a checksum
        end, text = raw[line.end() : line.end() + 1], raw[line.end() + 1 :]
        if end != b"\n" or hashlib.sha256(text).hexdigest().encode() != line[1]:
            problem = "was changed since it was written (its checksum differs)"
            todo = "restore it from a copy; or, if you changed it on purpose, remove its first line"
            raise UserError(where, problem, todo)
    tree = read_yaml(raw, where)
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise UserError(where, "has no sections", "restore the file")
    return tree


def diff(old: Any, new: Any) -> list[Change]:
    """Return the keys in which two jobs of a verb differ, in the order of the schema."""
    kinds = leaves(type(new))
    before, after = dict(flatten(plain(old), "")), dict(flatten(plain(new), ""))
    return [
        Change(path, before.get(path), after.get(path), _kind_of(path, kinds))
        for path in dict.fromkeys([*after, *before])
        if before.get(path) != after.get(path)
    ]


def decisive(job: TrainJob) -> dict[str, Any]:
    """Return the keys of a training job that decide what it computes, with their values."""
    kinds = leaves(TrainJob)
    keys = flatten(plain(job.training), "")
    return {path: value for path, value in keys if _kind_of(path, kinds) != "free"}


def _kind_of(path: str, kinds: Mapping[str, Leaf]) -> Kind:
    while path and path not in kinds:
        path = path.rpartition(".")[0]
    return kinds[path].kind if path else "identity"  # an argument of the user's own model


def may_resume(
    old: TrainJob, new: TrainJob, at_step: int
) -> tuple[list[Change], list[Change], list[Change]]:
    """Return the changes of a run's config after `at_step` steps, as (refused, numerics, free).

    Refused are identity keys, which would change the trajectory. Numerics keys change the last bits
    from this step on. Free keys change nothing. A run may become longer if no completed step would
    have had another learning rate, or another batch.
    """
    changes = diff(old, new)
    # Only longer: the same warm-up and ramps, no decay has begun, and the weight decay doesn't
    # depend on the length.
    grows = (
        old.schedule == new.schedule
        and new.schedule.may_grow
        and new.optimizer.final_weight_decay == 1
        and new.total_steps >= old.total_steps
        and old.warmup_steps == new.warmup_steps
        and old.batch_ramp == new.batch_ramp
        and length_ramp(old) == length_ramp(new)
        and at_step <= min(old.decay_begins, new.decay_begins)
    )
    lengths = ("train.steps", "train.tokens", "train.batch_ramp") if grows else ()
    refusals = [c for c in changes if c.kind == "identity" and c.key not in lengths]
    numerics = [c for c in changes if c.kind == "numerics"]
    return refusals, numerics, [c for c in changes if c not in refusals + numerics]


def _composed(text: str) -> tuple[Any, yaml.Node | None]:
    """Return the loader and the root of a YAML text. Raises RecursionError if it is nested too
    deeply, YAMLError if it isn't YAML.

    libyaml takes a tenth of the time, but recurses in C without a bound: its events, which don't
    recurse, are looked at first. A text that it refuses, or of which it has another opinion than
    PyYAML, is left to PyYAML.
    """
    if yaml.__with_libyaml__ and not _ODD.search(text):
        with suppress(yaml.YAMLError):
            if _depth(text) < _DEEPEST:
                loader = yaml.CSafeLoader(text)
                return loader, loader.get_single_node()
    loader = _Loader(text)
    return loader, loader.get_single_node()


def _depth(text: str) -> int:
    """Return the number of levels of a YAML text, or _DEEPEST if there are as many or more."""
    depth = deepest = 0
    for event in yaml.parse(text, yaml.CSafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        deepest = max(deepest, depth)
        if deepest == _DEEPEST:
            break
        depth -= isinstance(event, yaml.CollectionEndEvent)
    return deepest


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise RecursionError
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_yaml(raw: bytes, where: str) -> Any:
    """Return the content of a YAML file. Raises UserError if it isn't YAML, is nested too deeply,
    or too large with its anchors written out."""
    todo = "restore the file"
    try:
        loader, node = _composed(raw.decode())
        if node is None:
            return None
        if _size(node, {}) > _MOST_NODES:
            raise UserError(where, "is too large with its anchors written out", todo)
        return loader.construct_document(node)
    except RecursionError:
        raise UserError(where, "is nested too deeply", todo) from None
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{where}{line}", "is not valid YAML", todo) from e
    except (UnicodeDecodeError, ValueError, OverflowError) as e:  # such as the date 2026-99-99
        raise UserError(where, "is not valid YAML", todo) from e


def _size(node: yaml.Node, sizes: dict[int, int]) -> int:
    """Return the number of nodes below one, each as often as an alias names it; sizes: those that
    are known, by id."""
    if id(node) in sizes:
        return sizes[id(node)]
    sizes[id(node)] = _MOST_NODES + 1  # one that contains itself has no end
    total = 1
    if isinstance(node, yaml.SequenceNode):
        total += sum(_size(inner, sizes) for inner in node.value)
    elif isinstance(node, yaml.MappingNode):
        total += sum(_size(k, sizes) + _size(v, sizes) for k, v in node.value)
    sizes[id(node)] = total
    return total
