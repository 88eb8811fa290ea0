"""What a job reads: one dataset or a mixture of several, in which order, by whom.

Invariant: keys that decide which window comes when are identity; where the bytes lie, and who
reads them, is free.
"""

# ruff: noqa: RUF009 (key and section make fields, as dataclasses.field does)

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from forescale.config.duration import Duration
from forescale.config.schema import key
from forescale.config.suggest import nearest_first

Problems = list[tuple[str, str, str]]
ONLY = "data"  # the name of a source that is alone


@dataclass
class CorpusConfig:
    path: str | None = key(
        None, "a dataset built by `shards`, a directory or a URL; null: the embedded corpus"
    )
    cache: str | None = key(
        None, "directory of what is prepared or fetched; null: $FORESCALE_CACHE, ~/.cache/forescale"
    )
    cache_bytes: int = key(50_000_000_000, "most that is kept of remote datasets", ge=1 << 24)

    @property
    def cache_directory(self) -> Path:
        chosen = self.cache or os.environ.get("FORESCALE_CACHE") or "~/.cache/forescale"
        return Path(chosen).expanduser()


@dataclass
class DataConfig(CorpusConfig):
    embedded: Literal["bpe", "bytes"] = key(
        "bpe",
        "what the embedded corpus is cut into: 4,096 tokens, or bytes (for very small models)",
        kind="identity",
    )
    sources: dict[str, Any] = key({}, "a mixture instead of a path: {NAME: PATH, NAME: PATH}")
    weights: dict[str, Any] = key(
        {}, "{NAME: share in tokens}, of any sum; empty: by their sizes", kind="identity"
    )
    stages: list[dict] = key(
        [], "later weights: [{from: 2e9 tokens, weights: {NAME: 1}}]", kind="identity"
    )
    max_epochs: dict[str, Any] = key({}, "{NAME: how often it may be read at most}")
    shuffle_shards: int = key(
        8, "shards whose windows are shuffled together", kind="identity", ge=1
    )
    document_mask: bool = key(
        False, "attention and positions stay inside a document", kind="identity"
    )
    packing: Literal["windows", "best_fit"] = key(
        "windows",
        "windows: cut from one long sequence; best_fit: whole documents side by side",
        kind="identity",
    )
    skip: list[list] = key(
        [], "samples passed over: [[FIRST, END], ...], END not included", kind="identity"
    )
    workers: int = key(1, "threads that read ahead; 0: read when it is needed", ge=0, le=64)
    damaged: Literal["fail", "substitute"] = key(
        "fail", "substitute: go on with other windows in place of damaged ones, and say so"
    )

    def problems(self) -> Problems:
        found: Problems = []
        if self.sources and self.path:
            todo = "take one of them out: data.path=null"
            found.append(("sources", "are given beside data.path", todo))
        for name, path in self.sources.items():
            if not re.fullmatch(r"[\w-]+", str(name)):
                found.append(("sources", f"{name!r} is no name", "use letters, digits, _ and -"))
            if not isinstance(path, str) or not path:
                todo = f"write data.sources.{name}=DIR"
                found.append((f"sources.{name}", "names no dataset", todo))
        found += self._weights("weights", self.weights)
        found += self._names("max_epochs", self.max_epochs)
        for name, limit in self.max_epochs.items():
            if not _is_number(limit) or limit <= 0:
                what = f"{limit!r} is no number of epochs"
                found.append((f"max_epochs.{name}", what, "write a number, such as 4"))
        return found + self._skip() + self._stages()

    def _skip(self) -> Problems:
        end = 0
        for pair in self.skip:
            whole = len(pair) == 2 and all(isinstance(n, int) and _is_number(n) for n in pair)
            if not whole or not end <= pair[0] < pair[1]:
                todo = "write [[FIRST, END], ...] in whole samples, in order and apart"
                return [("skip", f"{pair!r} is no interval after {end:,}", todo)]
            end = pair[1]
        return []

    def stage_starts(self) -> list[Duration]:
        """When each of `stages` begins; raises ValueError for one that has no length."""
        return [Duration.parse(stage["from"]) for stage in self.stages]

    def order_problems(self, steps_of: Callable[[Duration], int | None]) -> Problems:
        """Stages that don't come one after the other. steps_of: a length in optimizer steps."""
        if self._stages():
            return []  # said by this section
        starts = [steps_of(start) or 0 for start in self.stage_starts()]
        return [
            (
                f"stages[{i}].from",
                f"{self.stages[i]['from']} is step {starts[i]:,}, the one before begins at step "
                f"{starts[i - 1]:,}",
                "put it after the one before",
            )
            for i in range(1, len(starts))
            if starts[i] <= starts[i - 1]
        ]

    def _stages(self) -> Problems:
        found: Problems = []
        for i, stage in enumerate(self.stages):
            where = f"stages[{i}]"
            if not isinstance(stage, Mapping) or set(stage) != {"from", "weights"}:
                todo = "write it like {from: 2e9 tokens, weights: {NAME: 1}}"
                return [*found, (where, "is not a stage", todo)]
            try:
                start = Duration.parse(stage["from"])
            except ValueError as e:
                found.append((f"{where}.from", str(e), "write it like from: 2e9 tokens"))
            else:
                if start.unit not in ("steps", "tokens") or not start.amount:
                    todo = "count from the beginning in steps or tokens, more than 0"
                    found.append((f"{where}.from", f"{start} is no fixed place", todo))
            if not isinstance(stage["weights"], Mapping) or not stage["weights"]:
                todo = "write it like weights: {NAME: 1}"
                found.append((f"{where}.weights", "are no shares", todo))
            else:
                found += self._weights(f"{where}.weights", stage["weights"])
        return found

    def _weights(self, where: str, weights: Mapping[str, Any]) -> Problems:
        found = self._names(where, weights)
        for name, weight in weights.items():
            if not _is_number(weight) or weight < 0:
                found.append((f"{where}.{name}", f"{weight!r} is no share", "write a number"))
        if weights and not found and not any(weights.values()):
            found.append((where, "are all 0", "give one source at least a share"))
        total = sum(weights.values()) if weights and not found else 0
        for name, weight in weights.items() if total else ():
            if 0 < weight / total < 1e-6:
                what = f"{weight!r} is under a millionth of the whole"
                found.append((f"{where}.{name}", what, "give it more, or 0"))
        return found

    def _names(self, where: str, named: Mapping[str, Any]) -> Problems:
        found: Problems = []
        for name in named:
            if name not in self.sources:
                near = nearest_first(str(name), self.sources)
                todo = f"data.sources has {', '.join(near)}" if near else "give data.sources"
                found.append((f"{where}.{name}", "is no source", todo))
        return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
