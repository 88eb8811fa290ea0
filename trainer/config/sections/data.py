"""Config section `data`: one dataset or a mixture, the order of its windows, and how it is read.

Invariant: keys that decide which window comes when are `identity`; keys for where the bytes are and
how they are read are `free`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from forescale.config.duration import Duration
from forescale.config.job import ProblemIterator
from forescale.config.schema import key
from forescale.config.suggest import nearest_first
from forescale.ground.storage import cache_directory

ONLY = "data"  # the name of a single source


@dataclass
class CorpusConfig:
    """Which dataset to read and where to cache it."""

    # dataset built by `forescale shards`: directory or URL; null: the embedded corpus
    path: str | None = key(None, common=True)
    # directory for prepared and downloaded data; null: $FORESCALE_CACHE or ~/.cache/forescale
    cache: str | None = None
    # maximum bytes of remote datasets in the cache
    cache_bytes: int = key(50_000_000_000, ge=1 << 24)

    @property
    def cache_directory(self) -> Path:
        """The cache directory, with its default filled in."""
        return cache_directory(self.cache)


@dataclass
class DataConfig(CorpusConfig):
    """The training data: datasets, mixture, order and reading."""

    # vocabulary of the embedded corpus: bpe (4,096 tokens) or bytes (for very small models)
    embedded: Literal["bpe", "bytes"] = key("bpe", kind="identity")
    # datasets of a mixture, instead of path: {NAME: PATH, NAME: PATH}
    sources: dict[str, Any] = key({})
    # relative shares in tokens, with any sum: {NAME: SHARE}; empty: proportional to size
    weights: dict[str, Any] = key({}, kind="identity")
    # changes of weights: [{from: 2e9 tokens, weights: {NAME: 1}}]
    stages: list[dict[str, Any]] = key([], kind="identity")
    max_epochs: dict[str, Any] = key({})  # maximum epochs per source: {NAME: EPOCHS}
    # number of shards whose windows are shuffled together
    shuffle_shards: int = key(8, kind="identity", ge=1)
    # restrict attention and positions to each document
    document_mask: bool = key(False, kind="identity")
    # windows: cut one long sequence, or an example a row; best_fit: whole documents, or examples,
    # side by side
    packing: Literal["windows", "best_fit"] = key("windows", kind="identity")
    # samples to skip: [[FIRST, END], ...], END not included
    skip: list[list] = key([], kind="identity")  # type: ignore[type-arg]
    # threads that prepare batches in advance; 0: no threads, read on demand
    workers: int = key(1, ge=0, le=64)
    # damaged data: fail, or substitute other windows and log it
    damaged: Literal["fail", "substitute"] = "fail"

    def problems(self) -> ProblemIterator:
        if self.sources and self.path:
            todo = "remove one of them, such as with data.path=null"
            yield "sources", "can't be combined with data.path", todo
        for name, path in self.sources.items():
            if not re.fullmatch(r"[\w-]+", str(name)):
                yield "sources", f"{name!r} isn't a valid name", "use letters, digits, _ and -"
            if not isinstance(path, str) or not path:
                yield f"sources.{name}", "names no dataset", f"write data.sources.{name}=DIR"
        yield from self._weights("weights", self.weights)
        yield from self._names("max_epochs", self.max_epochs)
        for name, limit in self.max_epochs.items():
            if not _is_number(limit) or limit <= 0:
                problem = f"{limit!r} isn't a positive number of epochs"
                yield f"max_epochs.{name}", problem, "write a number, such as 4"
        end = 0
        for pair in self.skip:
            whole = len(pair) == 2 and all(isinstance(n, int) and _is_number(n) for n in pair)
            if not whole or not end <= pair[0] < pair[1]:
                todo = "write [[FIRST, END], ...] as integers, ascending and not overlapping"
                yield "skip", f"{pair!r} isn't an interval after sample {end:,}", todo
                break
            end = pair[1]
        yield from self._stages()

    def stage_starts(self) -> list[Duration]:
        """Return when each of `stages` begins. Raises ValueError if one isn't a length."""
        return [Duration.parse(stage["from"]) for stage in self.stages]

    def order_problems(self, steps_of: Callable[[Duration], int | None]) -> ProblemIterator:
        """Yield a problem for each stage that isn't behind the one before. steps_of: converts a
        length to optimizer steps."""
        if any(self._stages()):
            return  # reported by `problems`
        starts = [steps_of(start) or 0 for start in self.stage_starts()]
        for i in range(1, len(starts)):
            if starts[i] <= starts[i - 1]:
                problem = f"{self.stages[i]['from']} is step {starts[i]:,}, but the previous stage "
                problem += f"begins at step {starts[i - 1]:,}"
                yield f"stages[{i}].from", problem, "choose a later start"

    def _stages(self) -> ProblemIterator:
        for i, stage in enumerate(self.stages):
            where = f"stages[{i}]"
            if not isinstance(stage, Mapping) or set(stage) != {"from", "weights"}:
                todo = "write it like {from: 2e9 tokens, weights: {NAME: 1}}"
                yield where, "is not a stage", todo
                return
            try:
                start = Duration.parse(stage["from"])
            except ValueError as e:
                yield f"{where}.from", str(e), "write it like from: 2e9 tokens"
            else:
                if start.unit not in ("steps", "tokens") or not start.amount:
                    todo = "give a positive number of steps or tokens since the start of training"
                    yield f"{where}.from", f"{start} isn't a fixed position", todo
            if not isinstance(stage["weights"], Mapping) or not stage["weights"]:
                yield f"{where}.weights", "aren't shares", "write it like weights: {NAME: 1}"
            else:
                yield from self._weights(f"{where}.weights", stage["weights"])

    def _weights(self, where: str, weights: Mapping[str, Any]) -> ProblemIterator:
        names = [*self._names(where, weights)]
        yield from names
        wrong = {n: w for n, w in weights.items() if not _is_number(w) or w < 0}
        for name, weight in wrong.items():
            yield f"{where}.{name}", f"{weight!r} isn't a share", "write a number of 0 or more"
        if names or wrong or not weights:
            return
        if not (total := sum(weights.values())):
            yield where, "are all 0", "give at least one source a positive share"
        for name, weight in weights.items():
            if total and 0 < weight / total < 1e-6:
                problem = f"{weight!r} is below a millionth of the total"
                yield f"{where}.{name}", problem, "increase it, or set it to 0"

    def _names(self, where: str, names: Mapping[str, Any]) -> ProblemIterator:
        for name in names:
            if name not in self.sources:
                near = nearest_first(str(name), self.sources)
                todo = f"data.sources has {', '.join(near)}" if near else "set data.sources"
                yield f"{where}.{name}", "isn't a source", todo


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
