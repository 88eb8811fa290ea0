"""Which elements of a parameter a file holds, also where ranks divide the parameter by its columns;
and in which files its parts are.

A matrix (out, in) divided by `in` among t ranks leaves each rank `in / t` elements of every row: in
the flattened matrix runs of that length, one a row. Invariant: the strips of all ranks together
hold every element exactly once. Imports no torch.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Strip:
    """Elements [start, start + size) of those that a rank holds of a flattened parameter: from each
    `stride` elements of it the `run` that begin at `first`, one after the other."""

    start: int
    size: int
    run: int
    stride: int
    first: int

    @property
    def low(self) -> int:
        """The parameter's first element that the strip holds."""
        return self._place(self.start)

    @property
    def high(self) -> int:
        return self._place(self.start + self.size - 1) + 1

    def _place(self, i: int) -> int:
        return i // self.run * self.stride + self.first + i % self.run

    def overlaps(self, low: int, high: int) -> Iterator[tuple[int, int, int]]:
        """Yield what the strip holds of the parameter's elements [low, high), a run at a time:
        (its first element, where that is in the strip, the number of elements)."""
        end = self.start + self.size
        before = (low - self.first - self.run) // self.stride  # the last row that ends by `low`
        for row in range(max(before + 1, self.start // self.run), -(-end // self.run)):
            begin, at = row * self.stride + self.first, row * self.run
            if begin >= high:
                return
            skipped = max(0, low - begin, self.start - at)
            length = min(self.run, high - begin, end - at) - skipped
            if length > 0:
                yield begin + skipped, at + skipped - self.start, length


def strip_of(row: Sequence[int]) -> Strip:
    """Return the strip of a row of a checkpoint's table: [start, size] of a parameter that is not
    divided, or all fields of a Strip."""
    start, size, *division = row
    if division:
        return Strip(start, size, *division)
    return Strip(0, size, max(1, size), max(1, size), start)


def rank_file(rank: int) -> str:
    """Return the name of a rank's file in a checkpoint."""
    return f"rank-{rank:05d}.safetensors"


@dataclass(frozen=True)
class Series:
    """Fragments of a state of a parameter, equally long, at equal distances, in the files of ranks
    at equal distances. So a description doesn't grow with the ranks: whatever they divide, all but
    the first and the last of them have as much of it.

    The i-th of `count` is in the file of rank + i x rank_step, and holds `size` elements from start
    + i x start_step on; with `cut`, (run, stride, first), of what such a strip holds.
    """

    name: str
    state: str
    start: int
    size: int
    cut: tuple[int, int, int] | None = None
    rank: int = 0
    count: int = 1
    rank_step: int = 0
    start_step: int = 0

    @classmethod
    def of(cls, rank: int, row: Sequence[Any]) -> "Series":
        """Return a single fragment. row: of fragments.py."""
        name, state, start, size, *cut = row
        return cls(name, state, start, size, tuple(cut) if cut else None, rank)

    @classmethod
    def from_row(cls, row: Sequence[Any]) -> "Series":
        """Return what `row` describes."""
        name, state, start, size, cut, *place = row
        return cls(name, state, start, size, tuple(cut) if cut else None, *place)

    @property
    def row(self) -> list[Any]:
        return [*astuple(self)]

    @property
    def ranks(self) -> Sequence[int]:
        """The ranks whose files hold it."""
        end = self.rank + self.count * self.rank_step
        return range(self.rank, end, self.rank_step) if self.rank_step else [self.rank]

    def strip(self, i: int) -> Strip:
        """Return which elements the i-th fragment holds."""
        return strip_of([self.start + i * self.start_step, self.size, *(self.cut or ())])

    def place(self, i: int) -> tuple[str, str]:
        """Return the key and the file of the i-th fragment."""
        key = f"{self.name}|{self.state}|{self.start + i * self.start_step}"
        return key, rank_file(self.rank + i * self.rank_step)

    def between(self, low: int, high: int) -> Iterator[tuple[Strip, str, str]]:
        """Yield the fragments with elements of [low, high): (strip, key, file)."""
        first = bisect_right(range(self.count), low, key=lambda i: self.strip(i).high)
        for i in range(first, self.count):
            strip = self.strip(i)
            if strip.low >= high:
                return
            yield strip, *self.place(i)

    def runs(self) -> Iterator[tuple[int, int]]:
        """Yield (first element, number of elements) of all that it holds."""
        parts = [self]
        if self.start_step == self.size or self.count == 1:
            parts = [replace(self, size=self.size * self.count, count=1)]  # no gap between them
        for part in parts:
            for i in range(part.count):
                strip = part.strip(i)
                yield from ((at, n) for at, _, n in strip.overlaps(strip.low, strip.high))

    def _followed_by(self, other: "Series") -> "Series | None":
        """Return one series of both, if they are one."""
        ranks, starts = other.rank - self.rank, other.start - self.start
        if self.count > 1:
            rank_step, start_step = self.rank_step, self.start_step
        elif other.count > 1:
            rank_step, start_step = other.rank_step, other.start_step
        else:
            rank_step, start_step = ranks, starts
        steps = (rank_step, start_step)
        if other.count > 1 and (other.rank_step, other.start_step) != steps:
            return None
        if start_step <= 0 or (ranks, starts) != tuple(self.count * step for step in steps):
            return None
        count = self.count + other.count
        return replace(self, count=count, rank_step=rank_step, start_step=start_step)


def united(parts: Iterable[Series]) -> list[Series]:
    """Return as few series as describe the same."""
    alike: dict[tuple, list[Series]] = {}
    for part in parts:
        alike.setdefault((part.name, part.state, part.size, part.cut), []).append(part)
    every = []
    for several in alike.values():
        last, *others = sorted(several, key=lambda part: (part.start, part.rank))
        for part in others:
            if (whole := last._followed_by(part)) is None:
                every.append(last)
            last = whole or part
        every.append(last)
    return every
