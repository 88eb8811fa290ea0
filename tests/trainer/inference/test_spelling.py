"""Text that comes in pieces ends before its first stop text, wherever the pieces begin."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forescale.inference.spelling import Stops


def cut(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By the definition: read character by character, until the text ends with a stop text."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


few = st.text("ab", min_size=1, max_size=4)


@given(st.lists(st.text("ab", max_size=4), max_size=8), st.lists(few, max_size=3, unique=True))
def test_it_is_cut_where_the_first_stop_text_is_complete(pieces, stops):
    found = Stops(stops)
    text = "".join([found.add(piece) for piece in pieces])
    assert (text + found.rest(), found.found) == cut("".join(pieces), stops)


@given(st.lists(few, max_size=8), st.lists(few, max_size=3, unique=True))
def test_no_more_is_held_back_than_may_begin_a_stop_text(pieces, stops):
    found, given_, shown = Stops(stops), "", ""
    for piece in pieces:
        given_, shown = given_ + piece, shown + found.add(piece)
        if found.found is not None:
            break
        held = given_.removeprefix(shown)
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


@pytest.mark.parametrize("stops", [[], ["z"]])
def test_other_text_passes_at_once(stops):
    found = Stops(stops)
    assert [found.add(piece) for piece in ("a", "", "bc")] == ["a", "", "bc"]
    assert found.rest() == ""
