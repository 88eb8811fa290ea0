"""Verified tokens of open shards, kept in memory under one limit for the process.

The data order alternates between the windows of a few shards until all of them are read. So a
shard's tokens are fetched and verified once, in large pieces, instead of window by window.

Invariant: tokens are `ready` only after their checksum was compared, in memory; at most
`limit` bytes are held, and the memory of the oldest shard is released first.
"""

import threading
import weakref

import numpy as np

CHUNK = 1 << 16  # bytes under one checksum; a multiple of every item size
_LIMIT = 512 << 20  # bytes; eight shards of 2^24 tokens are 256 MiB with uint16


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
        """Return memory for a shard, releasing that of older shards if necessary; None if the shard
        is larger than the limit."""
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
        """Return an array of tokens and its bytes; the previous ones if length and dtype are the
        same."""
        if length != self._length or dtype is not self._dtype:
            tokens = np.empty(length, dtype)
            self._buffer = tokens, tokens.view(np.uint8).data
            self._length, self._dtype = length, dtype
        return self._buffer


BUFFERS = Buffers()
