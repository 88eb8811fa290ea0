"""Repeated passages: found, exactly cut beyond their first occurrence, and nothing else."""

import random
import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from forescale.data.curate import substrings as module
from forescale.data.curate.substrings import (
    Substrings,
    anchor_runs,
    anchor_unit,
    cut_unit,
    find_repeats,
    winnowed,
    without,
)
from forescale.data.prepare.columns import UnitWriter, facts
from forescale.data.prepare.selection import range_edges
from forescale.ground.errors import UserError

Units = Sequence[Sequence[str | None]]
Passages = list[list[tuple[int, int]]]
SHORT = Substrings(words=5, window=3)


def silent(size: int, tokens: int) -> None:
    pass


def find(work: Path, units: Units, options: Substrings, per_range: int = 1 << 20) -> Passages:
    """Return the passages to cut of each text, in source order."""
    anchors, repeats = work / "anchors", work / "repeats"
    for folder in (anchors, repeats):
        folder.mkdir(parents=True, exist_ok=True)
    for number, texts in enumerate(units):
        with UnitWriter(anchors / f"{number:06d}") as out:
            out.finish(anchor_unit(texts, out, options))
    runs = anchor_runs(anchors, len(units))
    edges = range_edges(sum(run.anchors for unit in runs for run in unit), per_range)
    for number, bounds in enumerate(pairwise(edges)):
        find_repeats(anchors, repeats, runs, number, *bounds, silent)
    ranges = [repeats / f"{i:04d}" for i in range(len(edges) - 1)]

    def fetch(unit: int, document: int) -> str:
        text = units[unit][document]
        assert text is not None
        return text

    return [
        passages
        for number, texts in enumerate(units)
        for passages in cut_unit(texts, number, ranges, fetch, options)
    ]


def cut(work: Path, units: Units, options: Substrings) -> list[list[str]]:
    """Return what is left of the texts of each unit."""
    passages = iter(find(work, units, options))
    return [[without(text or "", next(passages)) for text in texts] for texts in units]


def words(seed: int, count: int) -> str:
    rng = random.Random(seed)
    return " ".join(f"{rng.getrandbits(40):x}" for _ in range(count))


def test_a_passage_stays_where_it_occurs_first(tmp_path):
    passage = words(0, 100)
    units = [
        [words(1, 80), f"{words(2, 30)}\n{passage}\n{words(3, 30)}"],
        [f"{words(4, 9)} {passage.replace(' ', chr(10))} {words(5, 9)}", None],
        [passage, f"{passage}  {words(6, 5)} {passage}"],
    ]
    left = cut(tmp_path, units, Substrings())
    assert left == [
        units[0],
        [f"{words(4, 9)} {words(5, 9)}", ""],
        ["", words(6, 5) + " "],
    ]


@pytest.mark.parametrize("where", [0, 30, 61])
def test_every_passage_as_long_as_promised_is_cut(tmp_path, where):
    options = Substrings(words=20, window=10)
    for seed, length in enumerate([29] * 12):  # words + window - 1
        passage = words(100 + seed, length)
        later = words(200 + seed, where), words(300 + seed, 61 - where)
        units = [
            [f"{words(4, seed)} {passage} {words(5, 7)}"],
            [f"{later[0]} {passage} {later[1]}"],
        ]
        left = cut(tmp_path / str(seed), units, options)
        assert left[1][0].split() == " ".join(later).split()


def test_each_unit_gets_its_own_repeats(tmp_path):
    units = [[words(number, 50), words(number, 50)] for number in range(20)]
    assert cut(tmp_path, units, Substrings()) == [[text, ""] for text, _ in units]


def test_a_shorter_passage_stays(tmp_path):
    passage = words(0, 49)
    units = [
        [f"{words(1, 60)} {passage} {words(2, 60)}", f"{words(3, 60)} {passage} {words(4, 60)}"]
    ]
    assert cut(tmp_path, units, Substrings()) == units


