"""One shard, open: where its members lie in a file, and tokens that are verified before use.

A shard is one sequence of tokens; members are only how it lies in the file. Every CHUNK bytes of a
member's tokens have a checksum in the index, so that a first window costs a chunk or two to verify,
not a member.

Invariant: no token is handed out before the checksum of its chunk has been compared with the
index's, and the index's with the manifest's, since the shard was opened.
"""

import hashlib
import json
import threading
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import xxhash

from forescale.data.memory import MEMORY, Resident
from forescale.data.remote.store import File, LocalFile, Store
from forescale.data.remote.transfer import Unreachable
from forescale.errors import UserError

FORMAT = 2  # of a dataset; the names of its files:
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
CHUNK = 1 << 16  # bytes: a multiple of every dtype's
_SHIFT = CHUNK.bit_length() - 1
_PLACE = ("offset", "size")
RESTORE = "restore it from a copy, or build the dataset again"


class Damaged(UserError):
    """A part of a shard that can't be used: it is cut off, unreadable, or not what was written.

    split, shard: which one; member: its key, or "" where the shard as a whole is at fault.
    """

    def __init__(
        self, where: str, what: str, todo: str, split: str = "", shard: int = -1, member: str = ""
    ):
        super().__init__(where, what, todo)
        self.split, self.shard, self.member = split, shard, member


class Member(NamedTuple):
    """A run of a shard's tokens that lie side by side in a file, as the index has it."""

    key: str
    first: int  # token of the shard
    tokens: int
    documents: int
    tok: dict[str, Any]  # offset, size, xxh3 of every chunk
    doc: dict[str, Any]  # offset, size, xxh3; file, where it isn't the shard's own


