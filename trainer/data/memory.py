"""Verified tokens of open shards in memory, within one limit for the process.

The order reads the windows of a few shards in turn until all of these are read, so a shard's tokens
are fetched and compared with their checksums once, in large pieces, and not window by window.

Invariant: tokens are `ready` only after they were compared with their checksum, here, in memory;
no more than `limit` bytes are held, and those of the shard that came first go first.
"""

import threading
import weakref

import numpy as np

_LIMIT = 512 << 20  # bytes; eight shards of 2^24 tokens are 256 MiB with uint16


class Resident:
    """tokens: shape (num_tokens,), None once the memory was wanted for another shard; ready: a bool
    a chunk; whole: all of them are."""

    def __init__(self, num_tokens: int, dtype: np.dtype, chunks: int):
        # Memory of this size is the system's until it is written to: a shard takes what is read.
        self.tokens: np.ndarray | None = np.empty(num_tokens, dtype)
        self.size = self.tokens.nbytes
        self.ready, self.whole = np.zeros(chunks, bool), False


class Memory:
    """Grants the memory; safe from several threads."""

    def __init__(self, limit: int = _LIMIT):
        self.limit = limit
        self._lock = threading.Lock()
        self._granted: list[weakref.ref[Resident]] = []

    def grant(self, num_tokens: int, dtype: np.dtype, chunks: int) -> Resident | None:
        """Memory for a shard, if need be that of earlier ones; None if it is too large for any."""
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


MEMORY = Memory()
