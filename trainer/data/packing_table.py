"""The packing tables of a split, one per shard: computed once, kept in the cache, read per shard.

    each shard's table    offsets <i8, starts <i8, lengths <i4 (forescale.data.packing.Packing)
    head                  JSON: what was packed; for each shard bins, pieces, targets and the XXH3
                          of its table; facts of what is not in them
    end                   sha256 of the head, 32 bytes; length of the head, <u8

Documents are packed within their shard. If a document continues in another shard, each part is
packed as a document of its own.

Invariant: the tables depend only on the dataset's identity, the split and L; a table is used only
after it was compared with its checksum in the head, and the head with the end. A file that is only
partly written never has its final name.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import xxhash

from forescale.console import Progress, silent
from forescale.data.dataset import Split
from forescale.data.packing import Packing, pack
from forescale.data.remote.store import LocalFile
from forescale.errors import UserError
from forescale.storage import HashingFile, fsync_path

_VERSION = 1  # increase it also if the result of `pack` changes
_DTYPES = tuple(map(np.dtype, ("<i8", "<i8", "<i4")))  # offsets, starts, lengths
_SHA256, _LENGTH = 32, 8  # bytes at the end
_OPEN = 64  # tables kept in memory, about 32 KiB per million tokens
_AGAIN = "delete the file; it is computed again"


class _Row(NamedTuple):
    """The head's entry for one shard."""

    bins: int
    pieces: int
    targets: int
    xxh3: str

    @property
    def size(self) -> int:
        """Bytes of the table."""
        return sum(n * d.itemsize for n, d in zip(self.counts, _DTYPES, strict=True))

    @property
    def counts(self) -> tuple[int, int, int]:
        """Number of offsets, starts and lengths."""
        return self.bins + 1, self.pieces, self.pieces


def open_bins(
    split: Split, sequence_length: int, identity: str, cache: Path, progress: Progress = silent
) -> "Bins":
    """Return the bins of a split for windows of this length; pack them first if they aren't in the
    cache.

    identity: the dataset's. Packing reads all document ends: about 20 ms for 16 M tokens, and the
    memory of one shard's documents. Raises UserError for a damaged table, and the errors of reading
    a shard.
    """
    name = f"{identity[:32]}-{split.name}-{sequence_length}.v{_VERSION}"
    path = Path(cache) / "packing" / name
    made = {"version": _VERSION, "identity": identity, "split": split.name, "L": sequence_length}
    if not path.exists():
        write_tables(path, made, _tables(split, sequence_length, progress))
    return Bins(path, made, sequence_length)


