"""The embedded corpus: Python source code that every installation has.

Invariant: names are relative to their package and the order is fixed, so that equal versions give
an equal corpus, wherever they are installed. Only `excluded` decides which files are left out, and
each is reported.

Training text are the interpreter's library and two packages, without their tests: about 47 MB. The
other packages that every installation has add variety, which doesn't make the text easier: given 8
MB of the training text, xz needs 16 % less on the library and torch, and 13 % less with sympy,
networkx, numpy, deepspeed and accelerate added.

Held out are three other projects, whole: 1 MB. Files of one project repeat each other: where a
fiftieth of the files was held out, 4 % of the held-out tokens lay in 50-grams that training had
too. A file of the training text that shares 13 words with held-out text is left out (the rule of
GPT-3: curate/steps/decontaminate.py), which near-duplicates and vendored files do. Near-duplicates
inside of the training text stay: they tell nothing of the held-out text, and MinHash needs Daft.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from forescale.data.curate.step import Draft
from forescale.data.curate.steps.decontaminate import Decontaminate
from forescale.data.prepare.builder import BuildConfig, build_dataset
from forescale.data.prepare.pool import available
from forescale.data.text.documents import Document, Intake, ReadingReport, Unit
from forescale.ground.console import Progress, silent
from forescale.ground.errors import UserError
from forescale.ground.storage import cache_directory

PACKAGES = ("torch", "networkx")
HELD_OUT = ("jinja2", "requests", "starlette")  # named alike as a package and as a distribution
RECIPE = 3  # increase it whenever a rule below changes: caches of other recipes are not reused
# validation: of the files, where no project of HELD_OUT is installed
EMBEDDED = BuildConfig(vocab_size=4096, validation=0.02, shard_tokens=1 << 22)

VOCABULARY = {"bpe": EMBEDDED.vocab_size, "bytes": 257}  # entries by kind of tokenizer

_FOLDERS = {"test", "tests", "testing", "idle_test", "_testing", "site-packages", "dist-packages"}
# Written by the build or by the distribution: they differ between installations of one version.
_STAMPED = {"version.py", "_version.py", "__config__.py", "sitecustomize.py"}
_MARK = re.compile(rb"do not (edit|modify)|auto-?generated|@generated|gencodec", re.IGNORECASE)
_UNIT = 4_000_000  # bytes per unit of work
_LARGEST = 200_000  # bytes: one file is never more than about a fifth of the held-out text
# The rules take longer than reading, and each phase of a build gets a new copy of the source.
_VERDICTS: dict[tuple[str, ...], str | None] = {}
_DIGITS = bytes(b for b in range(256) if b not in b"0123456789")


def excluded(text: bytes) -> str | None:
    """Return the first rule by which a file isn't source code written by a person, or None."""
    if len(text) > _LARGEST:
        return f"over {_LARGEST:,} bytes"
    if _MARK.search(text[:1000]):
        return "generated, as its head says"
    if any(len(line) > 1000 for line in text.split(b"\n")):
        return "table: a line over 1,000 bytes"
    if len(text) > 2000 and len(text.translate(None, _DIGITS)) > 0.10 * len(text):
        return "table: over 10 % digits"
    if len(text) > 4000 and len(zlib.compress(text, 6)) < 0.10 * len(text):
        return "table: zlib leaves under 10 %"
    return None


