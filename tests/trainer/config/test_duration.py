import pytest
from hypothesis import given
from hypothesis import strategies as st

from forescale.config.duration import Duration

LENGTHS = st.one_of(
    st.builds(Duration, st.integers(0, 10**15), st.sampled_from(["steps", "tokens"])),
    st.builds(
        Duration, st.floats(0, 1e9, allow_nan=False), st.sampled_from(["seconds", "percent"])
    ),
)


@given(LENGTHS)
def test_text_round_trip(length):
    assert Duration.parse(str(length)) == length


@pytest.mark.parametrize(
    ("text", "length", "canonical"),
    [
        ("500 steps", Duration(500), "500 steps"),
        (500, Duration(500), "500 steps"),
        ("1 step", Duration(1), "1 step"),
        ("2e9 tokens", Duration(2e9, "tokens"), "2e9 tokens"),
        ("1_000 tokens", Duration(1000, "tokens"), "1000 tokens"),
        ("30 min", Duration(1800, "seconds"), "30 min"),
        ("1800s", Duration(1800, "seconds"), "30 min"),
        ("2 Hours", Duration(7200, "seconds"), "2 h"),
        ("1 d", Duration(86400, "seconds"), "24 h"),
        ("10 %", Duration(10, "percent"), "10 %"),
        ("2.5%", Duration(2.5, "percent"), "2.5 %"),
    ],
)
def test_reads_what_people_write(text, length, canonical):
    assert Duration.parse(text) == length
    assert str(length) == canonical


@pytest.mark.parametrize(
    "text",
    ["", "soon", "five steps", "-1 steps", "2.5 steps", "3 parsecs", "1e999 min", True, None],
)
def test_refuses_the_rest(text):
    with pytest.raises(ValueError, match=r"length|number"):
        Duration.parse(text)


def test_counts_in_steps():
    assert Duration(7).steps(2048, 100) == 7
    assert Duration(2048 * 3, "tokens").steps(2048, 100) == 3
    assert Duration(2048 * 3 + 1, "tokens").steps(2048, 100) == 4
    assert Duration(30, "percent").steps(2048, 100) == 30
    assert Duration(1800, "seconds").steps(2048, 100) is None
    assert Duration(1800, "seconds").seconds == 1800
    assert Duration(7).seconds is None


@given(st.integers(0, 100), st.integers(1, 10**7))
def test_percent_is_exact_where_binary_floats_are_not(percent, total):
    # 0.1 % of 1000 steps is one step, never two
    assert Duration(percent / 10, "percent").steps(1, 1000 * total) == percent * total


@given(LENGTHS, st.integers(1, 10**6), st.integers(1, 10**6))
def test_a_length_that_is_not_zero_takes_a_step(length, tokens_per_step, total):
    steps = length.steps(tokens_per_step, total)
    assert steps is None or (steps > 0) == (length.amount > 0)
