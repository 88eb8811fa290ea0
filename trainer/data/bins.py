"""Tables of bins: the runs of tokens of each row that is more than one stretch of the text.

One scan of a split makes the tables, so that the targets of a step are known before anything is
read. They stay in the cache, one file a split, read shard by shard:

    each shard's table    offsets <i8, starts <i8, lengths <i4 (forescale.data.packing.Packing)
    head                  JSON: the request; bins, pieces, targets and XXH3 of each table; facts
    end                   sha256 of the head, 32 bytes; length of the head, <u8

Invariant: a table depends only on the dataset's identity, the split and the kind (bin_kinds.py). A
table is used only after it was compared with its checksum in the head, and the head with the end. A
file that is only partly written never has its final name.
"""

import hashlib
import json
import os
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from forescale.data.bin_kinds import BinKind, documents_of
from forescale.data.dataset import Split
from forescale.data.packing import Packing
from forescale.ground.console import Progress, silent
from forescale.ground.errors import UserError
from forescale.ground.storage import HashingFile, fsync_path, make_folder
from forescale.remote.store import LocalFile

_DTYPES = tuple(map(np.dtype, ("<i8", "<i8", "<i4")))  # offsets, starts, lengths
_SHA256, _LENGTH = 32, 8  # bytes at the end
_OPEN = 64  # tables kept in memory, about 32 KiB per million tokens
_NO_END = "damaged: it doesn't end like a table of bins"
_AGAIN = "delete the file; it is computed again"


class _Row(NamedTuple):
    """The head's entry for one shard."""

    bins: int
    pieces: int
    targets: int
    xxh3: str

    @property
    def size(self) -> int:
        """Bytes of the table: offsets, starts, lengths."""
        return 8 * (self.bins + 1) + (8 + 4) * self.pieces


