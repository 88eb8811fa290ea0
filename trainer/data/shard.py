"""One open shard: where its members lie in a file, and reading tokens that are verified before use.

A shard is one sequence of tokens; its members are consecutive parts of it in the file. The index
holds a checksum for every CHUNK bytes of a member's tokens, so reading the first window verifies
one or two chunks, not a whole member.

Invariant: a token is returned only after its chunk was compared with the checksum in the index, and
the index with the manifest, since the shard was opened.

The data order alternates between the windows of a few shards until all of them are read. So a
shard's tokens are fetched and verified once, in large pieces, and kept in memory under one limit
for the process, the oldest shard released first.
"""

# ruff: noqa: UP013 - the types of stored values, in as many lines as they need
import hashlib
import threading
import weakref
from bisect import bisect_right
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple, NotRequired

import numpy as np
import xxhash
from typing_extensions import TypedDict

from forescale.ground.errors import UserError
from forescale.ground.foreign import parse_json
from forescale.ground.typed import Count, Size, typed
from forescale.remote.store import File, LocalFile, Store
from forescale.remote.transfer import WrongFile

FORMAT = 2  # version of the dataset format
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
CHUNK = 1 << 16  # bytes under one checksum; a multiple of every item size
_LIMIT = 512 << 20  # bytes; eight shards of 2^24 tokens are 256 MiB with uint16
_SHIFT = CHUNK.bit_length() - 1
RESTORE = "restore it from a copy or build the dataset again"


class Damaged(UserError):
    """A part of a shard that can't be used: missing, truncated, or with a wrong checksum. The
    content proves it; storage that only fails to read raises other errors.

    split, shard: which shard; member: its key, or "" if the shard as a whole is damaged.
    """

    def __init__(
        self,
        where: str,
        problem: str,
        todo: str,
        split: str = "",
        shard: int = -1,
        member: str = "",
    ):
        super().__init__(where, problem, todo)
        self.split, self.shard, self.member = split, shard, member


# A row of the manifest. sha256: None of a file that is used in place, which has `content` instead.
# fmt: off
StoredShard = TypedDict("StoredShard", {
    "file": str, "size": Count, "sha256": str | None, "content": NotRequired[str], "index": str,
    "index_size": Count, "index_sha256": str, "tokens": Count, "documents": Count,
})
# Bytes of a file: the shard's own unless it is given. xxh3: 16 hex digits, of tokens those of every
# chunk.
Place = TypedDict("Place", {
    "offset": Count, "size": Count, "xxh3": str, "file": NotRequired[str],
})
# fmt: on


class Member(NamedTuple):
    """Consecutive tokens of a shard, stored together in a file; an entry of the index."""

    key: str
    first: Count  # token of the shard
    tokens: Size
    documents: Count
    tok: Place
    doc: Place
    learned: Place | None = None  # only of conversations


class Resident:
    """Memory for one shard's tokens.

    tokens: shape (num_tokens,), None after the memory was released for another shard; ready: bool
    per chunk; complete: True if all chunks are ready.
    """

    def __init__(self, num_tokens: int, dtype: np.dtype, chunks: int):
        # The system provides pages of this size on first write: only what is read takes memory.
        self.tokens: np.ndarray | None = np.empty(num_tokens, dtype)
        self.size = self.tokens.nbytes
        self.ready, self.complete = np.zeros(chunks, bool), False


class ShardMemory:
    """Grants memory to shards, at most `limit` bytes in total; safe from several threads."""

    def __init__(self, limit: int = _LIMIT):
        self.limit = limit
        self._lock = threading.Lock()
        self._granted: list[weakref.ref[Resident]] = []

    def grant(self, num_tokens: int, dtype: np.dtype, chunks: int) -> Resident | None:
        """Return memory for a shard, taken from older ones if necessary; None beyond the limit."""
        size = num_tokens * dtype.itemsize
        if size > self.limit:
            return None
        with self._lock:
            held = [r for ref in self._granted if (r := ref()) is not None and r.tokens is not None]
            room = self.limit - sum(r.size for r in held)
            while room < size:
                first = held.pop(0)
                first.tokens = None
                room += first.size
            granted = Resident(num_tokens, dtype, chunks)
            self._granted = [*map(weakref.ref, held), weakref.ref(granted)]
        return granted


