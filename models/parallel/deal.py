"""How the columns of rows are dealt out to the ranks of a ring, and what these see of each other's.

Of causal attention a later column sees more than an earlier one: of twice as many runs of columns
as ranks the i-th rank takes the i-th from either end, so that all have equally much to do
(Brandon et al. 2023, arXiv 2311.09431). Invariant: all ranks make the same turns, by numbers that
all know, without a look at the data. Imports no torch: a plan reads this file on a login node.
"""

from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

_MASKED = 2**22  # pairs of a tile with a mask at most


class Ring(NamedTuple):
    """A rank of `size` that pass keys and values around, each with `runs` of the row's runs, and
    who sees whom by order: causal; window and global_tokens as in mixers/window.py, 0: none."""

    rank: int
    size: int
    runs: int = 1
    causal: int = 1
    window: int = 0
    global_tokens: int = 0

    def numbers(self, rank: int) -> tuple[int, ...]:
        """Return the runs of a rank, by their numbers in the row, in its order."""
        return (rank, 2 * self.size - 1 - rank)[: self.runs]


class Tile(NamedTuple):
    """Queries and keys that are scored at once, as slices of what two ranks have, and the columns
    of the row that they begin at. causal: the queries' own run, without a mask."""

    queries: slice
    keys: slice
    query: int
    key: int
    causal: bool


@cache
def shifts(ring: Ring, length: int) -> list[int]:
    """Return how many places before some rank a rank is whose keys it sees: the turns of the ring,
    the same for each rank. length: of a run."""

    def sees_any(rank: int, shift: int) -> bool:
        at = ring._replace(rank=rank)
        return any(True for _ in tiles(at, (rank - shift) % ring.size, length, False))

    return [s for s in range(ring.size) if any(sees_any(rank, s) for rank in range(ring.size))]


def tiles(ring: Ring, holder: int, length: int, masked: bool) -> Iterator[Tile]:
    """Yield what the rank's queries see of the keys of another. masked: each tile has a mask, and
    so is small. length: of a run."""
    size = min(length, max(64, min(ring.window or 1024, _MASKED // length))) if masked else length
    for i, query_run in enumerate(ring.numbers(ring.rank)):
        for j, key_run in enumerate(ring.numbers(holder)):
            for first in range(0, length, size):
                end, low, high = min(first + size, length), 0, length
                # How many columns the queries' run comes after that of the keys.
                ahead = (query_run - key_run) * length
                if ring.causal:
                    high = min(length, ahead + end)
                if ring.window and not ring.global_tokens:
                    low = max(0, ahead + first - ring.window + 1)
                if low < high:
                    yield Tile(
                        slice(i * length + first, i * length + end),
                        slice(j * length + low, j * length + high),
                        query_run * length + first,
                        key_run * length + low,
                        bool(ring.causal) and query_run == key_run and not masked,
                    )
