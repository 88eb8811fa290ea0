"""Lengths of time, tables and the console, as every page uses them."""

import pytest

from forescale.console import open_console, span, table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"), (0.31, "0.31 s"), (12, "12 s"), (119, "119 s"), (150, "2.5 min"),
        (8000, "2.2 h"), (36_000, "10 h"), (1e6, "12 d"), (1e9, "11,574 d"),
    ],
)  # fmt: skip
def test_a_length_of_time_reads_in_its_largest_unit(seconds, text):
    assert span(seconds) == text


def test_a_pipe_cuts_nothing_and_numbers_stand_to_the_right(capsys):
    made = table("run", "loss", left=("run",))
    made.add_row("a-long-name" * 10, "1.5")
    made.add_row("b", "12.25")
    open_console().print(made)
    lines = capsys.readouterr().out.splitlines()
    assert "a-long-name" * 10 in lines[1]
    assert [line.rstrip()[-5:].lstrip() for line in lines] == ["loss", "1.5", "12.25"]
