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
    for number, (low, high) in enumerate(pairwise(edges)):
        find_distinct(hashes, ranges, runs, number, low, high, lambda size, tokens: None)
    paths = [ranges / f"{number:04d}" for number in range(len(edges) - 1)]
    selection, report = (
        Selection(source, hashes, paths, Bounds(0, 0, 0, False), 0.0),
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
