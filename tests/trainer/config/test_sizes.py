"""Numbers of ranks and nodes that may change."""

import pytest

from forescale.config.sizes import Sizes


@pytest.mark.parametrize(("text", "plain"), [(4, 4), ("4", 4), (" 2 - 8 ", "2-8"), ("3-3", 3)])
def test_a_number_or_a_range(text, plain):
    sizes = Sizes.parse(text)
    assert sizes.plain == plain
    assert Sizes.parse(sizes.plain) == Sizes.parse(str(sizes)) == sizes
    assert [*sizes] == [*range(sizes.most, sizes.least - 1, -1)]


@pytest.mark.parametrize("text", [0, "8-2", "2-", "-3", "2.5", "two", True, None, "1-9999999"])
def test_what_is_neither(text):
    with pytest.raises(ValueError, match="expects"):
        Sizes.parse(text)