class Bins:
    """Bins of a split. Bin b of shard s is a list of token runs of the shard, one training
    sequence.

    counts: bins of each shard; targets: number of target tokens of each shard; int64 of shape
    (shards,). facts: of whole rows: documents, and how many of them are left out by each of
    `reasons`; row_tokens, the tokens of the bins; the greatest lengths. Raises UserError if the
    file is damaged or holds something else. Reading is safe from several threads.
    """

    def __init__(self, path: Path, request: dict[str, Any], kind: BinKind):
        self.path, self.kind, self.sequence_length = path, kind, kind.window_length
        self.unit, self.are_whole, self.edges = kind.unit, kind.is_whole, kind.edges
        self.mark_ignored = kind.mark_ignored
        self._file = LocalFile(path)
        end, size = _SHA256 + _LENGTH, self._file.size
        raw = self._read(max(size - end, 0), min(end, size))
        length = int.from_bytes(raw[_SHA256:], "little")
        text = self._read(size - end - length, length) if length <= size - end else bytearray()
        if hashlib.sha256(text).digest() != raw[:_SHA256]:
            raise UserError(str(path), _NO_END, _AGAIN)
        head = json.loads(text)
        self._rows, self.facts = [_Row(*row) for row in head.pop("shards")], head.pop("facts", {})
        if head != request:
            raise UserError(str(path), "its contents don't match its name", _AGAIN)
        if sum(row.size for row in self._rows) + length + end != size:
            raise UserError(str(path), _NO_END, _AGAIN)
        self._offsets = np.cumsum([0, *(row.size for row in self._rows)]).tolist()
        self.counts = np.array([row.bins for row in self._rows], np.int64)
        self.targets = np.array([row.targets for row in self._rows], np.int64)
        self.table = lru_cache(_OPEN)(self._table)

    @classmethod
    def open(
        cls, kind: BinKind, split: Split, identity: str, cache: Path, progress: Progress = silent
    ) -> "Bins":
        """Return the bins of a split; scan it first if its table isn't in the cache.

        identity: the dataset's. A scan needs the memory of one shard's documents. Several processes
        may scan at the same time: all write the same bytes. Raises UserError for a damaged table or
        a dataset without such rows, and the errors of reading a shard.
        """
        path = kind.path(split, identity, cache)
        fields = {"version": kind.version, "identity": identity, "split": split.name}
        request = {**fields, **asdict(kind)}
        if path.exists():
            return cls(path, request, kind)
        make_folder(path.parent)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        names = ("documents", "row_tokens", *kind.longest, *kind.reasons) if kind.is_whole else ()
        facts, rows, done = dict.fromkeys(names, 0), list[_Row](), 0
        phase = f"find {kind.unit}s" if kind.is_whole else "pack documents"
        try:
            with HashingFile(temporary) as f:
                for shard, documents in enumerate(documents_of(split)):
                    table = kind.find(split, shard, documents, facts)
                    arrays = zip((table.offsets, table.starts, table.lengths), _DTYPES, strict=True)
                    raw = b"".join(a.astype(dtype, copy=False).tobytes() for a, dtype in arrays)
                    f.write(raw)
                    targets, digest = int(kind.targets(table).sum()), xxhash.xxh3_64_hexdigest(raw)
                    rows.append(_Row(table.num_bins, len(table.starts), targets, digest))
                    done += split.shard_tokens[shard]
                    progress(phase, done, sum(split.shard_tokens), "tokens")
                head = {**request, "shards": rows, **({"facts": facts} if facts else {})}
                text = json.dumps(head).encode()
                f.write(text + hashlib.sha256(text).digest())
                f.write(len(text).to_bytes(_LENGTH, "little"))
                f.finish()
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)
        return cls(path, request, kind)

    def left_out(self) -> str | None:
        """Return how many documents are in no bin, and why, in words; None if all are in one."""
        facts, kind = self.facts, self.kind
        reasons = [f"{facts[key]:,} {words}" for key, words in kind.reasons.items() if facts[key]]
        if not reasons:
            return None
        count, total = sum(facts[key] for key in kind.reasons), facts["documents"]
        sentence = f"{count:,} of {total:,} documents are left out, because they are no "
        sentence += f"{kind.unit}s: {', '.join(reasons)}"
        if facts["too_long"]:
            first, *others = (f"{words} {facts[key]:,}" for key, words in kind.longest.items())
            sentence += f" ({', '.join([f'{first} tokens', *others])})"
        return sentence

    def short(self, shards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of these shards' bins, numbered consecutively over the shards, have fewer
        than L targets, ascending, and how many are missing; int64 each, of one shape."""
        targets = [self.kind.targets(self.table(shard)) for shard in shards.tolist()]
        lacking = self.sequence_length - np.concatenate(targets)
        which = np.flatnonzero(lacking)
        return which, lacking[which]

    def cut(self, shard: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return, for bins given by shard and number, the number (in place of a window's first
        token) and the bin's targets + 1 (in place of its length); int64, same shape."""
        length = np.empty_like(number)
        for one in np.unique(shard).tolist():
            here = shard == one
            length[here] = self.kind.targets(self.table(one))[number[here]] + 1
        return number, length

    def pieces(self, shard: int, number: int, targets: int | None = None) -> list[tuple[int, int]]:
        """Return (first token in the shard, tokens) of a bin's pieces in order; of packed documents
        at least two tokens each.

        targets: take packed pieces only up to this number of targets, which the bin must have.
        """
        pieces = list(zip(*(a.tolist() for a in self.table(shard).pieces(number)), strict=True))
        if targets is None or self.are_whole:
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
        starts = 8 * (row.bins + 1)
        places = ((row.bins + 1, 0), (row.pieces, starts), (row.pieces, starts + 8 * row.pieces))
        arrays = (np.frombuffer(raw, d, *place) for d, place in zip(_DTYPES, places, strict=True))
        return Packing(*arrays)

    def _read(self, offset: int, size: int) -> bytearray:
        data = bytearray(size)
        self._file.read_at(offset, memoryview(data))
        return data


def num_windows(split: Split, sequence_length: int, bins: Bins | None = None) -> int:
    """Return the number of windows of held-out text: bins, or consecutive windows."""
    if bins is not None:
        return int(bins.counts.sum())
    return sum(-(-max(0, tokens - 1) // sequence_length) for tokens in split.shard_tokens)
