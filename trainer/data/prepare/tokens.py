"""From units to shards: documents become tokens, sorted by shuffle key, and shards gather them.

    tokens/000012    in runs of about _RUN tokens of a split: shuffle key, end in the run's tokens
                     and XXH3-64 of every document, in the order of the keys; then the tokens

Invariants: a file of tokens/ depends only on the unit, the selection, the tokenizer and the seed.
The shuffle key is a hash of the document's key and the seed. The shards, read one after the other,
hold the documents in the order of their shuffle keys, ties in source order. Where a shard ends is
decided only by the number of tokens and `shard_tokens`.

Each shard takes a range of keys: whole bins of a histogram of tokens over the keys, 2^20 bins. So
shards are equal to about one bin, and never split a document.

To encode, a task holds one run and the current document: about 250 MB, plus about 10 bytes for each
byte of a document beyond a megabyte. To write a shard, it gathers and sorts _GATHERED tokens at a
time from the runs of all units, about 100 MB with uint16, however large the shards are; a bin that
holds more (one document can) is gathered at once.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import xxhash
from tokenizers import Tokenizer

from forescale.data.order import mix64
from forescale.data.prepare.columns import UnitFile, UnitWriter, finished, is_whole
from forescale.data.prepare.pool import Tick
from forescale.data.prepare.selection import SPLITS, VALIDATION, Part, Selection
from forescale.data.prepare.writer import ShardWriter
from forescale.data.text.documents import ReadingReport, Unit, pieces
from forescale.data.text.opening import bare
from forescale.data.tokenizer import Vocabulary, token_bytes
from forescale.ground.storage import FileEntry

_BATCH = 1 << 20  # bytes of text that are encoded at a time
_PIECE = 1 << 20  # bytes; a longer document is encoded in pieces
_RUN = 1 << 23  # tokens
_RUN_DOCUMENTS = 1 << 17
# Behind the name of a file: which row of it, which part of a document.
_ROW = re.compile(r"([@:][0-9]+)?( \((first|last) part\))?$")
_SUFFIX = re.compile(r"(?<=[^/])\.[a-z0-9_+-]{1,12}$")
NOT_LOSSLESS = "not lossless in this tokenizer"
_BITS = 20
_GATHERED = 1 << 24  # tokens
_ROWS = 1 << 12  # documents whose positions are converted to Python integers at a time


class TokenRun(NamedTuple):
    """A run in a unit's file: its split, offset in bytes, number of documents and of tokens; of
    held-out documents also the file type of each."""

    split: str
    offset: int
    documents: int
    tokens: int
    kinds: Sequence[str] = ()

    def column(self, file: UnitFile, name: str, start: int, stop: int) -> np.ndarray:
        """Return entries [start, stop) of `key`, `end` or `sum`."""
        place = ("key", "end", "sum").index(name)
        return file.column(self.offset + 8 * place * self.documents, stop - start, "<u8", start)

    def tokens_of(self, file: UnitFile, start: int, stop: int, dtype: np.dtype) -> np.ndarray:
        return file.column(self.offset + 24 * self.documents, stop - start, dtype, start)


def kind_of(name: str) -> str:
    """Return the file type of a document (of a row: of its file), such as `.py`; "" for none."""
    path = bare(_ROW.sub("", name))
    return path[match.start() :] if (match := _SUFFIX.search(path)) else ""


def shuffle_keys(keys: np.ndarray, seed: int) -> np.ndarray:
    """Return uint64 numbers that sort documents with these keys into the shuffled order."""
    salt = mix64(np.array([seed % 2**64], np.uint64) + np.uint64(1))
    return mix64(keys ^ salt)


@dataclass(frozen=True)
class EncodeJob:
    """Encode a unit. seed: of the shuffle."""

    selection: Selection
    directory: Path
    vocabulary: Vocabulary
    seed: int

    def __call__(self, number: int, unit: Unit, size: int, tick: Tick) -> None:
        """size: bytes of the unit's documents."""
        path = self.directory / f"{number:06d}"
        if done := finished(path):
            tick(size, sum(split["tokens"] for split in done["splits"].values()))
            return
        splits = {name: dict.fromkeys(("documents", "tokens", "bytes"), 0) for name in SPLITS}
        lengths = [0] * 64  # documents of 2^i tokens and more
        report, digest, runs, left = ReadingReport(), hashlib.sha256(), list[TokenRun](), size
        with UnitWriter(path) as out:
            pending = _Pending(out, self.seed)
            for part, ids in self._encoded(self.selection.parts(number, unit, report)):
                if int(self._sizes[ids[:-1]].sum()) - len(part.text) not in (0, self._before):
                    report.add(NOT_LOSSLESS, part.name)
                counts = {"documents": 1, "tokens": len(ids), "bytes": len(part.text)}
                for key, count in counts.items():
                    splits[part.split][key] += count
                lengths[len(ids).bit_length() - 1] += 1
                text_digest = hashlib.sha256(part.text).hexdigest()
                digest.update(f"{part.name}\0{text_digest}\n".encode())
                runs += pending.add(part, ids)
                left -= len(part.text)
                tick(len(part.text), len(ids))
            runs += pending.flush()
            facts = {"runs": runs, "splits": splits, "lengths": lengths}
            out.finish({**facts, "report": asdict(report), "digest": digest.hexdigest()})
        tick(left, 0)  # of duplicates

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = self.vocabulary.load()
        # The text "<|endoftext|>" inside a document is ordinary text and doesn't end it.
        tokenizer.encode_special_tokens = True
        return tokenizer

    @cached_property
    def _sizes(self) -> np.ndarray:
        return token_bytes(self._tokenizer)

    @cached_property
    def _before(self) -> int:
        """Bytes that the tokenizer adds before a text, such as SentencePiece's space."""
        ids = self._tokenizer.encode("x", add_special_tokens=False).ids
        return int(self._sizes[ids].sum()) - 1

    def _encoded(self, parts: Iterable[Part]) -> Iterator[tuple[Part, np.ndarray]]:
        """Yield every part with its ids, including end of text."""
        end = np.array([self.vocabulary.end], self.vocabulary.dtype)
        if self.vocabulary.is_bytes:
            for part in parts:
                ids = np.frombuffer(part.text, np.uint8).astype(end.dtype)
                yield part, np.concatenate([ids, end])
            return

        def encoded() -> Iterator[tuple[int, Part, np.ndarray]]:
            for batch in _batches(parts):
                texts = [piece for _, _, piece in batch]
                encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
                for (number, part, _), encoding in zip(batch, encodings, strict=True):
                    yield number, part, np.array(encoding.ids, end.dtype)

        for _, group in groupby(encoded(), key=lambda row: row[0]):
            _, pieces_of, ids = zip(*group, strict=True)
            yield pieces_of[0], np.concatenate([*ids, end])