MEMORY = ShardMemory()


class Buffers(threading.local):
    """Buffers of a thread for tokens that are read before they are converted to another dtype."""

    def __init__(self) -> None:
        self.chunk = np.empty(CHUNK, np.uint8).data
        self._length, self._dtype = -1, np.dtype(np.uint16)

    def buffer(self, length: int, dtype: np.dtype) -> tuple[np.ndarray, memoryview]:
        """Return an array of tokens and its bytes, the previous ones if they fit."""
        if length != self._length or dtype is not self._dtype:
            tokens = np.empty(length, dtype)
            self._buffer = tokens, tokens.view(np.uint8).data
            self._length, self._dtype = length, dtype
        return self._buffer


BUFFERS = Buffers()


class Shard:
    """One open shard. dtype: of the tokens as stored; split, number: for messages.

    Raises Damaged if the index or the file is missing or doesn't match the manifest.
    """

    def __init__(self, store: Store, row: StoredShard, dtype: np.dtype, split: str, number: int):
        """Open the file and read the index of the shard that `row` of the manifest describes."""
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
        self._memory_requested = False
        self._ends_file: File | None = None
        self._ends: dict[int, np.ndarray] = {}

    def __del__(self) -> None:
        if hasattr(self, "file"):
            self.file.close()

    def _read_index(self, row: StoredShard) -> list[Member]:
        where = _path(self._store, row["index"])
        name, size, want = row["index"], row["index_size"], row["index_sha256"]
        try:
            raw = self._store.read(name, size, want)
            if hashlib.sha256(raw).hexdigest() != want:
                raw = self._store.read(name)  # the cached copy may be damaged
        except UserError as e:
            raise self._unusable(e) from e
        if hashlib.sha256(raw).hexdigest() != want:
            raise self._damaged(where, "damaged: its sha256 differs from the manifest's", RESTORE)
        try:
            members = typed(list[Member], parse_json(raw, where)["members"], where)
            fault = _index_fault(members, row["tokens"], row["documents"], self._item)
            self._sums = bytes.fromhex("".join(m.tok["xxh3"] for m in members))
        except UserError as e:
            fault = f"not a valid shard index: {e.problem}"
        except (KeyError, TypeError, ValueError) as e:
            fault = f"not a valid shard index ({e!r})"
        if fault:
            raise self._damaged(where, fault, RESTORE)
        return members

    def _damaged(self, where: str, problem: str, todo: str, member: str = "") -> Damaged:
        return Damaged(where, problem, todo, self.split, self.number, member)

    def touched(self, start: int, length: int) -> range:
        """Return the numbers of the members that hold tokens [start, start + length)."""
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
        tokens, view = BUFFERS.buffer(len(out), self.dtype)
        self._read(start, len(tokens), view)
        out[:] = tokens

    def read_rows(
        self, rows: Sequence[int] | np.ndarray, starts: Sequence[int] | np.ndarray, out: np.ndarray
    ) -> None:
        """Fill the given rows of `out`, shape (any, length), each with the tokens from its start
        on.

        Keeps the chunks that it reads in memory if there is room (ShardMemory).
        """
        if not self._memory_requested:
            self._resident = MEMORY.grant(self.num_tokens, self.dtype, self._chunks[-1])
            self._memory_requested = True
        length, resident = out.shape[1], self._resident
        if resident is None or (memory := resident.tokens) is None:
            tokens, view = BUFFERS.buffer(length, self.dtype)
            for row, start in zip(rows, starts, strict=True):
                self._read(int(start), length, view)
                out[row] = tokens
            return
        firsts = np.asarray(starts, np.int64)
        if not len(firsts):
            return
        shape = (self.num_tokens - length + 1, length)
        if int(firsts.view(np.uint64).max()) >= shape[0]:  # a negative start becomes large too
            raise ValueError(f"windows of {length} beyond {self.num_tokens} tokens")
        if not resident.complete:
            self._load(resident, memory, firsts, length)
        windows = np.ndarray(shape, self.dtype, memory, strides=(self._item, self._item))
        out[rows] = windows[firsts]

    @cached_property
    def _chunk_firsts(self) -> np.ndarray:
        """The first token of every chunk, int64."""
        step = CHUNK // self._item
        return np.concatenate([np.arange(m.first, m.first + m.tokens, step) for m in self.members])

    def _load(
        self, resident: Resident, memory: np.ndarray, starts: np.ndarray, length: int
    ) -> None:
        """Load and verify the chunks of these windows into `memory`."""
        first = np.searchsorted(self._chunk_firsts, starts, side="right") - 1
        last = np.searchsorted(self._chunk_firsts, starts + (length - 1), side="right") - 1
        ready = resident.ready
        lacking = np.flatnonzero(~(ready[first] & ready[last]) | (last - first > 1))
        for a, b in zip(first[lacking].tolist(), last[lacking].tolist(), strict=True):
            for chunk in range(a, b + 1):
                if ready[chunk]:
                    continue
                begin, at = int(self._chunk_firsts[chunk]), bisect_right(self._chunks, chunk) - 1
                end = min(begin + CHUNK // self._item, self._firsts[at + 1])
                data = BUFFERS.chunk[: (end - begin) * self._item]
                self._read_chunk(at, chunk - self._chunks[at], data)
                # Copied only when verified: another thread may be reading it or its neighbours.
                memory[begin:end] = np.frombuffer(data, self.dtype)
                ready[chunk] = True
        if len(lacking):
            resident.complete = bool(ready.all())

    def _read(self, start: int, length: int, out: memoryview) -> None:
        """Copy tokens [start, start + length), verified and as they are stored, into `out`."""
        firsts = self._firsts
        at = bisect_right(firsts, start, 1, len(firsts) - 1) - 1
        # Fast path for the common case: inside one member, all chunks verified already.
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
        """Copy bytes of member `at` from `skip` on, verified chunk by chunk."""
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
                held = BUFFERS.chunk[:length]
                self._read_chunk(at, number, held)
                out[a - skip : b - skip] = held[a - begin : b - begin]

    def _read_chunk(self, at: int, number: int, into: memoryview) -> None:
        """Read chunk `number` of member `at` completely and mark it as verified."""
        offset, of_shard = self._offsets[at] + number * CHUNK, self._chunks[at] + number
        want = self._sums[8 * of_shard : 8 * of_shard + 8]

        def read() -> bool:
            self._fetch(at, number * CHUNK, into)
            return xxhash.xxh3_64_digest(into) == want

        if not read() and not (self.file.forget(offset, len(into)) and read()):
            key, end = self.members[at].key, offset + len(into)
            problem = (
                f"member {key} is damaged: bytes {offset:,} to {end:,} don't match their checksum"
            )
            raise self._damaged(self.where, problem, RESTORE, key)
        self._verified[of_shard] = 1

    def _fetch(self, at: int, skip: int, into: memoryview) -> None:
        """Copy bytes of member `at` from `skip` on, without verifying them."""
        try:
            self._read_at(self._offsets[at] + skip, into)
        except UserError as e:
            raise self._unusable(e, self.members[at].key) from e

    def _unusable(self, e: UserError, member: str = "") -> UserError:
        """Return the error to raise for a storage error. A failing or refusing storage proves no
        damage of the bytes: other windows must not replace these."""
        if not isinstance(e, WrongFile):
            return e
        problem = f"member {member}: {e.problem}" if member else e.problem
        return self._damaged(e.where, problem, e.todo, member)

    def ends(self, at: int) -> np.ndarray:
        """Return the exclusive ends of the documents that end in member `at`, counted from the
        shard's first token; int64, verified."""
        if at not in self._ends:
            raw = self._read_whole(at, self.members[at].doc, "document ends don't")
            self._ends[at] = np.frombuffer(raw, "<u4").astype(np.int64) + self.members[at].first
        return self._ends[at]

    def learned(self, at: int) -> np.ndarray | None:
        """Return True for the tokens of a member that count in the loss, bool; or None."""
        if (member := self.members[at]).learned is None:
            return None
        raw = self._read_whole(at, member.learned, "learned tokens don't")
        return np.unpackbits(np.frombuffer(raw, np.uint8), count=member.tokens) > 0

    def _read_whole(self, at: int, doc: Place, mismatch: str) -> memoryview:
        """Return a file of member `at`, verified. mismatch: the start of a message."""
        member, data = self.members[at], memoryview(bytearray(doc["size"]))

        def read() -> bool:
            file.read_at(doc["offset"], data)
            return xxhash.xxh3_64_hexdigest(data) == doc["xxh3"]

        try:
            if "file" in doc and self._ends_file is None:
                self._ends_file = self._store.open(doc["file"], None, self._version)
            file = self._ends_file if "file" in doc and self._ends_file else self.file
            good = read() or (file.forget(doc["offset"], doc["size"]) and read())
        except UserError as e:
            raise self._unusable(e, member.key) from e
        if not good:
            where = _path(self._store, doc["file"]) if "file" in doc else self.where
            problem = f"member {member.key} is damaged: its {mismatch} match their checksum"
            raise self._damaged(where, problem, RESTORE, member.key)
        return data

    def document_ends(self, start: int, length: int) -> np.ndarray:
        """Return the document ends inside [start, start + length), relative to start; int64."""
        parts = []
        for at in self.touched(start, length):
            ends = self.ends(at)
            a, b = np.searchsorted(ends, (start, start + length), side="right")
            parts.append(ends[a:b] - start)
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def byte_ranges(self, start: int, length: int) -> list[tuple[int, int]]:
        """Return (offset, size) of the chunks that hold these tokens, one pair per member."""
        ranges = []
        for at in self.touched(start, length):
            member = self.members[at]
            a = max(start - member.first, 0) * self._item // CHUNK * CHUNK
            b = min(start + length - member.first, member.tokens) * self._item
            b = min(-(-b // CHUNK) * CHUNK, member.tok["size"])
            ranges.append((member.tok["offset"] + a, b - a))
        return ranges


def _index_fault(members: list[Member], tokens: int, documents: int, item: int) -> str | None:
    """Return what is inconsistent in an index, or None. Positions that don't follow each other
    would return tokens from elsewhere, although their checksums match."""
    firsts = [m.first for m in members] + [tokens]
    if firsts[0]:
        return "its first member doesn't begin at token 0"
    for m, (first, after) in zip(members, pairwise(firsts), strict=True):
        if first + m.tokens != after or m.tok["size"] != m.tokens * item:
            return f"the token counts or sizes of its member {m.key} are inconsistent"
        if len(m.tok["xxh3"]) != -(-m.tok["size"] // CHUNK) * 16:
            return f"the number of checksums of its member {m.key} doesn't match its size"
        if m.doc["size"] != m.documents * 4:
            return f"the number of documents of its member {m.key} doesn't match its size"
        if m.learned is not None and m.learned["size"] != -(-m.tokens // 8):
            return f"the learned tokens of its member {m.key} don't match its size"
    if sum(m.documents for m in members) != documents:
        return "its number of documents differs from the manifest's"
    return None


def _path(store: Store, name: str) -> str:
    """Return a file of a dataset as messages name it."""
    if "://" in name or name.startswith("/"):
        return name
    return f"{store.where.rstrip('/')}/{name}"
