"""Every verb explains itself, and takes a bad command for a sentence."""

import pytest

from forescale.cli import VERBS


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_examples_and_keys(verb, forescale):
    code, out, _ = forescale(verb, "--help")
    assert code == 0
    assert f"forescale {verb}" in out
    assert "run.root" in out or verb in ("shards", "drill", "study", "completion")


def test_a_first_word_with_keys_of_its_own_has_a_page_of_its_own(forescale):
    code, out, _ = forescale("submit", "eval", "--help")
    assert code == 0
    assert out.startswith("forescale submit eval [RUN|PATH] ")
    assert "\n  steps " in out
    assert "train.steps" not in out
    assert "steps=" not in forescale("submit", "train", "--help")[1].partition("Keys")[2]


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_key_is_a_sentence(verb, forescale):
    code, out, err = forescale(verb, "zzz.yyy=1")
    assert (code, out) == (2, "")
    assert "zzz.yyy: no such key" in err
    assert "Traceback" not in err
