"""Which elements of a parameter one file holds, where ranks divide the parameter by its columns.

A matrix (out, in) divided by `in` among t ranks leaves each rank `in / t` elements of every row: in
the flattened matrix runs of that length, one a row. Invariant: the strips of all ranks together
hold every element exactly once. Imports no torch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


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
