"""Words and hashes of n-grams of words."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forescale.data.curate import words as module
from forescale.data.curate.words import ngram_hashes, words_of

TEXT = st.lists(st.sampled_from(["a", "b", "bb", "é", " ", "\n", "中", "。", "🙂", "x" * 9])).map(
    "".join
)


def plain(text: str) -> list[str]:
    """The words as the head of the module defines them."""
    for alone in "中。":
        text = text.replace(alone, f" {alone} ")
    return text.split()


@given(TEXT)
def test_words_and_their_places(text):
    raw = text.encode()
    words = words_of(raw)
    spans = zip(words.start.tolist(), words.end.tolist(), strict=True)
    assert [raw[start:end].decode() for start, end in spans] == plain(text)


def test_hashes_are_equal_where_words_are_whatever_the_piece(monkeypatch):
    raw = " ".join(["ab", "ba", "a", "中x", "y" * 3000, "y" * 2999 + "z", "ab"] * 20).encode()
    whole = words_of(raw)
    distinct = {raw[s:e]: h for s, e, h in zip(*(c.tolist() for c in whole), strict=True)}
    assert len(set(distinct.values())) == len(distinct) == 7
    assert [distinct[w] for w in (b"ab", b"ba")] == whole.hash[:2].tolist()
    monkeypatch.setattr(module, "_PIECE", 7)
    for column, same in zip(words_of(raw), whole, strict=True):
        assert (column == same).all()


@pytest.mark.parametrize("n", [1, 2, 3, 7, 13, 50])
def test_equal_ngrams_have_equal_hashes_and_others_have_not(n):
    words = np.random.default_rng(0).integers(0, 3, 200).astype(np.uint64)
    hashes = ngram_hashes(words, n)
    grams = [tuple(words[i : i + n].tolist()) for i in range(200 - n + 1)]
    assert len(hashes) == len(grams)
    assert (
        len(set(zip(grams, hashes.tolist(), strict=True)))
        == len(set(grams))
        == len(set(hashes.tolist()))
    )
    assert len(ngram_hashes(words[: n - 1], n)) == 0
