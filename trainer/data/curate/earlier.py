"""Earlier datasets, against which the documents of a new one are judged: their texts by number.

Invariant: a unit is a shard, and its documents have the order and the text of the shard's tokens.
So what a dataset holds is judged, whatever built it, and nothing has to be stored beside it.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from forescale.data.dataset import Dataset, Split
from forescale.data.text.documents import Unit
from forescale.data.text.files import input_name
from forescale.ground.errors import UserError


@dataclass(frozen=True)
class Earlier:
    """The documents of datasets, split by split, shard by shard. paths: of the datasets."""

    paths: tuple[str, ...] = ()

    @cached_property
    def shards(self) -> list[tuple[str, str, int]]:
        """The dataset, split and shard of each unit."""
        return [
            (path, name, shard)
            for path in self.paths
            for name in _dataset(path).manifest["splits"]
            for shard in range(len(_split(path, name).shard_tokens))
        ]

    @cached_property
    def units(self) -> list[Unit]:
        """The units, whose `source` is the place of their dataset; sizes are estimates."""
        units = []
        for path, name, shard in self.shards:
            split = _split(path, name)
            size = split.shard_tokens[shard] * split.num_bytes // max(split.num_tokens, 1)
            label = f"{input_name(path)}: {split.shard_name(shard)}"
            units.append(Unit(label, size, self.paths.index(path), shard, shard + 1))
        return units

    def name(self, number: int) -> str:
        """Return the name of the dataset of a unit."""
        return input_name(self.shards[number][0])

    def texts(self, number: int) -> Iterator[bytes]:
        """Yield the texts of a unit. Raises UserError if a shard is damaged."""
        for document in range(len(_ends(*self.shards[number]))):
            yield self.text(number, document).encode()

    def text(self, number: int, document: int) -> str:
        """Return the text of any document of a unit."""
        (path, name, shard), ends = self.shards[number], _ends(*self.shards[number])
        start = int(ends[document - 1]) if document else 0
        ids = _split(path, name).read(shard, start, int(ends[document]) - start).tolist()
        if ids[-1] == (dataset := _dataset(path)).end_of_text:
            ids.pop()
        return dataset.tokenizer.decode(ids, skip_special_tokens=False)

    def describe(self) -> list[dict[str, str]]:
        """Return name and sha256 of the manifest of each, as the request of a build has them.
        Raises UserError if one isn't there."""
        return [{"name": input_name(path), "manifest": manifest_of(path)} for path in self.paths]

    def places(self, output: Path) -> list[dict[str, str]]:
        """Return where each is, seen from the new dataset, so that `check` finds them."""
        there = [p if "://" in p else os.path.relpath(Path(p).expanduser(), output)
                 for p in self.paths]  # fmt: skip
        return [{**row, "path": path} for row, path in zip(self.describe(), there, strict=True)]


def manifest_of(path: str) -> str:
    """Return the sha256 of a dataset's manifest, which says of what and how it was built."""
    return _opened(path).manifest_hash


def chain_faults(dataset: Dataset) -> Iterator[tuple[str, bool]]:
    """Yield a sentence for each dataset against which this one was judged that is gone or another
    one now, and whether it is another one."""
    report: dict[str, Any] = dataset.manifest["report"].get("curation", {})
    rows: Sequence[dict[str, str]] = report.get("against", ())
    for row in rows:
        path = row["path"] if "://" in row["path"] else os.path.normpath(dataset.path / row["path"])
        try:
            if manifest_of(path) != row["manifest"]:
                yield f"{path}: is not the dataset any more against which this one was judged", True
        except UserError as e:
            problem = f"this dataset was judged against {path}, which can't be read now"
            yield f"{problem} ({e.problem})", False


def _opened(path: str) -> Dataset:
    return Dataset(path if "://" in path else Path(path).expanduser())


_dataset = lru_cache(16)(_opened)  # for a build, which reads them from many processes


@lru_cache(32)
def _split(path: str, name: str) -> Split:
    return _dataset(path).split(name)


@lru_cache(64)
def _ends(path: str, name: str, shard: int) -> np.ndarray:
    split = _split(path, name)
    return split.document_ends(shard, 0, split.shard_tokens[shard])
