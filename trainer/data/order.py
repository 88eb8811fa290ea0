"""Which window comes when: closed form for any g, with no state except g itself.

Windows are cut within a shard with stride L and hold L + 1 tokens, so that every token except a
shard's first is a target exactly once per epoch; a shard's last window may be shorter. Epoch e
permutes the shards and takes them in blocks of `shuffle_shards`; inside a block a keyed permutation
chooses the window. Both are Feistel networks, keyed by (seed, epoch, block).

Invariant: over any epoch, g -> window is a bijection; it depends only on the shards' token counts,
L, seed and shuffle_shards: not on ranks, workers, or where a run was resumed.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import isqrt
from typing import NamedTuple, Protocol

import numpy as np

from forescale.ground.errors import UserError

_ROUNDS = 8


def mix64(x: np.ndarray) -> np.ndarray:
    """Return SplitMix64's finaliser (Steele, Lea, Flood 2014) of an array of uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


class Permutation:
    """A keyed bijection of range(n), n < 2^62: a Feistel network over a grid of a x b >= n cells.

    The halves are added modulo a and b, so the grid is hardly larger than n (by less than its
    side). Cells beyond n are rare; they are mapped again until the result is below n (cycle
    walking).
    """

    def __init__(self, n: int, *key: int | str):
        """key: any integers and strings; equal keys give equal permutations."""
        a = isqrt(n) + 1
        self._n, self._a, self._b = np.uint64(n), np.uint64(a), np.uint64(-(-n // a))
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8 * _ROUNDS).digest()
        self._keys = np.frombuffer(digest, "<u8").astype(np.uint64)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return the images of positions x; int64 in [0, n), any shape."""
        return self._walk(x, self._forward)

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """Return the positions whose images are y; int64, any shape."""
        return self._walk(y, self._backward)

    def _walk(self, x: np.ndarray, step: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        x = step(np.asarray(x).astype(np.uint64))
        while (beyond := x >= self._n).any():
            x[beyond] = step(x[beyond])
        return x.astype(np.int64)

    def _forward(self, x: np.ndarray) -> np.ndarray:
        left, right = np.divmod(x, self._b)
        for i in range(0, _ROUNDS, 2):
            left = (left + mix64(right + self._keys[i]) % self._a) % self._a
            right = (right + mix64(left + self._keys[i + 1]) % self._b) % self._b
        return left * self._b + right

    def _backward(self, x: np.ndarray) -> np.ndarray:
        left, right = np.divmod(x, self._b)
        for i in range(_ROUNDS - 2, -1, -2):
            right = (right + self._b - mix64(left + self._keys[i + 1]) % self._b) % self._b
            left = (left + self._a - mix64(right + self._keys[i]) % self._a) % self._a
        return left * self._b + right


class Windows(NamedTuple):
    """Windows as arrays of one length.

    shard; start: first token in the shard, or the number of the bin in it; length: tokens in the
    window, targets + 1 (L + 1 or fewer).
    """

    shard: np.ndarray
    start: np.ndarray
    length: np.ndarray


class WindowCutter(Protocol):
    """How shards are cut into windows.

    counts: windows of each shard; targets: number of target tokens of each shard; int64 of shape
    (shards,).
    """

    counts: np.ndarray
    targets: np.ndarray

    def short(self, shards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of these shards' windows, numbered consecutively over the shards, have fewer
        than L targets, ascending, and how many are missing; int64 each, of one shape."""

    def cut(self, shard: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return start (see Windows) and length (targets + 1) of these windows."""


class Strides:
    """Cuts windows with stride L; the last window of a shard holds the rest."""

    def __init__(self, shard_tokens: Sequence[int], sequence_length: int):
        self._length, self._tokens = sequence_length, np.array(shard_tokens, np.int64)
        self.targets = np.maximum(self._tokens - 1, 0)
        self.counts = -(-self.targets // sequence_length)

    def short(self, shards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See WindowCutter: the last window of every shard, even if nothing is missing."""
        counts = self.counts[shards]
        return np.cumsum(counts) - 1, counts * self._length - self.targets[shards]

    def cut(self, shard: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return first token and number of tokens of windows given by shard and number."""
        start = number * self._length
        return start, np.minimum(self._length + 1, self._tokens[shard] - start)


class Order:
    """The order of a split's windows.

    shard_tokens: tokens of every shard; bins: cutter for packed windows, instead of windows of one
    stride. Raises UserError if no shard holds two tokens.
    """

    def __init__(
        self,
        shard_tokens: Sequence[int],
        sequence_length: int,
        seed: int,
        shuffle_shards: int,
        bins: WindowCutter | None = None,
    ):
        """Computes only the number of windows; the rest with the first request."""
        if sequence_length < 1 or shuffle_shards < 1:
            raise UserError(
                "train.sequence_length, data.shuffle_shards",
                "must be positive",
                "set both to 1 or more",
            )
        self.sequence_length, self.seed = sequence_length, seed
        self.shuffle_shards = shuffle_shards
        self._cut: WindowCutter = bins or Strides(shard_tokens, sequence_length)
        self._windows = self._cut.counts
        self._short = self._windows * sequence_length - self._cut.targets  # missing targets
        self.windows_per_epoch = int(self._windows.sum())
        self.targets_per_epoch = int(self._cut.targets.sum())
        if not self.windows_per_epoch:
            raise UserError("the training split", "has no shard with two tokens", "give more text")
        self._epoch = lru_cache(4)(self._make_epoch)
        self._block = lru_cache(16)(self._make_block)

    def window(self, g: int) -> tuple[int, int, int]:
        """Return (shard, start, length) of global sample index g; see Windows."""
        w = self.windows(g, g + 1)
        return int(w.shard[0]), int(w.start[0]), int(w.length[0])

    def windows(self, g0: int, g1: int) -> Windows:
        """Return the windows of [g0, g1) in order; int64 arrays of shape (g1 - g0,)."""
        parts = []
        while g0 < g1:
            epoch, position = divmod(g0, self.windows_per_epoch)
            block, inside = self._epoch(epoch).locate(position)
            within = self._block(epoch, block)
            count = min(g1 - g0, within.windows - inside)
            parts.append(self._place(within, np.arange(inside, inside + count)))
            g0 += count
        if not parts:
            return Windows(*np.empty((3, 0), np.int64))
        return (
            parts[0] if len(parts) == 1 else Windows(*map(np.concatenate, zip(*parts, strict=True)))
        )

    def targets(self, g0: int, g1: int) -> int:
        """Return the number of targets in windows [g0, g1): (g1 - g0) * L minus the missing targets
        of short windows.

        Costs a lookup in one or two blocks, however far apart g0 and g1 are.
        """
        return (g1 - g0) * self.sequence_length - self._lacking(g1) + self._lacking(g0)

    def _lacking(self, g: int) -> int:
        """Return the number of targets missing in the windows before g."""
        epoch, position = divmod(g, self.windows_per_epoch)
        whole = self.windows_per_epoch * self.sequence_length - self.targets_per_epoch
        order = self._epoch(epoch)
        block, inside = order.locate(position)
        return epoch * whole + order.lacking[block] + self._block(epoch, block).lacking(inside)

    def _place(self, block: "_Block", position: np.ndarray) -> Windows:
        picked = block.permutation(position)
        at = np.searchsorted(block.firsts, picked, side="right") - 1
        shard = block.shards[at]
        return Windows(shard, *self._cut.cut(shard, picked - block.firsts[at]))

    def _make_epoch(self, epoch: int) -> "_Epoch":
        shards = np.flatnonzero(self._windows)
        shards = shards[Permutation(len(shards), self.seed, epoch)(np.arange(len(shards)))]
        blocks = [
            shards[i : i + self.shuffle_shards] for i in range(0, len(shards), self.shuffle_shards)
        ]
        firsts, lacking = [0], [0]
        for block in blocks:
            firsts.append(firsts[-1] + int(self._windows[block].sum()))
            lacking.append(lacking[-1] + int(self._short[block].sum()))
        return _Epoch(blocks, firsts, lacking)

    def _make_block(self, epoch: int, block: int) -> "_Block":
        shards = self._epoch(epoch).blocks[block]
        return _Block(
            shards, self._windows[shards], self._cut.short(shards), (self.seed, epoch, block)
        )


class _Epoch(NamedTuple):
    """The blocks of shards of an epoch, and the windows and missing targets before each."""

    blocks: list[np.ndarray]
    firsts: list[int]
    lacking: list[int]

    def locate(self, position: int) -> tuple[int, int]:
        """Return the block that holds a position of the epoch, and the position inside it."""
        block = bisect_right(self.firsts, position) - 1
        return block, position - self.firsts[block]


class _Block:
    """The permuted windows of one block of shards."""

    def __init__(
        self,
        shards: np.ndarray,
        windows: np.ndarray,
        short: tuple[np.ndarray, np.ndarray],
        key: tuple[int, ...],
    ):
        self.shards, self.windows = shards, int(windows.sum())
        self.firsts = np.cumsum(windows) - windows
        self.permutation = Permutation(self.windows, *key)
        which, lacks = short  # below sorted by position, cumulated
        positions = self.permutation.inverse(which)
        order = np.argsort(positions)
        self._positions = positions[order]
        self._lacking = np.concatenate([[0], np.cumsum(lacks[order])])

    def lacking(self, position: int) -> int:
        """Return the number of targets missing in the block's windows before a position."""
        return int(self._lacking[np.searchsorted(self._positions, position)])
