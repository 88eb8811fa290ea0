"""Certificates of rehearsals: of which job, on which GPUs, with which versions; what they showed.

Invariant: a certificate is about the keys that decide what a job computes, and never about a run's
name. It is a file of the user's own cache, which may be gone at any time; one that can't be read
counts as none, and a sentence says so.
"""

import hashlib
import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from forescale.config.frozen import decisive
from forescale.config.schema import display
from forescale.config.target import find_package, targets
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.ground.storage import cache_directory, make_folder, read_typed, write_checked_json
from forescale.ground.typed import Count, Flag, Moment

_PACKAGES = ("forescale", "torch", "deepspeed", "accelerate", "triton")
_MOST_CHANGES = 3  # keys that differ; with more it is another job
_FOLDER = "rehearsal/certificates"  # in the cache
_MOST_READ = 32  # certificates that are compared, of the newest


@dataclass(frozen=True)
class Certificate:
    """A rehearsal without problems. keys: of the job; gpus: what it was rehearsed for; versions: of
    packages, and the hashes of files of the user's own classes; peak_bytes, planned_bytes: the most
    of a rank, and what the plan says of that rank; waits, launches: the most of a rank in a step;
    kernels: that were assembled; limits: what only a GPU shows."""

    time: Moment
    keys: dict[str, Any]
    gpus: dict[str, Any]
    versions: dict[str, str]
    ranks: list[Count]
    peak_bytes: Count
    planned_bytes: Count
    waits: Count
    launches: Count
    equal_collectives: Flag
    kernels: Count
    limits: str

    def write(self) -> Path:
        """Write the certificate into the cache; return its path. Raises OSError or UserError."""
        path = cache_directory() / _FOLDER / _name(self.keys, self.gpus)
        make_folder(path.parent)
        write_checked_json(path, asdict(self))
        return path

    def __str__(self) -> str:
        at = f"{self.gpus['plan.gpus']:,} {self.gpus['machine.name']}"
        collectives = "as planned" if self.equal_collectives else "not as planned"
        kernels = f", {self.kernels} kernels assembled" if self.kernels else ""
        ranks = ", ".join(map(str, self.ranks))
        return (
            f"Rehearsed at {moment(self.time)} on {at}: peak {self.peak_bytes / 2**30:.1f} GiB, "
            f"{self.waits} wait{'s' * (self.waits != 1)} a step, collectives {collectives}{kernels}"
            f" (rank {ranks})."
        )


def keys_of(job: TrainJob) -> dict[str, Any]:
    """Return the keys of a job that decide its rehearsal, as JSON has them."""
    keys: dict[str, Any] = json.loads(json.dumps(decisive(job), default=str))
    return keys


def versions_of(job: TrainJob, code: bool = True) -> dict[str, str]:
    """Return the versions of packages here; code: and the hashes of the files of a job's own
    classes, whose packages are imported."""
    classes = targets(job).values() if code else ()
    versions = {name: "absent" for name in (*_PACKAGES, *classes)}
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    for target in classes:
        with suppress(ImportError, OSError, ValueError):
            spec = find_package(target.rpartition(".")[0])
            content = Path(str(spec and spec.origin)).read_bytes()
            versions[target] = hashlib.sha256(content).hexdigest()[:12]
    return versions


def about(
    job: TrainJob, gpus: Mapping[str, Any] | None, code: bool = True
) -> tuple[list[str], bool]:
    """Return sentences on the rehearsal of a job, and whether there was one that still holds. The
    last sentence says what it showed, or why it is stale; none if no such job was rehearsed.

    gpus: what it is for; None: for any, the newest. code: see versions_of.
    """
    certificate, changes, sentences = nearest(job, gpus, code)
    if certificate is None:
        return sentences, False
    stale = f"The rehearsal at {moment(certificate.time)} is stale: {'; '.join(changes)}."
    return [*sentences, stale if changes else str(certificate)], not changes


def nearest(
    job: TrainJob, gpus: Mapping[str, Any] | None, code: bool = True
) -> tuple[Certificate | None, list[str], list[str]]:
    """Return the certificate of a job that differs least from it, the changes that make it stale,
    and sentences on files that are none. gpus, code: see about."""
    keys, sentences = keys_of(job), list[str]()
    rated = list[tuple[int, float, Certificate, list[str]]]()
    try:
        folder = cache_directory() / _FOLDER
        paths = [*folder.glob(_name(keys, gpus))]
        paths = paths or sorted(folder.glob("*.json"), key=os.path.getmtime)[-_MOST_READ:]
    except (OSError, RuntimeError):  # one is deleted meanwhile; a user without a home directory
        return None, [], []
    for path in paths:
        try:
            each = read_typed(Certificate, path)
        except UserError as e:
            problem = f"{path} is no certificate of a rehearsal: {e.problem}"
            sentences = [f"{problem}; delete it, or its folder."]  # another version writes many
            continue
        old = {**each.keys, **(each.gpus if gpus else {})}
        changes = _changes(old, {**keys, **(gpus or {})})
        if len(changes) <= _MOST_CHANGES:
            rated.append((len(changes), -each.time, each, changes))
    if not rated:
        return None, [], sentences
    *_, certificate, changes = min(rated, key=lambda each: each[:2])
    versions = versions_of(job, code)
    changes += _changes({n: certificate.versions.get(n) for n in versions}, versions)
    return certificate, changes, sentences


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    return [
        f"{name} {display(old.get(name))} -> {display(new.get(name))}"
        for name in dict.fromkeys([*new, *old])
        if old.get(name) != new.get(name)
    ]


def _name(keys: Mapping[str, Any], gpus: Mapping[str, Any] | None) -> str:
    """Return the name of a certificate; without GPUs, a pattern of those for any."""
    return f"{_digest(keys)}-{_digest(gpus) if gpus else '*'}.json"


def _digest(keys: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:16]


def moment(seconds: float) -> str:
    """Return a moment, in seconds since the epoch, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))
