"""Which modules ZeRO-3 keeps because they are called again soon."""

from hypothesis import given
from hypothesis import strategies as st

from forescale.plan.bytes.zero import _Call, _soon

SIZES = {"a": 0, "b": 1, "c": 5, "d": 9}


def looked_ahead(calls, at, reuse):
    """As DeepSpeed does it: look at one call after the other, until enough elements have passed."""
    elements = 0
    for call in calls[at + 1 :]:
        if elements >= reuse:
            return False
        if call.module == calls[at].module:
            return True
        elements += SIZES[call.module]
    return False


@given(st.lists(st.sampled_from([*SIZES]).map(_Call), max_size=20), st.integers(0, 30))
def test_soon_is_what_looking_ahead_finds(calls, reuse):
    expected = [looked_ahead(calls, at, reuse) for at in range(len(calls))]
    assert _soon(calls, SIZES, reuse) == expected
