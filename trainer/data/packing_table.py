"""The packing tables of a split, a shard each: made once, kept in the cache, read shard by shard.

    each shard's table    offsets <i8, starts <i8, lengths <i4 (forescale.data.packing.Packing)
    head                  JSON: what was packed; of each shard bins, pieces, targets, XXH3 of its
                          table
    end                   sha256 of the head, 32 bytes; its length, <u8

Documents are packed within their shard, and what a shard has of a document whose other part lies
elsewhere is packed as a document of its own.

Invariant: the tables follow from the dataset's identity, the split and L; none is used before its
checksum has been compared with the head's, and the head's with the end's. A table that is half
written has no name.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from forescale.data.dataset import Split
from forescale.data.packing import Packing, pack
from forescale.data.progress import Progress, silent
from forescale.data.remote.store import LocalFile
from forescale.errors import UserError
from forescale.storage import HashingFile, fsync_path

_VERSION = 1  # raise it with any change of what `pack` makes, too
_DTYPES = tuple(map(np.dtype, ("<i8", "<i8", "<i4")))  # offsets, starts, lengths
_SHA256, _LENGTH = 32, 8  # bytes at the end
_OPEN = 64  # tables that are kept in memory, some 32 KiB for each million tokens
_AGAIN = "delete it: it is made again"


class _Row(NamedTuple):
    """Of one shard, as the head has it."""

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
        return self.bins + 1, self.pieces, self.pieces


def open_bins(
    split: Split, sequence_length: int, identity: str, cache: Path, progress: Progress = silent
) -> "Bins":
    """The bins of a split for windows of this length, packed now if the cache hasn't got them.

    identity: the dataset's. Reads all document ends where it packs: about 20 ms for 16 M tokens,
    and the memory of one shard's documents. Raises UserError for a damaged table, and what reading
    a shard raises.
    """
    name = f"{identity[:32]}-{split.name}-{sequence_length}.v{_VERSION}"
    path = Path(cache) / "packing" / name
    made = {"version": _VERSION, "identity": identity, "split": split.name, "L": sequence_length}
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, made, _tables(split, sequence_length, progress))
    return Bins(path, made, sequence_length)


class Bins:
    """Bin b of shard s: a list of runs of the shard's tokens, one training sequence.

    counts: bins of each shard; targets: what of its tokens is a target; int64 of shape (shards,).
    made: what the file must say that it was made of. Raises UserError where it doesn't, or is
    damaged. Reading is safe from several threads.
    """

    def __init__(self, path: Path, made: dict[str, Any], sequence_length: int):
        self.path, self.sequence_length = path, sequence_length
        self._file = LocalFile(path)
        self._rows = self._head(made)
        self._offsets = np.cumsum([0, *(row.size for row in self._rows)]).tolist()
        self.counts = np.array([row.bins for row in self._rows], np.int64)
        self.targets = np.array([row.targets for row in self._rows], np.int64)
        self.table = lru_cache(_OPEN)(self._table)

    def short(self, shards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of these shards' bins, counted side by side, have fewer than L targets, ascending;
        and how many fewer. int64 each, of one shape."""
        targets = [self.table(shard).targets for shard in shards.tolist()]
        lacking = self.sequence_length - np.concatenate(targets)
        which = np.flatnonzero(lacking)
        return which, lacking[which]

    def cut(self, shard: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of bins by shard and number, what stands for a window's first token, the number, and for
        its length, the bin's targets and one: int64 of that shape each."""
        length = np.empty_like(number)
        for one in np.unique(shard).tolist():
            here = shard == one
            length[here] = self.table(one).targets[number[here]] + 1
        return number, length

    def pieces(self, shard: int, number: int, targets: int | None = None) -> list[tuple[int, int]]:
        """(first token in the shard, tokens) of a bin's pieces, in order, two tokens at least each.

        targets: take pieces only until they have so many; the bin must have them.
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
        return Packing(self.sequence_length, *arrays)

    def _head(self, made: dict[str, Any]) -> list[_Row]:
        end = _SHA256 + _LENGTH
        raw = self._read(max(self._file.size - end, 0), min(end, self._file.size))
        length = int.from_bytes(raw[_SHA256:], "little")
        if length <= self._file.size - end:
            text = self._read(self._file.size - end - length, length)
            if hashlib.sha256(text).digest() == raw[:_SHA256]:
                head = json.loads(text)
                rows = [_Row(*row) for row in head.pop("shards")]
                if head != made:
                    raise UserError(str(self.path), "isn't of what its name says", _AGAIN)
                if sum(row.size for row in rows) + length + end == self._file.size:
                    return rows
        raise UserError(str(self.path), "damaged: its end isn't that of a packing table", _AGAIN)

    def _read(self, offset: int, size: int) -> bytearray:
        data = bytearray(size)
        self._file.read_at(offset, memoryview(data))
        return data


def _tables(split: Split, sequence_length: int, progress: Progress) -> Iterator[Packing]:
    done, total = 0, sum(split.shard_tokens)
    for shard, tokens in enumerate(split.shard_tokens):
        # Ends in order, each once, whatever a foreign corpus has; the rest of a shard whose last
        # document goes on elsewhere.
        ends = np.unique(np.append(split.document_ends(shard, 0, tokens), tokens))
        yield pack(np.diff(ends[ends > 0], prepend=0), sequence_length)
        done += tokens
        progress("pack documents", done, total, "tokens")


def _write(path: Path, made: dict[str, Any], tables: Iterator[Packing]) -> None:
    """Several processes may do so at a time: all write the same."""
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
            head = json.dumps({**made, "shards": rows}).encode()
            f.write(head)
            f.write(hashlib.sha256(head).digest())
            f.write(len(head).to_bytes(_LENGTH, "little"))
            f.finish()
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)
