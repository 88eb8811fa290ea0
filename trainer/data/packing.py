"""Best-fit packing: a table that places whole documents side by side in windows.

Cutting windows out of one long sequence splits most documents. Here only documents longer than a
window are split, and the pieces are placed in bins, each a window of at most L + 1 tokens, by best
fit decreasing: longest first, each into the fullest bin that has room (Ding et al. 2024, "Fewer
Truncations Improve Language Modeling", arXiv 2404.10830). So a bin is a list of token runs, not one
run.

Pieces of a long document overlap by one token: it is the last target of one piece and the first
input of the next. The first token of a piece is not a target if another piece precedes it in the
bin, because the tokens before it belong to another document. So a document of one token has no
target and isn't placed.

Invariant: every token except a document's first is a target exactly once, and no bin holds more
than L + 1 tokens; the table depends only on the documents' lengths and L.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Packing:
    """A packing table. Bin b holds pieces [offsets[b], offsets[b + 1]); piece i is tokens
    [starts[i], starts[i] + lengths[i]), counted from the first token of the first document.

    Pieces in a bin have the order of the data; bins are ordered by their first piece. offsets:
    int64 of shape (bins + 1,); starts: int64 and lengths: int32 of shape (pieces,).
    """

    offsets: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @property
    def num_bins(self) -> int:
        return len(self.offsets) - 1

    @property
    def targets(self) -> np.ndarray:
        """Targets of each bin, all tokens but the first of a piece: int64, from 1 to L."""
        return np.add.reduceat(self.lengths - 1, self.offsets[:-1], dtype=np.int64)

    def pieces(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        of = slice(self.offsets[number], self.offsets[number + 1])
        return self.starts[of], self.lengths[of]


def pack(document_lengths: np.ndarray, sequence_length: int) -> Packing:
    """Return the table for consecutive documents of these lengths (in tokens, shape (documents,)).

    Raises ValueError if a length or L is below 1.
    """
    if sequence_length < 1 or (len(document_lengths) and document_lengths.min() < 1):
        raise ValueError("documents and windows must hold at least one token")
    starts, lengths = _cut(np.asarray(document_lengths, np.int64), sequence_length)
    starts, lengths = starts[lengths > 1], lengths[lengths > 1]
    bins = _best_fit_decreasing(lengths, sequence_length + 1)
    # Pieces are in the order of the data: a bin's first piece is where its number appears first.
    _, first, bins = np.unique(bins, return_index=True, return_inverse=True)
    number = np.empty(len(first), np.int64)
    number[np.argsort(first)] = np.arange(len(first))
    order = np.argsort(number[bins], kind="stable")
    counts = np.bincount(number[bins], minlength=len(first))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return Packing(offsets, starts[order], lengths[order].astype(np.int32))


def _cut(documents: np.ndarray, sequence_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return starts and lengths of the pieces in the order of the data: L + 1 tokens each with
    stride L, the last piece of a document is shorter."""
    counts = np.maximum(-(-(documents - 1) // sequence_length), 1)
    piece = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    skipped = piece * sequence_length
    starts = np.repeat(np.cumsum(documents) - documents, counts) + skipped
    return starts, np.minimum(np.repeat(documents, counts) - skipped, sequence_length + 1)


def _best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the bin of each piece, numbered in the order of opening: int64 of shape (pieces,).

    Pieces of one length are placed together, into all bins with the same room at a time. If a piece
    still fits beside the one just placed, best fit would choose that bin next, because no other
    room is as small. So bins with room r take r // length pieces each, which leaves too little room
    for another one, and the work is a few numpy calls per length instead of per piece.
    """
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    placed = np.empty(len(lengths), np.int64)
    rooms = _Rooms()
    opened = done = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        pieces = order[done : done + count]
        done += count
        while len(pieces):
            if (group := rooms.take(size)) is None:
                each = capacity // size
                room, bins = capacity, opened + np.arange(-(-len(pieces) // each))
                opened += len(bins)
            else:
                room, bins = group
                each = room // size
            full, rest = divmod(len(pieces), each)
            taken = np.repeat(bins[: full + 1], each)[: len(pieces)]
            placed[pieces[: len(taken)]] = taken
            pieces = pieces[len(taken) :]
            rooms.add(room - each * size, bins[:full])
            if full < len(bins):
                rooms.add(room - rest * size, bins[full : full + 1])
                rooms.add(room, bins[full + 1 :])
    return placed


class _Rooms:
    """Open bins, grouped by their remaining room in tokens."""

    def __init__(self) -> None:
        self._sorted: list[int] = []
        self._bins: dict[int, list[np.ndarray]] = {}

    def add(self, room: int, bins: np.ndarray) -> None:
        """Add bins with this remaining room; full bins are dropped."""
        if room and len(bins):
            if room not in self._bins:
                insort(self._sorted, room)
            self._bins.setdefault(room, []).append(bins)

    def take(self, size: int) -> tuple[int, np.ndarray] | None:
        """Remove and return the smallest sufficient room and all its bins; None without one."""
        at = bisect_left(self._sorted, size)
        if at == len(self._sorted):
            return None
        room = self._sorted.pop(at)
        return room, np.concatenate(self._bins.pop(room))
