"""Exact duplicates: which documents are equal, and that the first in source order is kept."""

import unicodedata
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forescale.data.dataset import Dataset
from forescale.data.prepare import selection as module
from forescale.data.prepare.builder import build_dataset
from forescale.data.prepare.columns import facts
from forescale.data.prepare.selection import (
    Bounds,
    HashRun,
    Selection,
    choose,
    find_distinct,
    hash_unit,
    normalised,
    range_edges,
)
from forescale.data.text.documents import ReadingReport
from tests.trainer.data.synthetic_text import SMALL, Texts, synthetic

# Texts of few kinds, in forms that are equal once normalised.
FORMS = ["{}", "\n\n{}", "{}\n", "{} \t\n", "{}\r\n"]
TEXT = st.builds(
    lambda text, form: form.format(text).encode(),
    st.sampled_from(["a", "b", " b", "a b", "a  b", "naïve", "nai\u0308ve", "a\nb", "a \nb"]),
    st.sampled_from(FORMS),
)


@pytest.mark.parametrize(
    ("same", "other"),
    [
        ("a\r\nb\r\n", "a\nb"),
        ("a \nb\t\n", "a\nb"),
        ("\n \na", "a"),
        ("na\u00efve", "nai\u0308ve"),
        ("a\n\n\n", "a"),
    ],
)
def test_equal_documents(same, other):
    assert normalised(same.encode()) == normalised(other.encode())


@pytest.mark.parametrize(
    ("one", "other"), [("A", "a"), (" a", "a"), ("a  b", "a b"), ("a\n\nb", "a\nb"), ("ﬁ", "fi")]
)
def test_different_documents(one, other):
    assert normalised(one.encode()) != normalised(other.encode())


def plain(text: bytes) -> str:
    """The rule in the head of the module, written out."""
    lines = unicodedata.normalize("NFC", text.decode()).replace("\r\n", "\n").split("\n")
    return "\n".join(line.rstrip(" \t") for line in lines).strip("\n")


def deduplicated(source: Texts, work: Path, per_range: int) -> tuple[list[str], list[str]]:
    """Return the names of the documents that are kept and of the others, in source order."""
    hashes, ranges = work / "hashes", work / "ranges"
    hashes.mkdir()
    ranges.mkdir()
    units = source.units()
    for item in reversed(list(enumerate(units))):  # in another order
        hash_unit(source, hashes, *item, lambda size, tokens: None)
    runs = [[HashRun(*r) for r in facts(hashes / f"{n:06d}")["runs"]] for n in range(len(units))]
    edges = range_edges(sum(run.distinct for unit in runs for run in unit), per_range)
    inputs = [unit.source for unit in units]
    for number, (low, high) in enumerate(pairwise(edges)):
        find_distinct(hashes, ranges, runs, inputs, number, low, high, lambda size, tokens: None)
    paths = [ranges / f"{number:04d}" for number in range(len(edges) - 1)]
    selection, report = (
        Selection(source, hashes, paths, Bounds((0,), (0.0,), 0, 0)),
        ReadingReport(),
    )
    parts = [part for item in enumerate(units) for part in selection.parts(*item, report)]
    sizes = np.concatenate([module.unique_of(path)[1] for path in paths])
    assert sizes.sum() == sum(len(part.text) for part in parts)
    return [part.name for part in parts], report.listed.get("duplicate", [])


@settings(deadline=None, max_examples=60)
@given(st.lists(TEXT, min_size=1, max_size=40), st.integers(1, 40), st.integers(1, 6), st.data())
def test_the_first_in_source_order_is_kept(texts, per_unit, per_range, data):
    first: dict[str, str] = {}
    names = [f"text-{i}" for i in range(len(texts))]
    for name, text in zip(names, texts, strict=True):
        first.setdefault(plain(text), name)
    with TemporaryDirectory() as work, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_RUN", data.draw(st.integers(1, 9)))
        result = deduplicated(Texts(texts, per_unit), Path(work), per_range)
    assert result == (list(first.values()), [n for n in names if n not in first.values()])


