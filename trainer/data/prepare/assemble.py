"""Assemble shards in shuffled order from the tokens of all units: each takes a range of shuffle
keys.

Invariant: the shards, read one after the other, hold the documents in the order of their shuffle
keys, ties in source order. Where a shard ends is decided only by the number of tokens and
`shard_tokens`.

Ranges consist of whole bins of a histogram of tokens over the keys, 2^20 bins: shards are equal to
about one bin and never split a document. A task gathers and sorts _GATHERED tokens at a time from
the runs of all units, about 100 MB with uint16, however large the shards are; a bin that holds more
(one document can) is gathered at once.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from forescale.data.prepare.columns import UnitFile, UnitWriter, finished
from forescale.data.prepare.encode import TokenRun
from forescale.data.prepare.pool import Tick
from forescale.data.prepare.selection import VALIDATION
from forescale.data.prepare.writer import ShardWriter
from forescale.ground.storage import FileEntry, hash_file

_BITS = 20
_GATHERED = 1 << 24  # tokens
_ROWS = 1 << 12  # documents whose positions are converted to Python integers at a time


class ShardPlan(NamedTuple):
    """A planned shard: its name, and the keys between which documents are gathered at a time."""

    name: str
    edges: list[int]
    tokens: int


def plan_shards(
    directory: Path, units: list[list[TokenRun]], split: str, shard_tokens: int
) -> list[ShardPlan]:
    """Return the shards of a split, all of about `shard_tokens` tokens."""
    histogram = np.zeros(1 << _BITS, np.int64)
    for path, run in _runs(directory, dict(enumerate(units)), split):
        with UnitFile(path) as file:
            keys = run.column(file, "key", 0, run.documents)
            ends = run.column(file, "end", 0, run.documents).astype(np.int64)
        bins = (keys >> np.uint64(64 - _BITS)).astype(np.int64)
        np.add.at(histogram, bins, np.diff(ends, prepend=0))
    total = int(histogram.sum())
    count = max(1, round(total / shard_tokens))
    # A bin belongs to the shard that contains its middle.
    middles = np.cumsum(histogram) - histogram / 2
    owner = np.minimum((middles * count / max(total, 1)).astype(np.int64), count - 1)
    shards: list[ShardPlan] = []
    for bins in np.split(np.arange(len(owner)), np.flatnonzero(np.diff(owner)) + 1):
        ends = np.cumsum(histogram[bins])
        if not ends[-1]:
            continue
        # Between two edges: at most _GATHERED tokens, or one bin.
        edges, at, before = [0], 0, 0
        while before + _GATHERED < ends[-1]:
            fits = int(np.searchsorted(ends, before + _GATHERED, side="right"))
            at = max(fits, at + 1)
            before = int(ends[at - 1])
            edges.append(at)
        if edges[-1] < len(bins):
            edges.append(len(bins))
        keys_of_edges = [(int(bins[0]) + edge) << (64 - _BITS) for edge in edges]
        shards.append(ShardPlan(f"{split}-{len(shards):06d}", keys_of_edges, int(ends[-1])))
    return shards


def _runs(
    directory: Path, units: Mapping[int, list[TokenRun]], split: str
) -> Iterator[tuple[Path, TokenRun]]:
    for number, runs in units.items():
        for run in runs:
            if run.split == split:
                yield directory / f"{number:06d}", run


def origins(
    directory: Path, units: list[list[TokenRun]], sources: Sequence[int], names: list[str]
) -> dict[str, Any]:
    """Return where each held-out document comes from, in the order of the shards, as
    `Dataset.origins` returns it. sources: of each unit, its input; names: of the inputs."""
    keys, documents = [np.empty(0, np.uint64)], list[tuple[int, str]]()
    for number, (runs, source) in enumerate(zip(units, sources, strict=True)):
        for path, run in _runs(directory, {number: runs}, VALIDATION):
            with UnitFile(path) as file:
                keys.append(run.column(file, "key", 0, run.documents))
            documents += [(source, kind) for kind in run.kinds]
    order = np.argsort(np.concatenate(keys), kind="stable")  # runs come in source order
    kinds = sorted({kind for _, kind in documents})
    place = {kind: i for i, kind in enumerate(kinds)}
    return {
        "sources": names,
        "kinds": kinds,
        "source": [documents[i][0] for i in order.tolist()],
        "kind": [place[documents[i][1]] for i in order.tolist()],
    }


@dataclass(frozen=True)
class AssembleJob:
    """Write a shard and its index into `stage`, and its row and the files' hashes into `rows`.

    directory: holds the units' tokens; units: their runs.
    """

    directory: Path
    units: list[list[TokenRun]]
    rows: Path
    stage: Path
    dtype: np.dtype
    member_tokens: int

    def __call__(self, split: str, shard: ShardPlan, tick: Tick) -> None:
        path = self.rows / shard.name
        if done := finished(path):
            with suppress(FileNotFoundError):
                if all(
                    hash_file(self.stage / name) == FileEntry(**entry)
                    for name, entry in done["files"].items()
                ):
                    tick(shard.tokens, shard.tokens)
                    return
        writer = ShardWriter(self.stage, shard.name, self.dtype, self.member_tokens)
        for low, high in zip(shard.edges, shard.edges[1:], strict=False):
            reported = writer.tokens
            for ids in self._gathered(split, low, high):
                writer.add(ids)
                if writer.tokens - reported >= 1 << 20:
                    tick(writer.tokens - reported, writer.tokens - reported)
                    reported = writer.tokens
            tick(writer.tokens - reported, writer.tokens - reported)
        row, files = writer.finish()
        with UnitWriter(path) as out:
            out.finish({"row": row, "files": {name: vars(entry) for name, entry in files.items()}})

    def _gathered(self, split: str, low: int, high: int) -> Iterator[np.ndarray]:
        """Yield the verified documents with shuffle keys in [low, high), in order."""
        keys: list[np.ndarray] = []
        rows: list[np.ndarray] = []  # (documents, 4): number of the run, first token, end, checksum
        runs: list[tuple[Path, np.ndarray]] = []
        for path, run in _runs(self.directory, dict(enumerate(self.units)), split):
            with UnitFile(path) as file:
                first = file.search(run.offset, run.documents, low)
                last = file.search(run.offset, run.documents, high)
                if first == last:
                    continue
                ends = run.column(file, "end", max(first - 1, 0), last)
                if first == 0:
                    ends = np.concatenate([np.zeros(1, "<u8"), ends])
                tokens = run.tokens_of(file, int(ends[0]), int(ends[-1]), self.dtype)
                keys.append(run.column(file, "key", first, last))
                checksums = run.column(file, "sum", first, last)
            numbers = np.full(last - first, len(runs), np.uint64)
            ends = ends - ends[0]
            rows.append(np.stack([numbers, ends[:-1], ends[1:], checksums], axis=1))
            runs.append((path, tokens))
        if not runs:
            return
        order = np.argsort(np.concatenate(keys), kind="stable")  # runs come in source order
        sorted_rows = np.concatenate(rows)[order]
        for at in range(0, len(sorted_rows), _ROWS):
            for number, start, stop, checksum in sorted_rows[at : at + _ROWS].tolist():
                path, tokens = runs[number]
                ids = tokens[start:stop]
                if xxhash.xxh3_64_intdigest(ids.data) != checksum:
                    with UnitFile(path) as file:
                        raise file.damaged()
                yield ids
