"""A job as text and back, and what differs between two jobs: what a run's config.yaml stands on.

Invariant: `thaw(type(job), freeze(job)) == job`, and nothing else is needed to read a frozen job
again: no Hydra, no conf tree, no environment.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import yaml

from forescale.config.job import Job
from forescale.config.schema import (
    ConfigError,
    Kind,
    Problem,
    TargetConfig,
    build,
    check,
    flatten,
    leaves,
    plain,
    shown,
    unknown_key,
)
from forescale.config.train import TrainJob
from forescale.errors import UserError

J = TypeVar("J", bound=Job)


class Change(NamedTuple):
    """A key that differs between two configs; None stands for null and for absent."""

    key: str
    old: Any
    new: Any
    kind: Kind

    def __str__(self) -> str:
        return f"{self.key}: {shown(self.old)} -> {shown(self.new)}"


def freeze(job: Any) -> str:
    """A job as YAML: every key, in the order of the schema."""
    return yaml.safe_dump(plain(job), sort_keys=False, allow_unicode=True, width=1 << 16)


def thaw(schema: type[J], source: str | Path, trust: bool = False) -> J:
    """The job that `freeze` wrote; `source` is its text, or the Path of a file.

    Raises UserError for a file that can't be read, for a `_target_` without `trust` (it names code
    to run, and a stored file is no command of the user's), and for keys or values that are wrong.
    """
    where = str(source) if isinstance(source, Path) else "config"
    tree = _read_yaml(source, where)
    job, unknown, wrong = build(schema, tree)
    for f in fields(job):
        section = getattr(job, f.name)
        if isinstance(section, TargetConfig) and not trust:
            what = f"{f.name}._target_ names code to run, {section.target}"
            raise UserError(where, what, "give trust=true if you trust the file")
    found = (
        [unknown_key(p, leaves(schema), schema.VERB) for p in unknown] + wrong + check(job, wrong)
    )
    if found:
        raise ConfigError(Problem(f"{where}: {p.key}", p.what, p.todo) for p in found)
    return job


def _read_yaml(source: str | Path, where: str) -> dict:
    try:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        tree = yaml.safe_load(text)
    except FileNotFoundError:
        raise UserError(where, "no such file", "check the path") from None
    except OSError as e:
        raise UserError(where, f"can't be read ({e.strerror})", "check the path") from e
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(where, "is damaged: not YAML", "restore the file") from e
    if not isinstance(tree, dict) or not all(isinstance(name, str) for name in tree):
        raise UserError(where, "is damaged: it has no sections", "restore the file")
    return tree


def diff(old: Any, new: Any) -> list[Change]:
    """The keys in which two jobs of a verb differ, in the order of the schema."""
    schema: Any = type(new)
    kinds = leaves(schema)

    def kind_of(path: str) -> Kind:
        while path and path not in kinds:
            path = path.rpartition(".")[0]
        return kinds[path].kind if path else "identity"  # a target's arguments: all of a model

    before, after = dict(flatten(plain(old), "")), dict(flatten(plain(new), ""))
    return [
        Change(path, before.get(path), after.get(path), kind_of(path))
        for path in dict.fromkeys([*after, *before])
        if before.get(path) != after.get(path)
    ]


def may_resume(
    old: TrainJob, new: TrainJob, at_step: int
) -> tuple[list[Change], list[Change], list[Change]]:
    """What a changed config means for a run that has made `at_step` steps.

    Returns (refusals, numerics, free): identity keys that would change the trajectory behind or
    before us; keys that cost the last bits from here on; and the rest. The length of the run may
    grow while no step that was made would have had another learning rate.
    """
    changes = diff(old, new)
    free_lengths = ("train.steps", "train.tokens") if _grows(old, new, at_step) else ()
    refusals = [c for c in changes if c.kind == "identity" and c.key not in free_lengths]
    numerics = [c for c in changes if c.kind == "numerics"]
    return refusals, numerics, [c for c in changes if c not in refusals + numerics]


def _grows(old: TrainJob, new: TrainJob, at_step: int) -> bool:
    """Whether `new` is only longer: same warm-up, and neither has begun to decay."""

    def decay_begins(job: TrainJob) -> int:
        decay = job.schedule.decay
        return job.total_steps - (job.steps_of(decay) or 0 if decay else 0)

    return (
        old.schedule == new.schedule
        and new.schedule.kind in ("wsd", "constant")
        and new.total_steps >= old.total_steps
        and old.steps_of(old.schedule.warmup) == new.steps_of(new.schedule.warmup)
        and at_step <= min(decay_begins(old), decay_begins(new))
    )