def test_datasets_of_units_of_any_size_hold_the_same(tmp_path):
    texts = [*synthetic(), *synthetic(20), *synthetic(9)]
    result = {
        Dataset(build_dataset(Texts(texts, size), tmp_path / str(size), SMALL)).identity
        for size in (1, 7, 1000)
    }
    assert len(result) == 1


def chosen(monkeypatch, sizes: list[list[int]], validation: float, per_range: int = 7):
    """The bounds for documents of these sizes, by input; and of each input those held out whole, in
    the order of their keys, as (documents, bytes)."""
    rng = np.random.default_rng(5)
    inputs = np.repeat(np.arange(len(sizes)), [len(of) for of in sizes])
    keys = rng.integers(0, 1 << 64, len(inputs), "u8")
    order = np.argsort(keys)
    columns = [column[order] for column in (keys, np.concatenate(sizes).astype(int), inputs)]
    starts = range(0, len(inputs), per_range)
    parts = {Path(str(at)): [c[at : at + per_range] for c in columns] for at in starts}
    monkeypatch.setattr(module, "unique_of", parts.__getitem__)
    bounds = choose(list(parts), validation, 0, len(sizes))
    is_held_out = columns[0] < np.array(bounds.held_out, "u8")[columns[2]]
    held = [is_held_out & (columns[2] == i) for i in range(len(sizes))]
    return bounds, [(int(of.sum()), int(columns[1][of].sum())) for of in held]


def test_a_large_corpus_holds_out_its_share_and_nothing_else(monkeypatch):
    bounds, held = chosen(monkeypatch, [[16_000] * 3000], 0.02, per_range=500)
    assert bounds.held_out == (int(0.02 * 2**64),)
    assert bounds.tails == (0.0,)
    assert 30 < held[0][0] < 90


def test_each_input_of_a_small_corpus_gives_held_out_text(monkeypatch):
    """159 documents of 7 MB, in three inputs: a share of 1 % held out one of them."""
    sizes = [[45_000] * 100, [40_000] * 56, [100_000, 50_000, 120_000]]
    bounds, held = chosen(monkeypatch, sizes, 0.01)
    for (documents, size), of in zip(held[:2], sizes, strict=False):
        assert documents >= 5
        assert sum(of) / 10 <= size < sum(of) / 6
    assert bounds.tails[:2] == (0.0, 0.0)
    assert (held[2][0], bounds.tails[2]) == (0, 0.1)


def test_a_document_with_much_of_an_input_is_not_held_out_whole(monkeypatch):
    sizes = [[1000] * 40]
    alone, _ = chosen(monkeypatch, sizes, 0.02)
    assert alone.tails == (0.0,)
    sizes = [[100_000 if i == lowest_of(40) else 1000 for i in range(40)]]
    assert chosen(monkeypatch, sizes, 0.02)[0].tails == (0.1,)


def lowest_of(count: int) -> int:
    """The document with the lowest key in `chosen`."""
    return int(np.argmin(np.random.default_rng(5).integers(0, 1 << 64, count, "u8")))


@pytest.mark.parametrize("files", [30, 500])
def test_files_of_a_glob_count_as_one_input(monkeypatch, files):
    """Each of them is an input of one document."""
    sizes = [[30_000]] * files + [[30_000] * 40]
    bounds, held = chosen(monkeypatch, sizes, 0.02, per_range=100)
    assert len(set(bounds.held_out[:files])) == 1
    assert set(bounds.tails) == {0.0}
    assert 3 <= sum(documents for documents, _ in held[:files]) <= 40
    assert held[files][0] >= 4 or files > 64


def test_nothing_is_held_out_without_a_share(monkeypatch):
    bounds, held = chosen(monkeypatch, [[10] * 9, [10] * 90], 0.0)
    assert (bounds.held_out, bounds.tails) == ((0, 0), (0.0, 0.0))
    assert held == [(0, 0), (0, 0)]