class PythonSource:
    """The embedded corpus as a DocumentSource; names are like "torch/nn/modules/linear.py"."""

    def __init__(self, roots: dict[str, Path] | None = None):
        """roots: maps the name of a project to its folder; default: installed_roots()."""
        self._missing: list[str] = []
        self._roots = installed_roots(self._missing) if roots is None else roots
        self.sources = [*self._roots]
        self.files: list[tuple[str, Path]] = []
        for label, root in self._roots.items():
            paths = []
            for folder, subfolders, files in os.walk(root):
                subfolders[:] = [
                    name
                    for name in subfolders
                    if name not in _FOLDERS and not name.startswith((".", "config-"))
                ]
                for name in files:
                    is_source = name.endswith(".py") and name not in _STAMPED
                    if is_source and not name.startswith(("_sysconfigdata", "test_")):
                        path = Path(folder, name)
                        paths.append((f"{label}/{path.relative_to(root).as_posix()}", path))
            self.files += sorted(paths)
        self.held_out = {name.split("/")[0] for name, _ in self.files}.intersection(HELD_OUT)
        folders = [str(self._roots[project]) for project in sorted(self.held_out)]
        self._held_out_text = Decontaminate(folders)
        if not self.files:
            problem = "this installation contains no Python source code"
            raise UserError("the embedded corpus", problem, "give your own corpus with data.path")

    def state(self) -> Iterator[tuple[str, int, int]]:
        """Yield name, size and modification time in nanoseconds of every file."""
        for name, path in self.files:
            facts = path.stat()
            yield name, facts.st_size, facts.st_mtime_ns

    def describe(self) -> dict[str, Any]:
        # The local part of a version (+cpu, +cu128) names a build of the same Python source.
        versions = {}
        for name in self._roots:
            try:
                versions[name] = importlib.metadata.version(name).split("+")[0]
            except importlib.metadata.PackageNotFoundError:
                versions[name] = platform.python_version()
        return {"kind": "embedded", "recipe": RECIPE, "packages": versions}

    def units(self) -> list[Unit]:
        """Return consecutive files of a project, grouped to some megabytes."""
        units: list[Unit] = []
        first = size = 0
        projects = [name.split("/")[0] for name, _ in self.files]
        following = [*projects[1:], ""]
        for index, (_, path) in enumerate(self.files):
            size += path.stat().st_size
            if size >= _UNIT or following[index] != projects[index]:
                label = f"{self.files[first][0]} and {index - first} more"
                source = self.sources.index(projects[index])
                units.append(Unit(label, size, source, first, index + 1))
                first, size = index + 1, 0
        return units

    def read(self, unit: Unit, report: ReadingReport) -> Iterator[Document]:
        """Yield the documents of a unit; excluded files are added to the report."""
        if unit.first == 0:
            for name in self._missing:
                report.add("package not installed", name)
        for name, path in self.files[unit.first : unit.last]:
            text = path.read_bytes()
            key = (name, xxhash.xxh3_128_hexdigest(text), *self._held_out_text.files)
            if key not in _VERDICTS:
                _VERDICTS[key] = excluded(text) or self._leaks(name, text)
            if reason := _VERDICTS[key]:
                report.add(reason, name)
            else:
                yield from Intake(report).documents(name, text)

    def _leaks(self, name: str, text: bytes) -> str | None:
        """Return the reason to leave out a file of the training text that shares words with
        held-out text, or None."""
        step = self._held_out_text
        if not self.held_out or name.split("/")[0] in self.held_out:
            return None
        shares = step(Draft(name, text.decode("utf-8", "replace")))
        return shares and f"shares {step.words} words with held-out text"


def installed_roots(missing: list[str]) -> dict[str, Path]:
    """Return the folders of the standard library, PACKAGES and HELD_OUT; add those that aren't
    installed to `missing`."""
    roots = {"python": Path(sysconfig.get_path("stdlib"))}
    for name in (*PACKAGES, *HELD_OUT):
        spec = importlib.util.find_spec(name)  # finds a top-level package without importing it
        if spec is None or not spec.submodule_search_locations:
            missing.append(name)
        else:
            roots[name] = Path(next(iter(spec.submodule_search_locations)))
    return roots


def prepare_embedded(
    cache: str | Path | None = None, progress: Progress = silent, tokens: str = "bpe"
) -> Path:
    """Return the dataset of the embedded corpus; the first call builds it in the cache.

    tokens: one of VOCABULARY.
    """
    source = PythonSource()
    path = embedded_path(source, cache, tokens)
    config = replace(EMBEDDED, tokenizer=tokens)
    return build_dataset(
        source, path, config, progress, available(), held_out=sorted(source.held_out)
    )


def embedded_path(
    source: PythonSource, cache: str | Path | None = None, tokens: str = "bpe"
) -> Path:
    """Return the path of the embedded corpus in the cache, whether it is built or not.

    The directory's name contains a hash of the recipe, the versions, and every file's name and
    size, so that an upgrade, or another installation that shares the cache, makes a new one.
    """
    sizes = [(name, path.stat().st_size) for name, path in source.files]
    config = replace(EMBEDDED, tokenizer=tokens).describe()
    text = json.dumps([source.describe(), config, sizes], sort_keys=True)
    kind = "python" if tokens == "bpe" else f"python-{tokens}"
    return cache_directory(cache) / f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"
