"""The name that was probably meant."""

import difflib

import pytest

from forescale.config import suggest
from forescale.config.suggest import meant, nearest_first


@pytest.mark.parametrize("name", ["adamw", "a" * 250])
def test_the_most_similar_name_is_first_and_a_pasted_page_is_not_compared_whole(name, monkeypatch):
    compared = []

    class Matcher(difflib.SequenceMatcher):
        def __init__(self, junk, a, b):
            compared.append(max(len(a), len(b)))
            super().__init__(junk, a, b)

    monkeypatch.setattr(suggest.difflib, "SequenceMatcher", Matcher)
    names = ["muon", name, "lion"]
    assert nearest_first(name[:-1], names) == [name, *nearest_first(name[:-1], ["muon", "lion"])]
    page = "x.y = " * 20_000
    assert sorted(nearest_first(page, names)) == sorted(names)
    assert meant(page, ["train.steps", "optimizer.learning_rate"]) is None
    assert max(compared) <= 300
