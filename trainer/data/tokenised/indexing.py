"""Indexes for tokens that stay in their files: documents assigned to splits, splits cut into
shards.

The corpus, its files one after the other, is divided into stretches of 2^20 tokens, or of a 16th of
it if it is small. A document is held out if and only if its first token is in the last part of a
stretch, `validation` of its length. So held-out documents are spread evenly over the corpus, and
depend only on the files.

Invariant: the splits' members are disjoint parts of the files that together hold every token once;
no member holds tokens of two files, and all ids are inside the vocabulary.
"""

import hashlib
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash

from forescale.data.prepare.selection import SPLITS
from forescale.data.prepare.writer import chunk_sums, write_index
from forescale.data.text.documents import ReadingReport
from forescale.data.text.opening import open_raw, printable, reading
from forescale.data.tokenised.kinds import RESTORE, TokenFile
from forescale.data.tokenizer import Vocabulary, token_bytes
from forescale.ground.errors import UserError
from forescale.ground.storage import FileEntry, HashingFile

_STRETCH = 1 << 20
_BLOCK = 1 << 22  # tokens read at a time


class Indexer:
    """Indexes the files of a corpus in order; splits and totals are attributes.

    tokens: of the whole corpus. Memory: about 100 MB, plus a TokenFile.
    """

    def __init__(
        self,
        directory: Path,
        vocabulary: Vocabulary,
        tokens: int,
        validation: float,
        shard_tokens: int,
        member_tokens: int,
    ):
        sizes = token_bytes(vocabulary.load())
        self.splits = {
            name: _Split(directory, name, sizes, shard_tokens, member_tokens) for name in SPLITS
        }
        self._parts = list(self.splits.values())
        self._vocabulary = vocabulary
        self._stretch = max(1, min(_STRETCH, tokens // 16))
        self._train = self._stretch - round(validation * self._stretch)
        self._before = 0  # tokens of the files before this one
        self.lengths = np.zeros(64, np.int64)
        self.report = ReadingReport()

    def totals(self) -> Counter[str]:
        """Return the tokens, documents and bytes of all splits so far."""
        return sum((Counter(split.totals) for split in self.splits.values()), Counter[str]())

    def held_out(self, starts: np.ndarray) -> np.ndarray:
        """Return whether documents that begin at these tokens of the corpus are held out; bool."""
        return starts % self._stretch >= self._train

    def add(self, file: TokenFile, name: str, tick: Callable[[int, int], None]) -> None:
        """Read a whole file. name: for reports; tick: called with bytes and tokens read."""
        at = begun = 0  # current token of the file; start of the current document
        part = bool(self.held_out(np.array([self._before]))[0])
        ended = unended = 0
        with open_raw(file.where) as f:
            for extent in file.extents:
                for skip in range(0, extent.tokens, _BLOCK):
                    offset = extent.offset + skip * file.dtype.itemsize
                    ids = self._read(f, file, offset, min(_BLOCK, extent.tokens - skip), at)
                    ends, num_marked = self._ends(file, ids, at)
                    ended, unended = ended + num_marked, unended + len(ends) - num_marked
                    if len(ends):
                        sizes = np.diff(ends, prepend=begun - at).astype(float)
                        self.lengths += np.bincount(np.frexp(sizes)[1] - 1, minlength=64)
                        begun = at + int(ends[-1])
                    # Divide the documents among the splits; one may continue in the next block.
                    parts = np.append(part, self.held_out(ends + (at + self._before)))
                    turns = np.flatnonzero(parts[1:] != parts[:-1])
                    bounds = [0, *ends[turns].tolist(), len(ids)]
                    sides = [part, *parts[turns + 1].tolist()]
                    for (start, stop), side in zip(pairwise(bounds), sides, strict=True):
                        if start < stop:
                            a, b = np.searchsorted(ends, (start, stop), side="right")
                            where = offset + start * file.dtype.itemsize
                            ends_inside = ends[a:b] - start
                            self._parts[side].add(file, where, ids[start:stop], ends_inside)
                    part = bool(parts[-1])
                    at += len(ids)
                    tick(ids.nbytes, len(ids))
        if not file.by_id and unended:
            reason = "documents that end without the end-of-text token"
            self.report.merge(ReadingReport({reason: unended}, {reason: [name]}))
        if file.by_id and len(file.ends) < 2 and not ended:
            self.report.add("files without an end-of-text token, taken for one document", name)
        self._before += at

    def finish(self) -> None:
        """Write the last shard of every split."""
        for split in self.splits.values():
            split.finish_shard()

    def _read(self, f: BinaryIO, file: TokenFile, offset: int, count: int, at: int) -> np.ndarray:
        """Return ids that are all in the vocabulary. at: tokens of the file before them."""
        ids, size = np.empty(count, file.dtype), self._vocabulary.size
        rest = memoryview(ids.view(np.uint8).data)
        with reading(file.where):
            f.seek(offset)
            while rest:
                if not (length := f.readinto(rest)):  # type: ignore[attr-defined]
                    problem = f"ends {len(rest):,} bytes early"
                    raise UserError(printable(file.where), problem, RESTORE)
                rest = rest[length:]
        if int(ids.max()) >= size or (ids.dtype.kind == "i" and int(ids.min()) < 0):
            first = int(np.flatnonzero((ids >= size) | (ids < 0))[0])
            where = f"token {at + first:,} is {int(ids[first])}"
            todo = "give the tokenizer and the dtype of the corpus"
            problem = f"{where}, the vocabulary has {size:,} entries"
            raise UserError(printable(file.where), problem, todo)
        return ids

    def _ends(self, file: TokenFile, ids: np.ndarray, at: int) -> tuple[np.ndarray, int]:
        """Return the document ends in a block, and how many have the end-of-text token."""
        a, b = np.searchsorted(file.ends, (at, at + len(ids)), side="right")
        ends = file.ends[a:b] - at
        by_id = np.flatnonzero(ids == self._vocabulary.end) + 1
        num_marked = int((ids[ends - 1] == self._vocabulary.end).sum())
        if file.by_id:
            ends, num_marked = np.union1d(ends, by_id), len(by_id)
        if at + len(ids) == file.tokens and (not len(ends) or ends[-1] < len(ids)):
            ends = np.append(ends, len(ids))
        return ends, num_marked


class _Split:
    """Writes `NAME-000000.index.json` and `.doc.bin`, ...; a shard is full once it has
    `shard_tokens`, and ends there at the next document end, or with its file."""

    def __init__(
        self, directory: Path, name: str, sizes: np.ndarray, shard_tokens: int, member_tokens: int
    ):
        self._directory, self._name, self._sizes = directory, name, sizes
        self._shard_tokens, self._member_tokens = shard_tokens, member_tokens
        self.rows: list[dict[str, Any]] = []  # the manifest's
        self.files: dict[str, FileEntry] = {}
        self.totals = {"tokens": 0, "documents": 0, "bytes": 0}
        self._file: TokenFile | None = None
        self._clear()

    def _clear(self) -> None:
        self._members: list[dict[str, Any]] = []
        self._tokens = self._documents = 0  # of this shard
        self._ends_file: HashingFile | None = None
        self._next = -1  # offset in the file where the current member could continue
        self._empty()

    def _empty(self) -> None:
        self._held: list[np.ndarray] = []
        self._ends: list[np.ndarray] = []
        self._count = 0  # tokens held

    def add(self, file: TokenFile, offset: int, ids: np.ndarray, ends: np.ndarray) -> None:
        """Append tokens. ids: as stored at `offset`; ends: of the documents that end among them."""
        if self._file is not file:
            self.finish_shard()
            self._file = file
        self.totals["tokens"] += len(ids)
        self.totals["documents"] += len(ends)
        self.totals["bytes"] += int(self._sizes[ids].sum())
        while True:
            room = max(1, self._shard_tokens - self._tokens)
            full = int(np.searchsorted(ends, room))
            if full == len(ends):
                break
            stop = int(ends[full])
            self._append(offset, ids[:stop], ends[: full + 1])
            self.finish_shard()
            offset += stop * file.dtype.itemsize
            ids, ends = ids[stop:], ends[full + 1 :] - stop
        self._append(offset, ids, ends)

    def _append(self, offset: int, ids: np.ndarray, ends: np.ndarray) -> None:
        if offset != self._next:
            self._flush()
        self._next = offset + ids.nbytes
        while len(ids):
            if not self._count:
                self._offset = self._next - ids.nbytes
            part = ids[: self._member_tokens - self._count]
            inside = int(np.searchsorted(ends, len(part), side="right"))
            self._held.append(part)
            self._ends.append(ends[:inside] + self._count)
            self._count += len(part)
            self._tokens += len(part)
            if self._count == self._member_tokens:
                self._flush()
            ids, ends = ids[len(part) :], ends[inside:] - len(part)

    def _flush(self) -> None:
        if not self._count:
            return
        if self._ends_file is None:
            self._ends_file = HashingFile(self._directory / f"{self._shard_name}.doc.bin")
        tok = np.concatenate([ids.view(np.uint8) for ids in self._held]).data
        doc = np.concatenate(self._ends).astype("<u4")
        raw = doc.tobytes()
        place = {"file": self._ends_file.path.name, "offset": self._ends_file.size}
        self._members.append(
            {
                "key": f"{len(self._members):06d}",
                "first": self._tokens - self._count,
                "tokens": self._count,
                "documents": len(doc),
                "doc": {**place, "size": len(raw), "xxh3": xxhash.xxh3_64_hexdigest(raw)},
                "tok": {"offset": self._offset, "size": len(tok), "xxh3": chunk_sums(tok)},
            }
        )
        self._ends_file.write(raw)
        self._documents += len(doc)
        self._empty()

    @property
    def _shard_name(self) -> str:
        return f"{self._name}-{len(self.rows):06d}"

    def finish_shard(self) -> None:
        """Write the index of the current shard to disk; do nothing if it is empty."""
        self._flush()
        if self._file is None or self._ends_file is None:
            return
        index = {
            "file": self._file.where,
            "dtype": dtype_name(self._file.dtype),
            "tokens": self._tokens,
            "documents": self._documents,
            "members": self._members,
        }
        self.files[self._ends_file.path.name] = self._ends_file.finish()
        row, entry = write_index(self._directory, self._shard_name, index)
        self.files[row["index"]] = entry
        place = {"file": self._file.where, "size": self._file.size, "sha256": None}
        # The same for the same tokens and document ends, wherever they are stored.
        content = hashlib.sha256()
        for m in self._members:
            content.update(f"{m['tokens']} {m['tok']['xxh3']} {m['doc']['xxh3']}\n".encode())
        self.rows.append({**place, "content": content.hexdigest(), **row})
        self._clear()


def dtype_name(dtype: np.dtype) -> str:
    """Return the dtype as in a manifest: "uint16" for little-endian ids, ">u2" for others."""
    return dtype.str if dtype.str.startswith(">") else dtype.name
