"""Band hashes of texts: alike for near-duplicates, the same in any batches."""

import random
import sys

import numpy as np
import pytest

from forescale.data.curate import minhash as module
from forescale.data.curate.minhash import MinHash, band_hashes, normalised, version
from forescale.ground.errors import UserError

pytest.importorskip("daft")
WORDS = [f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(600)]
KNOWN = [16667501579672918715, 9282865728753581257]


def text(seed: int, length: int = 300) -> list[str]:
    return random.Random(seed).choices(WORDS, k=length)


def hashes(texts: list[str], settings: MinHash | None = None) -> np.ndarray:
    return np.concatenate(list(band_hashes(texts, settings or MinHash())))


def changed(words: list[str], jaccard: float, seed: int) -> list[str]:
    """Return words of which as many are others as gives about this similarity of 5-grams: a word
    changed alone takes 5 of n of them from each side."""
    lost = len(words) * (1 - jaccard) / (1 + jaccard)
    places = range(2, len(words) - 2, 6)
    words = list(words)
    for place in random.Random(seed).sample(places, round(lost / 5)):
        words[place] = f"other{place}x"
    return words


def test_forms_of_one_text_are_equal():
    forms = [
        "A naïve  test, 1,234 words.",
        "a NAI\u0308VE test 7 - 8 (words)!",
        "a naive\ttest 0 0 words",
    ]
    assert {normalised(form) for form in forms} == {"a naive test 0 0 words"}
    assert normalised("中文。ab") == "中 文 ab"


@pytest.mark.parametrize(
    ("jaccard", "low", "high"), [(0.5, 0, 0.2), (0.7, 0.3, 0.8), (0.9, 0.97, 1)]
)
def test_similar_texts_share_a_band_as_often_as_the_formula_says(jaccard, low, high):
    originals = [text(seed) for seed in range(200)]
    others = [changed(words, jaccard, seed) for seed, words in enumerate(originals)]
    one, other = (hashes([" ".join(words) for words in side]) for side in (originals, others))
    assert low <= (one == other).any(axis=1).mean() <= high
    assert not (one == np.roll(other, 1, axis=0)).any()  # those of another text


def test_hashes_do_not_depend_on_the_batch(monkeypatch):
    texts = [" ".join(text(seed, 1 + seed)) for seed in range(60)]
    whole = hashes(texts)
    assert whole.shape == (60, 14)
    assert whole.dtype == np.uint64
    monkeypatch.setattr(module, "_BATCH", 100)
    assert (hashes(texts) == whole).all()
    monkeypatch.setattr(module, "_TEXTS", 1)
    assert (hashes(texts) == whole).all()
    # Stored in datasets' work directories: another version of Daft that changes them must be seen.
    assert hashes(["one two three four five six seven"])[0, :2].tolist() == KNOWN


def test_texts_without_an_ngram_are_equal_only_to_themselves():
    same = (hashes(["Two words", "two  words.", "two", "", "!", "?", "words two"])).tolist()
    assert same[0] == same[1]
    assert len({tuple(row) for row in same}) == 6
    assert not set(same[2]) & set(same[3]) | set(same[4]) & set(same[5])


def test_bands_do_not_meet():
    rows = hashes([" ".join(text(1))], MinHash(bands=20, rows=1, words=1))
    assert len(np.unique(rows)) == 20


def test_no_text_is_no_batch():
    assert list(band_hashes([], MinHash())) == []


@pytest.mark.parametrize("key", ["bands", "rows", "words"])
def test_settings_out_of_range(key):
    with pytest.raises(UserError, match=f"{key}: 0 is out of range"):
        MinHash(**{key: 0}).check()
    MinHash(seed=0).check()


def test_without_daft_the_sentence_says_how_to_get_it(monkeypatch):
    assert "daft" in version()
    monkeypatch.setitem(sys.modules, "daft", None)
    with pytest.raises(UserError, match=r'daft.* isn\'t installed; pip install "\.\[curate\]"'):
        list(band_hashes(["a"], MinHash()))
