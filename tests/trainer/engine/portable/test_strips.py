"""Strips of a divided parameter: which elements they hold, and reading them from files."""

import json
from collections import Counter
from dataclasses import replace
from itertools import chain, pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forescale.checkpoint.reader import coverage_faults
from forescale.engine.portable.fragments import Fragment, FragmentReader, write_fragments
from forescale.engine.portable.strips import Series, Strip, rank_file, strip_of, united
from forescale.ground.errors import UserError


@st.composite
def matrices(draw):
    """A matrix (rows, parts * run), its strips by part, each cut in two at some place."""
    rows, parts, run = (draw(st.integers(1, 4)) for _ in range(3))
    shapes = []
    for part in range(parts):
        cut = draw(st.integers(0, rows * run))
        for start, end in ((0, cut), (cut, rows * run)):
            if end > start:
                shapes.append(Strip(start, end - start, run, run * parts, part * run))
    return rows, parts * run, shapes


@given(matrices(), st.data())
def test_a_strip_yields_exactly_its_elements_of_a_range(matrix, data):
    rows, columns, strips = matrix
    whole = torch.arange(rows * columns)
    low = data.draw(st.integers(0, rows * columns))
    high = data.draw(st.integers(low, rows * columns))
    for s in strips:
        part = s.first // s.run
        held = whole.view(rows, columns)[:, part * s.run : (part + 1) * s.run].reshape(-1)
        held = held[s.start : s.start + s.size]
        assert (s.low, s.high) == (held[0], held[-1] + 1)
        runs = [*s.overlaps(low, high)]
        assert all(torch.equal(whole[at : at + n], held[to : to + n]) for at, to, n in runs)
        assert sum(n for _, _, n in runs) == int(((held >= low) & (held < high)).sum())


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A matrix (6, 8) in the files of two ranks, by columns, and a vector of 5 in both."""
    folder, matrix = tmp_path_factory.mktemp("strips"), torch.randn(6, 8)
    vector, series = torch.randn(5), []
    for rank in range(2):
        columns = matrix[:, 4 * rank : 4 * rank + 4].reshape(-1)
        cuts = [(0, 10), (10, 24)]
        fragments = [
            Fragment("m", (6, 8), "weight", a, columns[a:b], (4, 8, 4 * rank)) for a, b in cuts
        ]
        part = slice(0, 2) if rank == 0 else slice(2, 5)
        fragments.append(Fragment("v", (5,), "weight", part.start, vector[part]))
        rows = write_fragments(folder / rank_file(rank), fragments)[1]
        series += [Series.of(rank, row) for row in rows]
    return SimpleNamespace(folder=folder, series=series, matrix=matrix, vector=vector)


def test_a_divided_matrix_is_read_whole_and_in_every_other_division(stored):
    reader = FragmentReader(stored.folder, united(stored.series))
    out = torch.empty(48)
    reader.read_into("m", "weight", 0, out)
    assert torch.equal(out, stored.matrix.view(-1))
    reader.read_into("v", "weight", 1, tail := torch.empty(4))
    assert torch.equal(tail, stored.vector[1:])
    for parts in (1, 2, 4):
        for part, columns in enumerate(stored.matrix.chunk(parts, 1)):
            run = 8 // parts
            for start in (0, 3):
                got = torch.empty(columns.numel() - start)
                reader.fill(Fragment("m", (6, 8), "weight", start, got, (run, 8, part * run)))
                assert torch.equal(got, columns.reshape(-1)[start:])


def test_a_part_that_is_missing_is_noticed(stored):
    shapes, series = {"m": [6, 8], "v": [5]}, [*stored.series]
    assert coverage_faults(shapes, united(series)) == []
    last = series.pop(4)
    assert coverage_faults(shapes, united(series)) == ["weight of m: 34 of 48 elements"]
    with pytest.raises(UserError, match="34 of 48 elements"):
        FragmentReader(stored.folder, united(series)).read_into("m", "weight", 0, torch.empty(48))
    assert coverage_faults(shapes, [*series, last, last]) == ["weight of m: 62 of 48 elements"]
    series += [replace(last, start=9)]
    assert coverage_faults(shapes, series) == ["weight of m: a gap or an overlap at element 22"]


@st.composite
def partitions(draw):
    """Some states in the files of ranks, as a stage divides them (flat, or each for itself), or in
    any other way; and in which groups the ranks describe them."""
    ranks = draw(st.integers(1, 9))
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    kind, rows = draw(st.sampled_from(["flat", "cut", "any"])), [[] for _ in range(ranks)]
    total, before = sum(sizes), 0
    for i, size in enumerate(sizes):
        if kind == "any":
            cuts = draw(st.sets(st.integers(1, size - 1), max_size=5)) if size > 1 else set()
            owners = st.integers(0, ranks - 1)
        else:
            each = -(-(total if kind == "flat" else size) // ranks)
            begin = before if kind == "flat" else 0
            cuts = {x for x in range(-begin % each, size, each)} - {0}
        for a, b in pairwise(sorted({0, size, *cuts})):
            rank = draw(owners) if kind == "any" else (begin + a) // each
            rows[rank].append([f"p{i}", "weight", a, b - a])
        before += size
    return sizes, [Series.of(rank, row) for rank, each in enumerate(rows) for row in each]


@given(partitions(), st.integers(1, 5), st.data())
def test_united_series_describe_each_fragment_in_its_file(partition, fanout, data):
    sizes, single = partition
    groups = [united(single[i : i + fanout]) for i in range(0, len(single), fanout)]
    whole = [Series.from_row(json.loads(json.dumps(s.row))) for s in united(chain(*groups))]
    assert coverage_faults({f"p{i}": [n] for i, n in enumerate(sizes)}, whole) == []
    assert sum(s.count for s in whole) == len(single)
    for i, size in enumerate(sizes):
        low = data.draw(st.integers(0, size - 1))
        high = data.draw(st.integers(low + 1, size))
        parts = lambda every: sorted(  # noqa: E731
            [strip.start, strip.first, *place]
            for s in every
            if s.name == f"p{i}"  # noqa: B023
            for strip, *place in s.between(low, high)  # noqa: B023
        )
        assert parts(whole) == parts(single)


@pytest.mark.parametrize(("kind", "most"), [("flat", 4), ("cut", 1), ("strips", 2)])
def test_a_description_does_not_grow_with_the_ranks(kind, most):
    """Of 16,384 ranks: 3 series at most of each weight that more than two ranks divide."""
    ranks, series = 16_384, []
    for rank in range(ranks):
        if kind == "cut":
            rows = [[f"p{i}", "weight", 8 * rank, 8] for i in range(3)]
        elif kind == "flat":  # three weights, one after the other, and not at borders of ranks
            begins = [10 * rank - 54_613 * i for i in range(3)]
            parts = [(max(0, a), min(54_613, a + 10)) for a in begins]
            rows = [[f"p{i}", "weight", a, b - a] for i, (a, b) in enumerate(parts) if a < b]
        else:  # two tensor ranks divide the columns
            rows = [["p0", "weight", rank // 2 * 8, 8, 4, 8, rank % 2 * 4]]
        series += [Series.of(rank, row) for row in rows]
    assert max(Counter(s.name for s in united(series)).values()) <= most


def test_a_row_without_a_stride_is_one_range():
    assert [*strip_of([1000, 10]).overlaps(1005, 2000)] == [(1005, 5, 5)]