class Bins:
    """Bins of a split. Bin b of shard s is a list of token runs of the shard, one training
    sequence.

    counts: bins of each shard; targets: number of target tokens of each shard; int64 of shape
    (shards,). made: what the file must have been made of; facts: what its maker added, such as
    counts of what is in no bin. Raises UserError if the file is damaged or was made of something
    else. Reading is safe from several threads.
    """

    unit: ClassVar[str] = "window"  # what a bin is; all others are whole, and never shortened
    # How many of the first ends of a bin's pieces the objective gets, as `cuts`; 0: it gets none,
    # and what is no target is marked (mark_ignored).
    edges: ClassVar[int] = 0

    def __init__(self, path: Path, made: dict[str, Any], sequence_length: int):
        """Open the file and read its head."""
        self.path, self.sequence_length = path, sequence_length
        self._file = LocalFile(path)
        self._rows, self.facts = self._head(made)
        self._offsets = np.cumsum([0, *(row.size for row in self._rows)]).tolist()
        self.counts = np.array([row.bins for row in self._rows], np.int64)
        self.targets = np.array([row.targets for row in self._rows], np.int64)
        self.table = lru_cache(_OPEN)(self._table)

    @property
    def are_whole(self) -> bool:
        """True if a bin is a pair or a conversation, the tokens of which only it has."""
        return self.unit != "window"

    def mark_ignored(self, row: np.ndarray, ends: np.ndarray) -> None:
        """Set to True what is no target of a row, bool of shape (L + 1,), of pieces that end before
        `ends`: the first token of each, which other documents precede."""
        row[ends[:-1]] = True

    def left_out(self) -> str | None:
        """Return how many documents are in no bin, and why, in words; None if all are in one."""
        return None

    def short(self, shards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of these shards' bins, numbered consecutively over the shards, have fewer
        than L targets, ascending, and how many are missing; int64 each, of one shape."""
        targets = [self.table(shard).targets for shard in shards.tolist()]
        lacking = self.sequence_length - np.concatenate(targets)
        which = np.flatnonzero(lacking)
        return which, lacking[which]

    def cut(self, shard: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return, for bins given by shard and number, the number (in place of a window's first
        token) and the bin's targets + 1 (in place of its length); int64, same shape."""
        length = np.empty_like(number)
        for one in np.unique(shard).tolist():
            here = shard == one
            length[here] = self.table(one).targets[number[here]] + 1
        return number, length

    def pieces(self, shard: int, number: int, targets: int | None = None) -> list[tuple[int, int]]:
        """Return (first token in the shard, tokens) of a bin's pieces in order, at least two tokens
        each.

        targets: take pieces only up to this number of targets; the bin must have at least as many.
        """
        pieces = list(zip(*(a.tolist() for a in self.table(shard).pieces(number)), strict=True))
        if targets is None:
            return pieces
        taken: list[tuple[int, int]] = []
        for start, length in pieces:
            if not targets:
                break
            length = min(length, targets + 1)
            taken.append((start, length))
            targets -= length - 1
        assert not targets
        return taken

    def _table(self, shard: int) -> Packing:
        row, at = self._rows[shard], self._offsets[shard]
        raw = self._read(at, row.size)
        if xxhash.xxh3_64_hexdigest(raw) != row.xxh3:
            raise UserError(str(self.path), f"damaged: the table of shard {shard}", _AGAIN)
        arrays, at = [], 0
        for count, dtype in zip(row.counts, _DTYPES, strict=True):
            arrays.append(np.frombuffer(raw, dtype, count, at))
            at += arrays[-1].nbytes
        return self._packing(*arrays)

    def _packing(self, *arrays: np.ndarray) -> Packing:
        return Packing(self.sequence_length, *arrays)

    def _head(self, made: dict[str, Any]) -> tuple[list[_Row], dict[str, int]]:
        end = _SHA256 + _LENGTH
        raw = self._read(max(self._file.size - end, 0), min(end, self._file.size))
        length = int.from_bytes(raw[_SHA256:], "little")
        if length <= self._file.size - end:
            text = self._read(self._file.size - end - length, length)
            if hashlib.sha256(text).digest() == raw[:_SHA256]:
                head = json.loads(text)
                rows, facts = [_Row(*row) for row in head.pop("shards")], head.pop("facts", {})
                if head != made:
                    raise UserError(str(self.path), "its contents don't match its name", _AGAIN)
                if sum(row.size for row in rows) + length + end == self._file.size:
                    return rows, facts
        raise UserError(str(self.path), "damaged: it doesn't end like a packing table", _AGAIN)

    def _read(self, offset: int, size: int) -> bytearray:
        data = bytearray(size)
        self._file.read_at(offset, memoryview(data))
        return data


def num_windows(split: Split, sequence_length: int, bins: Bins | None = None) -> int:
    """Return the number of windows of held-out text, which are those of `bins` or follow each other
    (stream.validation_windows)."""
    if bins is not None:
        return int(bins.counts.sum())
    return sum(-(-max(0, tokens - 1) // sequence_length) for tokens in split.shard_tokens)


def _tables(split: Split, sequence_length: int, progress: Progress) -> Iterator[Packing]:
    done, total = 0, sum(split.shard_tokens)
    for shard, tokens in enumerate(split.shard_tokens):
        # Sorted and unique even for a foreign corpus; the shard's end is added in case its last
        # document continues in another shard.
        ends = np.unique(np.append(split.document_ends(shard, 0, tokens), tokens))
        yield pack(np.diff(ends[ends > 0], prepend=0), sequence_length)
        done += tokens
        progress("pack documents", done, total, "tokens")


def write_tables(
    path: Path,
    made: dict[str, Any],
    tables: Iterator[Packing],
    facts: Callable[[], dict[str, int]] | None = None,
) -> None:
    """Write the file of a split's tables, atomically. Several processes may do this at the same
    time: all write the same bytes.

    made: what the tables are made of; facts: called after the last table, see Bins.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    rows: list[_Row] = []
    try:
        with HashingFile(temporary) as f:
            for table in tables:
                arrays = zip((table.offsets, table.starts, table.lengths), _DTYPES, strict=True)
                data = b"".join(a.astype(dtype, copy=False).tobytes() for a, dtype in arrays)
                f.write(data)
                digest = xxhash.xxh3_64_hexdigest(data)
                rows.append(_Row(table.num_bins, len(table.starts), table.num_targets, digest))
            found = {"facts": facts()} if facts else {}
            head = json.dumps({**made, "shards": rows, **found}).encode()
            f.write(head)
            f.write(hashlib.sha256(head).digest())
            f.write(len(head).to_bytes(_LENGTH, "little"))
            f.finish()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)