def test_a_dropped_document_is_no_first_occurrence(tmp_path):
    passage = words(0, 100)
    assert cut(tmp_path, [[None, passage], [passage]], Substrings()) == [["", passage], [""]]


def test_languages_without_spaces(tmp_path):
    rng = random.Random(1)
    passage, rest = ("".join(chr(rng.randint(0x4E00, 0x9FFF)) for _ in range(90)) for _ in "ab")
    assert (
        cut(tmp_path, [[f"{passage}。", f"{rest}。{passage}！"]], Substrings())[0][1]
        == f"{rest}。！"
    )


# Few words, so that passages repeat in every way: within a document, overlapping, in a chain.
TEXT = st.lists(st.sampled_from(["a", "b", "c\n", "é"]), max_size=40).map(" ".join)


@settings(max_examples=50, deadline=None)
@example([["a a a a a a a a a a a a"]])
@given(st.lists(st.lists(TEXT, max_size=4), min_size=1, max_size=3))
def test_what_is_cut_occurred_before_and_what_is_promised_is_cut(tmp_path_factory, units):
    work = tmp_path_factory.mktemp("work")
    passages = find(work / "whole", units, SHORT)
    assert find(work / "ranges", units, SHORT, per_range=3) == passages
    short, long = SHORT.words, SHORT.words + SHORT.window - 1
    before: dict[int, set[tuple[bytes, ...]]] = {short: set(), long: set()}
    for text, spans in zip((t for texts in units for t in texts), passages, strict=True):
        words = list(re.finditer(rb"\S+", text.encode()))
        is_cut = {
            i for i, w in enumerate(words) for s, e in spans if s <= w.start() and w.end() <= e
        }
        repeated: dict[int, list[int]] = {short: [], long: []}  # places
        for length, places in repeated.items():
            for i in range(len(words) - length + 1):
                gram = tuple(word[0] for word in words[i : i + length])
                if gram in before[length]:
                    places.append(i)
                before[length].add(gram)
        assert is_cut <= {i + j for i in repeated[short] for j in range(short)}
        inner = range(SHORT.window - 1, long - SHORT.window + 1)
        assert is_cut >= {i + j for i in repeated[long] for j in inner}


def test_a_hash_that_is_equal_by_chance_cuts_nothing(tmp_path, monkeypatch):
    def constant(text: bytes) -> module.Words:
        words = words_of(text)
        return words._replace(hash=words.hash * np.uint64(0))

    words_of = module.words_of
    monkeypatch.setattr(module, "words_of", constant)
    units = [[words(1, 20)], [words(2, 20)]]
    assert cut(tmp_path, units, SHORT) == units


@settings(deadline=None)
@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 12))
def test_winnowing_takes_the_last_of_the_lowest_of_each_window(values, window):
    hashes = np.array(values, np.uint64)
    size = min(window, len(values))
    windows = [values[i : i + size] for i in range(len(values) - size + 1) if size]
    expected = {i + size - 1 - w[::-1].index(min(w)) for i, w in enumerate(windows)}
    assert winnowed(hashes, window).tolist() == sorted(expected)


def test_ranges_of_equal_width_hold_about_as_many_anchors(tmp_path):
    find(tmp_path, [[words(0, 8000)]], Substrings(), per_range=100)
    counts = [facts(path)["anchors"] for path in (tmp_path / "repeats").iterdir()]
    assert len(counts) > 5
    assert max(counts) < 2 * sum(counts) / len(counts)


def test_another_text_than_before_is_an_error(tmp_path):
    passage = words(0, 100)
    cut(tmp_path, [[passage, passage]], Substrings())
    with pytest.raises(ValueError, match="document 1 of unit 0 is another than before"):
        list(cut_unit([passage, "other"], 0, [tmp_path / "repeats/0000"], str, Substrings()))


def test_settings_out_of_range():
    with pytest.raises(UserError, match="words: 3 is out of range; set it to 5"):
        Substrings(words=3).check()
