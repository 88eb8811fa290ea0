"""Several sources as one sequence: for every g the source and its window, in closed form.

A stage begins at its first g and gives every source a share. It consists of blocks: after k windows
of a stage, at every block's end, each source has had its share of k to within one window (largest
remainders); inside a block a keyed permutation mixes the sources. A source's windows come in the
source's own order (forescale.data.order) without a gap, whatever comes between them.

Invariant: g -> (source, its next window) depends only on the shares, the sources' orders and the
seed; a source's windows are counted through all stages, so no window is repeated within an epoch of
the source.
"""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil, lcm
from typing import NamedTuple

import numpy as np

from forescale.data.order import Order, Permutation

_BLOCK = 1024  # windows at least; more if a share is too small for one window per block
_LEAST = Fraction(1, 1 << 20)
_MANY = 1 << 16  # windows whose places are computed at once
Interval = tuple[int, int]


class Places(NamedTuple):
    """Windows as int64 arrays of one length: source, shard, start, length; see order.Windows."""

    source: np.ndarray
    shard: np.ndarray
    start: np.ndarray
    length: np.ndarray

    def lists(self) -> list[list[int]]:
        """Return the columns as lists of Python integers."""
        return [column.tolist() for column in self]


@dataclass(frozen=True)
class MixtureStage:
    """From sample `first` on, sources have shares in proportion to `weights` (0: none)."""

    first: int
    weights: tuple[Fraction, ...]

    @classmethod
    def of(cls, first: int, weights: Sequence[float]) -> "MixtureStage":
        """Return a stage whose weights are exactly the decimal numbers written: 0.1 is one tenth.
        Raises ValueError if weights are negative, all 0, or a share is below a millionth."""
        exact = tuple(Fraction(str(w)) for w in weights)
        total = sum(exact)
        if total <= 0 or min(exact) < 0:
            raise ValueError("weights must not be negative, nor all of them 0")
        if any(0 < w / total < _LEAST for w in exact):
            raise ValueError("a share is below a millionth; increase it, or set it to 0")
        return cls(first, exact)