class Shard:
    """One shard, open. dtype: of the tokens as they are stored; split, number: for messages.

    Raises Damaged where index or file are missing, or aren't what the manifest's row says.
    """

    def __init__(self, store: Store, row: dict[str, Any], dtype: np.dtype, split: str, number: int):
        self.split, self.number, self.dtype = split, number, dtype
        self.num_tokens: int = row["tokens"]
        self.where = _path(store, row["file"])
        self._store, self._item = store, dtype.itemsize
        self.members = self._read_index(row)
        try:
            self.file: File = store.open(row["file"], row["size"], row["sha256"] or "")
        except UserError as e:
            raise self._unusable(e) from e
        self.is_local = isinstance(self.file, LocalFile)
        self._read_at = self.file.read_at
        self._firsts = [m.first for m in self.members] + [self.num_tokens]
        self._offsets = [m.tok["offset"] for m in self.members]
        self._chunks = [0]  # the number of each member's first chunk
        for m in self.members:
            self._chunks.append(self._chunks[-1] + -(-m.tok["size"] // CHUNK))
        self._verified = bytearray(self._chunks[-1])  # 1 for a chunk that may be handed out
        self._version = row["index_sha256"]
        self._resident: Resident | None = None
        self._asked = False  # for memory to keep tokens in
        self._ends_file: File | None = None
        self._ends: dict[int, np.ndarray] = {}

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()

    def _read_index(self, row: dict[str, Any]) -> list[Member]:
        where = _path(self._store, row["index"])
        name, size, want = row["index"], row["index_size"], row["index_sha256"]
        try:
            raw = self._store.read(name, size, want)
            if hashlib.sha256(raw).hexdigest() != want:
                raw = self._store.read(name)  # not what a cache holds
        except UserError as e:
            raise self._unusable(e) from e
        if hashlib.sha256(raw).hexdigest() != want:
            raise self._damaged(where, "damaged: its sha256 isn't the manifest's", RESTORE)
        try:
            members = [Member(**m) for m in json.loads(raw)["members"]]
            fault = _index_fault(members, row["tokens"], row["documents"], self._item)
            self._sums = bytes.fromhex("".join(m.tok["xxh3"] for m in members))
        except (KeyError, TypeError, ValueError) as e:
            fault = f"is no index of a shard ({e!r})"
        if fault:
            raise self._damaged(where, fault, RESTORE)
        return members

    def _damaged(self, where: str, what: str, todo: str, member: str = "") -> Damaged:
        return Damaged(where, what, todo, self.split, self.number, member)

    def touched(self, start: int, length: int) -> range:
        """The numbers of the members that hold tokens [start, start + length)."""
        if start < 0 or length < 0 or start + length > self.num_tokens:
            raise ValueError(f"[{start}, {start + length}) of {self.num_tokens} tokens")
        if not length:
            return range(0)
        first = bisect_right(self._firsts, start) - 1
        return range(first, bisect_right(self._firsts, start + length - 1))

    def read_into(self, start: int, out: np.ndarray) -> None:
        """Fill `out` (1-D, any dtype that holds the ids) with the tokens from `start` on.

        Raises Damaged.
        """
        tokens, view = _held.buffer(len(out), self.dtype)
        self._read(start, len(tokens), view)
        out[:] = tokens

    def read_rows(
        self, rows: Sequence[int] | np.ndarray, starts: Sequence[int] | np.ndarray, out: np.ndarray
    ) -> None:
        """Fill rows of `out`, shape (any, length), each with the tokens from its start on.

        Keeps what it reads in memory, as far as there is room (forescale.data.memory).
        """
        if not self._asked:
            self._resident = MEMORY.grant(self.num_tokens, self.dtype, self._chunks[-1])
            self._asked = True
        length, resident = out.shape[1], self._resident
        if resident is None or (kept := resident.tokens) is None:
            tokens, view = _held.buffer(length, self.dtype)
            for row, start in zip(rows, starts, strict=True):
                self._read(int(start), length, view)
                out[row] = tokens
            return
        firsts = np.asarray(starts, np.int64)
        if not len(firsts):
            return
        shape = (self.num_tokens - length + 1, length)
        if int(firsts.view(np.uint64).max()) >= shape[0]:  # so that one below 0 is large, too
            raise ValueError(f"windows of {length} beyond {self.num_tokens} tokens")
        if not resident.whole:
            self._keep(resident, kept, firsts, length)
        windows = np.ndarray(shape, self.dtype, kept, strides=(self._item, self._item))
        out[rows] = windows[firsts]

    @cached_property
    def _chunk_firsts(self) -> np.ndarray:
        """The first token of every chunk."""
        step = CHUNK // self._item
        return np.concatenate([np.arange(m.first, m.first + m.tokens, step) for m in self.members])

    def _keep(self, resident: Resident, kept: np.ndarray, starts: np.ndarray, length: int) -> None:
        """Have the chunks of these windows in memory, verified."""
        first = np.searchsorted(self._chunk_firsts, starts, side="right") - 1
        last = np.searchsorted(self._chunk_firsts, starts + (length - 1), side="right") - 1
        ready = resident.ready
        lacking = np.flatnonzero(~(ready[first] & ready[last]) | (last - first > 1))
        for a, b in zip(first[lacking].tolist(), last[lacking].tolist(), strict=True):
            for chunk in range(a, b + 1):
                if not ready[chunk]:
                    self._keep_chunk(chunk, kept)
                    ready[chunk] = True
        if len(lacking):
            resident.whole = bool(ready.all())

    def _keep_chunk(self, chunk: int, kept: np.ndarray) -> None:
        begin, at = int(self._chunk_firsts[chunk]), bisect_right(self._chunks, chunk) - 1
        end = min(begin + CHUNK // self._item, self._firsts[at + 1])
        held = _held.chunk[: (end - begin) * self._item]
        self._read_chunk(at, chunk - self._chunks[at], held)
        # Only now: another thread may be reading its neighbours, or this very chunk.
        kept[begin:end] = np.frombuffer(held, self.dtype)

    def _read(self, start: int, length: int, out: memoryview) -> None:
        """Tokens [start, start + length) as they are stored, verified."""
        firsts = self._firsts
        at = bisect_right(firsts, start, 1, len(firsts) - 1) - 1
        # The common case on its own and in few steps: inside one member, all of it verified.
        if firsts[at] <= start and start + length <= firsts[at + 1]:
            skip, chunk = (start - firsts[at]) * self._item, self._chunks[at]
            end = chunk + (skip + len(out) - 1 >> _SHIFT) + 1
            if self._verified.find(0, chunk + (skip >> _SHIFT), end) < 0:
                self._fetch(at, skip, out)
                return
        for at in self.touched(start, length):
            a, b = max(start, firsts[at]), min(start + length, firsts[at + 1])
            part = out[(a - start) * self._item : (b - start) * self._item]
            self._fill(at, (a - firsts[at]) * self._item, part)

    def _fill(self, at: int, skip: int, out: memoryview) -> None:
        """Bytes of member `at` from `skip` on, verified chunk by chunk."""
        end, first = skip + len(out), self._chunks[at]
        for number in range(skip >> _SHIFT, (end - 1 >> _SHIFT) + 1):
            begin = number << _SHIFT
            length = min(CHUNK, self.members[at].tok["size"] - begin)
            a, b = max(begin, skip), min(begin + length, end)
            if self._verified[first + number]:
                self._fetch(at, a, out[a - skip : b - skip])
            elif b - a == length:
                self._read_chunk(at, number, out[a - skip : b - skip])
            else:
                held = _held.chunk[:length]
                self._read_chunk(at, number, held)
                out[a - skip : b - skip] = held[a - begin : b - begin]

    def _read_chunk(self, at: int, number: int, into: memoryview) -> None:
        """Read chunk `number` of member `at` whole, and mark it as verified."""
        offset, of_shard = self._offsets[at] + number * CHUNK, self._chunks[at] + number
        want = self._sums[8 * of_shard : 8 * of_shard + 8]

        def read() -> bool:
            self._fetch(at, number * CHUNK, into)
            return xxhash.xxh3_64_digest(into) == want

        if not read() and not (self.file.forget(offset, len(into)) and read()):
            key, end = self.members[at].key, offset + len(into)
            what = f"member {key} is damaged: bytes {offset:,} to {end:,} lack their checksum"
            raise self._damaged(self.where, what, RESTORE, key)
        self._verified[of_shard] = 1

    def _fetch(self, at: int, skip: int, into: memoryview) -> None:
        """Bytes of member `at` from `skip` on, as they are."""
        try:
            self._read_at(self._offsets[at] + skip, into)
        except UserError as e:
            raise self._unusable(e, self.members[at].key) from e

    def _unusable(self, e: UserError, member: str = "") -> UserError:
        """What stands for a fault of the storage. A server that doesn't answer says nothing of the
        bytes: other windows must not stand in for them."""
        if isinstance(e, Unreachable):
            return e
        what = f"member {member}: {e.what}" if member else e.what
        return self._damaged(e.where, what, e.todo, member)

    def ends(self, at: int) -> np.ndarray:
        """Ends of the documents that end in member `at`, exclusive, counted from the shard's first
        token; int64. Verified."""
        if at not in self._ends:
            self._ends[at] = self._read_ends(at) + self.members[at].first
        return self._ends[at]

    def _read_ends(self, at: int) -> np.ndarray:
        member, doc = self.members[at], self.members[at].doc
        data = memoryview(bytearray(doc["size"]))

        def read() -> bool:
            file.read_at(doc["offset"], data)
            return xxhash.xxh3_64_hexdigest(data) == doc["xxh3"]

        try:
            file = self._file_of(doc)
            good = read() or (file.forget(doc["offset"], doc["size"]) and read())
        except UserError as e:
            raise self._unusable(e, self.members[at].key) from e
        if not good:
            where = _path(self._store, doc["file"]) if "file" in doc else self.where
            what = f"member {member.key} is damaged: its document ends lack their checksum"
            raise self._damaged(where, what, RESTORE, member.key)
        return np.frombuffer(data, "<u4").astype(np.int64)

    def _file_of(self, doc: dict[str, Any]) -> File:
        if "file" not in doc:
            return self.file
        if self._ends_file is None:
            self._ends_file = self._store.open(doc["file"], None, self._version)
        return self._ends_file

    def document_ends(self, start: int, length: int) -> np.ndarray:
        """Ends, exclusive and relative to `start`, in (0, length]; int64."""
        parts = []
        for at in self.touched(start, length):
            ends = self.ends(at)
            a, b = np.searchsorted(ends, (start, start + length), side="right")
            parts.append(ends[a:b] - start)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def byte_ranges(self, start: int, length: int) -> list[tuple[int, int]]:
        """(offset, size) of the chunks that hold these tokens."""
        ranges = []
        for at in self.touched(start, length):
            member = self.members[at]
            a = max(start - member.first, 0) * self._item // CHUNK * CHUNK
            b = min(start + length - member.first, member.tokens) * self._item
            b = min(-(-b // CHUNK) * CHUNK, member.tok["size"])
            ranges.append((member.tok["offset"] + a, b - a))
        return ranges


class _Held(threading.local):
    """What a thread reads into before the tokens go where they are wanted, in another dtype."""

    def __init__(self) -> None:
        self.chunk = np.empty(CHUNK, np.uint8).data
        self._length, self._dtype = -1, np.dtype(np.uint16)

    def buffer(self, length: int, dtype: np.dtype) -> tuple[np.ndarray, memoryview]:
        """Tokens and the same as bytes; those of the last call where it asked for the same."""
        if length != self._length or dtype is not self._dtype:
            tokens = np.empty(length, dtype)
            self._kept = tokens, tokens.view(np.uint8).data
            self._length, self._dtype = length, dtype
        return self._kept


_held = _Held()


def _index_fault(members: list[Member], tokens: int, documents: int, item: int) -> str | None:
    """What in an index can't be, whatever its file holds: positions that don't follow on each
    other would hand out tokens of somewhere else, with checksums that agree."""
    firsts = [m.first for m in members] + [tokens]
    if firsts[0]:
        return "its members don't begin with the first token"
    for m, (first, after) in zip(members, pairwise(firsts), strict=True):
        places = (m.first, m.tokens, m.documents, *(p[k] for p in (m.tok, m.doc) for k in _PLACE))
        if any(type(number) is not int or number < 0 for number in places):
            return f"its member {m.key} lies nowhere"
        if m.tokens < 1 or first + m.tokens != after or m.tok["size"] != m.tokens * item:
            return f"the tokens of its member {m.key} don't fit the others"
        if len(m.tok["xxh3"]) != -(-m.tok["size"] // CHUNK) * 16:
            return f"its member {m.key} has other sizes than checksums"
        if m.doc["size"] != m.documents * 4:
            return f"its member {m.key} has other sizes than documents"
    if sum(m.documents for m in members) != documents:
        return "its documents aren't as many as the manifest says"
    return None


def _path(store: Store, name: str) -> str:
    """How a file of a dataset is called in a message."""
    if "://" in name or name.startswith("/"):
        return name
    return f"{store.where.rstrip('/')}/{name}"