def _batches(parts: Iterable[Part]) -> Iterator[list[tuple[int, Part, str]]]:
    """Yield the parts' pieces, each with the number of its part, in lists of about _BATCH bytes."""
    batch: list[tuple[int, Part, str]] = []
    held = 0
    for number, part in enumerate(parts):
        for piece in pieces(part.text, _PIECE):
            batch.append((number, part, piece))
            held += len(piece)
            if held >= _BATCH:
                yield batch
                batch, held = [], 0
    if batch:
        yield batch


class _Pending:
    """Documents that are collected for a run."""

    def __init__(self, out: UnitWriter, seed: int):
        self._out, self._seed = out, seed
        self._clear()

    def add(self, part: Part, ids: np.ndarray) -> list[TokenRun]:
        self._documents[part.split].append((part.key, ids, kind_of(part.name)))
        self._tokens += len(ids)
        count = sum(map(len, self._documents.values()))
        return self.flush() if self._tokens >= _RUN or count >= _RUN_DOCUMENTS else []

    def flush(self) -> list[TokenRun]:
        """Write the documents, one run for each split that has any."""
        runs = []
        for split, rows in self._documents.items():
            if not rows:
                continue
            keys = shuffle_keys(np.array([key for key, *_ in rows], np.uint64), self._seed)
            order = np.argsort(keys, kind="stable").tolist()
            documents = [rows[i][1] for i in order]
            ends = np.cumsum([len(ids) for ids in documents]).astype("<u8")
            sums = np.array([xxhash.xxh3_64_intdigest(ids.data) for ids in documents], "<u8")
            columns = (keys[order].astype("<u8"), ends, sums, *documents)
            offset, *_ = [self._out.add(column) for column in columns]
            kinds = [rows[i][2] for i in order] if split == VALIDATION else []
            runs.append(TokenRun(split, offset, len(documents), int(ends[-1]), kinds))
        self._clear()
        return runs

    def _clear(self) -> None:
        self._documents: dict[str, list[tuple[int, np.ndarray, str]]] = {s: [] for s in SPLITS}
        self._tokens = 0


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
    They are made in a directory of their own in `parts`: two processes may make the same shard.

    directory: holds the units' tokens; units: their runs.
    """

    directory: Path
    units: list[list[TokenRun]]
    rows: Path
    parts: Path
    stage: Path
    dtype: np.dtype
    member_tokens: int

    def __call__(self, split: str, shard: ShardPlan, tick: Tick) -> None:
        path = self.rows / shard.name
        if is_whole(path, self.stage):
            tick(shard.tokens, shard.tokens)
            return
        with TemporaryDirectory(dir=self.parts) as part:
            row, files = self._write(Path(part), split, shard, tick)
            for name in files:
                os.replace(Path(part, name), self.stage / name)
        with UnitWriter(path) as out:
            out.finish({"row": row, "files": {name: vars(entry) for name, entry in files.items()}})

    def _write(
        self, part: Path, split: str, shard: ShardPlan, tick: Tick
    ) -> tuple[dict[str, Any], dict[str, FileEntry]]:
        writer = ShardWriter(part, shard.name, self.dtype, self.member_tokens)
        for low, high in zip(shard.edges, shard.edges[1:], strict=False):
            reported = writer.tokens
            for ids in self._gathered(split, low, high):
                writer.add(ids)
                if writer.tokens - reported >= 1 << 20:
                    tick(writer.tokens - reported, writer.tokens - reported)
                    reported = writer.tokens
            tick(writer.tokens - reported, writer.tokens - reported)
        return writer.finish()

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