class Mixture:
    """The order of a mixture's windows. orders: of every source by name.

    Raises ValueError if the stages don't begin at sample 0 or aren't in ascending order.
    """

    def __init__(self, orders: Mapping[str, Order], stages: Sequence[MixtureStage], seed: int):
        """Computes only the counts before each stage; the rest with the first request."""
        self.names, self.orders = list(orders), list(orders.values())
        firsts = [stage.first for stage in stages]
        if not firsts or firsts[0] != 0 or sorted(set(firsts)) != firsts:
            raise ValueError("stages must begin at sample 0 and be in ascending order")
        self._firsts, self._seed = firsts, seed
        self._stages = [_Shares(stage.weights) for stage in stages]
        self._before = [np.zeros(len(orders), np.int64)]  # each source's windows before a stage
        for shares, a, b in zip(self._stages, firsts, firsts[1:], strict=False):
            self._before.append(self._before[-1] + shares.counts(b - a))
        self._block = lru_cache(16)(self._make_block)

    @property
    def sequence_length(self) -> int:
        """Targets of a full window, the same for all sources."""
        return self.orders[0].sequence_length

    def samples(self, g: int) -> np.ndarray:
        """Return the windows that each source has given before g: int64 of shape (sources,)."""
        block = self._block(*self._locate(g))
        return block.base + block.counts(g - block.first)

    def places(self, g0: int, g1: int) -> Places:
        """Return the windows of [g0, g1), in order."""
        places = Places(*np.empty((4, g1 - g0), np.int64))
        at = g0
        while at < g1:
            block = self._block(*self._locate(at))
            end = min(g1, block.first + len(block.labels))
            labels = block.labels[at - block.first : end - block.first]
            lows, highs = self.samples(at), self.samples(end)
            for source, order in enumerate(self.orders):
                if lows[source] < highs[source]:
                    where = np.flatnonzero(labels == source) + (at - g0)
                    windows = order.windows(int(lows[source]), int(highs[source]))
                    places.source[where] = source
                    places.shard[where], places.start[where], places.length[where] = windows
            at = end
        return places

    def targets(self, g0: int, g1: int) -> np.ndarray:
        """Return each source's targets in the windows of [g0, g1): int64 of shape (sources,)."""
        spans = zip(self.orders, self.samples(g0).tolist(), self.samples(g1).tolist(), strict=True)
        return np.array([order.targets(low, high) for order, low, high in spans], np.int64)

    def epochs(self, g: int) -> dict[str, float]:
        """Return how many times each source has been read before g, by name."""
        windows = zip(self.names, self.orders, self.samples(g).tolist(), strict=True)
        return {name: count / order.windows_per_epoch for name, order, count in windows}

    def numbers(self, g0: int, g1: int) -> np.ndarray:
        """Return the numbers of these windows among those of all members: int64."""
        return np.arange(g0, g1)

    def _locate(self, g: int) -> tuple[int, int]:
        """Return the stage that holds g, and the number of the block in it."""
        stage = bisect_right(self._firsts, g) - 1
        return stage, min((g - self._firsts[stage]) // self._stages[stage].block, self._last(stage))

    def _last(self, stage: int) -> int:
        """Return the last block of a stage. It includes the remainder of the stage: the counts of a
        short block are differences of rounded numbers and could be negative."""
        if stage + 1 == len(self._firsts):
            return 1 << 62
        length = self._firsts[stage + 1] - self._firsts[stage]
        return max(0, length // self._stages[stage].block - 1)

    def _make_block(self, stage: int, number: int) -> "_Block":
        shares = self._stages[stage]
        low, high = number * shares.block, (number + 1) * shares.block
        if number == self._last(stage):
            high = self._firsts[stage + 1] - self._firsts[stage]
        before = shares.counts(low)
        counts = shares.counts(high) - before
        labels = np.repeat(np.arange(len(counts)), counts)
        if len(counts) > 1:
            mixed = Permutation(high - low, self._seed, "mixture", stage, number)
            labels = labels[mixed(np.arange(high - low))]
        return _Block(self._firsts[stage] + low, self._before[stage] + before, labels)


class MemberMixture(Mixture):
    """The windows of a mixture that one of `count` members of a run reads: its g-th is the window
    g * count + index of the mixture. So the members between them read each window once, as a run
    whose batch is that of all of them."""

    def __init__(
        self,
        orders: Mapping[str, Order],
        stages: Sequence[MixtureStage],
        seed: int,
        index: int,
        count: int,
    ):
        """stages: of the mixture of all members."""
        super().__init__(orders, stages, seed)
        self._index, self._count = index, count

    def places(self, g0: int, g1: int) -> Places:
        first = g0 * self._count
        every = super().places(first, first + (g1 - g0) * self._count)
        return Places(*(column[self._index :: self._count] for column in every))

    def targets(self, g0: int, g1: int) -> np.ndarray:
        total = np.zeros(len(self.orders), np.int64)
        for g in range(g0, g1, _MANY):
            places = self.places(g, min(g1, g + _MANY))
            np.add.at(total, places.source, places.length - 1)
        return total

    def epochs(self, g: int) -> dict[str, float]:
        """Return how many times all members together have read each source before g, by name."""
        return super().epochs(g * self._count)

    def numbers(self, g0: int, g1: int) -> np.ndarray:
        return np.arange(g0, g1) * self._count + self._index


class _Block:
    """A block of the mixture. first: its first g; base: each source's windows before it; labels:
    the source at each g."""

    def __init__(self, first: int, base: np.ndarray, labels: np.ndarray):
        self.first, self.base, self.labels = first, base, labels
        self._positions = [np.flatnonzero(labels == s) for s in range(len(base))]

    def counts(self, position: int) -> np.ndarray:
        """Return the number of windows of each source among the block's first `position`."""
        return np.array([np.searchsorted(p, position) for p in self._positions], np.int64)


class _Shares:
    """Converts shares to whole windows, exactly: Hamilton's method of largest remainders."""

    def __init__(self, weights: Sequence[Fraction]):
        denominator = lcm(*(w.denominator for w in weights))
        self._weights = [int(w * denominator) for w in weights]
        self._total = sum(self._weights)
        # At least two windows of the rarest: then no difference of rounded counts is negative.
        rarest = min(w for w in self._weights if w)
        self.block = max(_BLOCK, ceil(Fraction(2 * self._total, rarest)))

    def counts(self, windows: int) -> np.ndarray:
        """Return each source's part of the first `windows`, within one of its share: int64."""
        parts = [divmod(w * windows, self._total) for w in self._weights]
        counts = [whole for whole, _ in parts]
        by_rest = sorted(range(len(parts)), key=lambda i: -parts[i][1])
        for i in by_rest[: windows - sum(counts)]:
            counts[i] += 1
        return np.array(counts, np.int64)


def unskipped(skipped: Sequence[Interval], g: int, count: int) -> list[Interval]:
    """Return the next `count` samples from g on that lie in no skipped interval, as intervals.

    skipped: half-open intervals, sorted, not overlapping.
    """
    intervals: list[Interval] = []
    for first, after in (*skipped, (1 << 62, 1 << 62)):  # the last one has no practical end
        end = min(first, g + count)
        if g < end:
            intervals.append((g, end))
            count -= end - g
        g = max(g, after)
        if not count:
            break
    return intervals


def merged_intervals(intervals: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Return half-open intervals of samples, sorted and merged so that none overlap or touch."""
    merged: list[tuple[int, int]] = []
    for first, end in sorted(tuple(i) for i in intervals):
        if merged and first <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((first, end))
    return tuple(merged)
