"""Strips of a divided parameter: which elements they hold, and reading them from files."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forescale.checkpoint.reader import coverage_faults
from forescale.engine.portable.fragments import Fragment, FragmentReader, write_fragments
from forescale.engine.portable.strips import Strip, strip_of
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
    vector, rows = torch.randn(5), {}
    for rank in range(2):
        columns = matrix[:, 4 * rank : 4 * rank + 4].reshape(-1)
        cuts = [(0, 10), (10, 24)]
        fragments = [
            Fragment("m", (6, 8), "weight", a, columns[a:b], (4, 8, 4 * rank)) for a, b in cuts
        ]
        part = slice(0, 2) if rank == 0 else slice(2, 5)
        fragments.append(Fragment("v", (5,), "weight", part.start, vector[part]))
        name = f"rank-{rank}.safetensors"
        rows[name] = write_fragments(folder / name, fragments)[1]
    return SimpleNamespace(folder=folder, rows=rows, matrix=matrix, vector=vector)


def test_a_divided_matrix_is_read_whole_and_in_every_other_division(stored):
    reader = FragmentReader(stored.folder, stored.rows)
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
    rows = {name: [*entries] for name, entries in stored.rows.items()}
    state = {"fragments": rows, "shapes": {"m": [6, 8], "v": [5]}}
    assert coverage_faults(state) == []
    last = rows["rank-1.safetensors"].pop(1)
    assert coverage_faults(state) == ["weight of m: a gap or an overlap at element 22"]
    with pytest.raises(UserError, match="34 of 48 elements"):
        FragmentReader(stored.folder, rows).read_into("m", "weight", 0, torch.empty(48))
    rows["rank-1.safetensors"] += [last, last]
    assert "overlap" in coverage_faults(state)[0]


def test_a_row_without_a_stride_is_one_range():
    assert [*strip_of([1000, 10]).overlaps(1005, 2000)] == [(1005, 5, 5)]
