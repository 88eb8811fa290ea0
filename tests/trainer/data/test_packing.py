"""Packing: every token is a target once, no bin is too full, and bins are those of best fit
decreasing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.data.packing import Packing, pack

documents = st.lists(st.integers(1, 90), max_size=60).map(lambda d: np.array(d, np.int64))
lengths = st.integers(1, 40)


def pieces_of(packing: Packing) -> list[tuple[int, int]]:
    """Return (start, end) of every piece, in the order of the data."""
    ends = packing.starts + packing.lengths
    return sorted(zip(packing.starts.tolist(), ends.tolist(), strict=True))


def best_fit_decreasing(pieces: list[int], capacity: int) -> list[int]:
    """Return the remaining rooms by the definition: one piece after the other, longest first."""
    rooms: list[int] = []
    for piece in sorted(pieces, reverse=True):
        fitting = [room for room in rooms if room >= piece]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - piece)
    return sorted(rooms)


@given(documents, lengths)
@settings(max_examples=100, deadline=None)
def test_every_token_except_a_documents_first_is_a_target_once(d, L):
    targets = np.zeros(d.sum(), int)
    covered = np.zeros(d.sum(), bool)
    firsts = np.cumsum(d) - d
    packing = pack(d, L)
    for start, end in pieces_of(packing):
        targets[start + 1 : end] += 1
        covered[start:end] = True
        assert np.searchsorted(firsts, start, "right") == np.searchsorted(firsts, end - 1, "right")
    assert (covered == np.repeat(d > 1, d)).all()
    expected = np.ones(d.sum(), int)
    expected[firsts] = 0
    assert (targets == expected).all()
    assert packing.targets.sum() == expected.sum()
    bins = [packing.pieces(b)[1] for b in range(packing.num_bins)]
    assert packing.targets.tolist() == [int((lengths - 1).sum()) for lengths in bins]
    assert all(1 <= n <= L for n in packing.targets)


@given(documents, lengths)
@settings(max_examples=100, deadline=None)
def test_only_documents_longer_than_a_window_are_cut(d, L):
    pieces = pieces_of(pack(d, L))
    whole = [
        (int(end - n), int(end)) for n, end in zip(d, np.cumsum(d), strict=True) if 1 < n <= L + 1
    ]
    assert set(whole) <= set(pieces)
    assert all(end - start == L + 1 or end in np.cumsum(d) for start, end in pieces)


@given(documents, lengths)
@settings(max_examples=100, deadline=None)
def test_bins_are_those_of_best_fit_decreasing(d, L):
    packing = pack(d, L)
    assert packing.offsets[0] == 0
    assert packing.offsets[-1] == len(packing.starts)
    held = [int(packing.pieces(b)[1].sum()) for b in range(packing.num_bins)]
    assert all(0 < n <= L + 1 for n in held)
    rooms = best_fit_decreasing(packing.lengths.tolist(), L + 1)
    assert sorted(L + 1 - n for n in held) == rooms


@given(documents, lengths)
@settings(max_examples=100, deadline=None)
def test_bins_and_their_pieces_keep_the_order_of_the_data(d, L):
    packing = pack(d, L)
    bins = [packing.pieces(b)[0] for b in range(packing.num_bins)]
    assert all((np.diff(starts) > 0).all() for starts in bins)
    assert (np.diff([starts[0] for starts in bins]) > 0).all()
    again = pack(d.copy(), L)
    for name in ("offsets", "starts", "lengths"):
        first, second = getattr(packing, name), getattr(again, name)
        assert first.tobytes() == second.tobytes()


def test_a_case_by_hand():
    """Windows of 5 tokens. The document of 10 becomes 5, 5 and 2; then 3 and 2 share a bin (the
    first ones in the data), the last 2 is alone, and the document of one token isn't placed."""
    packing = pack(np.array([2, 10, 3, 1]), 4)
    bins = [tuple(zip(*map(np.ndarray.tolist, packing.pieces(b)), strict=True)) for b in range(4)]
    assert bins == [((0, 2), (12, 3)), ((2, 5),), ((6, 5),), ((10, 2),)]
    assert packing.targets.sum() == 1 + 9 + 2


def test_no_documents_give_no_bins():
    for nothing in ([], [1, 1]):
        packing = pack(np.array(nothing, np.int64), 8)
        assert (packing.num_bins, packing.targets.sum()) == (0, 0)
    for d, L in (([3, 0], 8), ([3], 0)):
        with pytest.raises(ValueError, match="at least one token"):
            pack(np.array(d), L)
