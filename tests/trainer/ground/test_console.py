"""The terminal: lengths of time, tables, the console, progress."""

import sys

import pytest
from rich.console import Console
from rich.text import Text

from forescale.ground.console import (
    Meter,
    Rates,
    amount,
    is_terminal,
    log_line,
    open_console,
    progress_display,
    span,
    table,
    unchanged_output,
    visible,
    visible_output,
)


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
    columns = table("run", "loss", left=("run",))
    columns.add_row("a-long-name" * 10, "1.5")
    columns.add_row("b", "12.25")
    open_console().print(columns)
    lines = capsys.readouterr().out.splitlines()
    assert "a-long-name" * 10 in lines[1]
    assert [line.rstrip()[-5:].lstrip() for line in lines] == ["loss", "1.5", "12.25"]


@pytest.mark.parametrize(
    ("text", "visible_text"),
    [
        ("a\tb\nc\r\n", "a\tb\nc\r\n"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b31m\x07\x7f", r"\x9b31m\x07\x7f"),
        ("over\rwritten", r"over\x0dwritten"),
        ("caf\udce9", r"caf\xe9"),  # a name in Latin-1, as Python holds it
        ("naïve 数据 🙂", "naïve 数据 🙂"),
    ],
)
def test_control_characters_are_shown_as_text(text, visible_text):
    assert visible(text) == visible_text


def test_tables_measure_what_they_show(capsys):
    columns = table("run", "loss", left=("run",))
    columns.add_row(Text("a\x1b[1m"), "1.5")
    columns.add_row("\x1b[31mb", "2.5")
    console = open_console(force_terminal=True, width=40)
    console.print(columns)
    console.print("[bold]ours[/]")
    out = capsys.readouterr().out
    assert r"a\x1b[1m " in out
    assert r"\x1b[31mb " in out
    assert "\x1b[1mours" in out  # our own bold


def test_a_terminal_stays_one_for_our_consoles_but_libraries_see_none(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    with visible_output():
        assert not sys.stdout.isatty()
        assert is_terminal(sys.stdout)
        assert open_console().is_terminal
        print("\x1b[2J", file=unchanged_output())
    assert capsys.readouterr().out == "\\x1b[2J\n"


def test_text_for_programs_reaches_a_pipe_unchanged(capsys):
    with visible_output():
        print("a\x0cb", file=unchanged_output())
        print("a\x0cb")
    assert capsys.readouterr().out == "a\x0cb\na\\x0cb\n"


def test_a_rate_covers_the_last_30_seconds_and_gives_the_time_left():
    rates = Rates(now=100.0)
    assert rates.text(1000, "bytes") == ""  # nothing was measured yet
    for second in range(61):
        fast = max(0, second - 30)  # ten times as fast in the second half
        rates.see(100.0 + second, 1_000_000 * (second + 9 * fast), 250_000 * (second + 9 * fast))
    assert rates.text(400_000_000, "bytes") == "10.0 MB/s, 2,500,000 tokens/s, 7 s left"
    done = 1_000_000 * (60 + 9 * 30)
    # At the end of a phase the rate covers the whole phase.
    assert rates.text(done, "bytes") == "5.5 MB/s, 1,375,000 tokens/s"


def test_a_few_slow_units_give_a_rate_and_no_time_left_yet():
    rates = Rates(now=0.0)
    rates.see(20.0, 1, 0)
    assert rates.text(8, "fits") == "0.05 fits/s"
    rates.see(24.0, 4, 0)
    assert rates.text(8, "fits") == "0.17 fits/s, 24 s left"


def test_amounts_are_readable():
    assert amount(12_000_000, 40_000_000, "bytes") == "12.0 of 40.0 MB (30%)"
    assert amount(1_234, 1_234, "bytes") == "1,234 bytes"
    assert amount(5_000, None, "documents") == "5,000 documents"


def test_without_a_terminal_there_are_plain_lines(capsys):
    with progress_display(every=0) as progress:
        meter = Meter(progress, "tokenise", 3_000_000, "bytes")
        meter(1_500_000, 400_000)
        meter(1_400_000, 400_000)
        meter.end()
        log_line(progress, "a sentence")
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(" (")[0] for line in lines] == [
        "tokenise: 1.5 of 3.0 MB",
        "tokenise: 2.9 of 3.0 MB",
        "tokenise: 3.0 MB",
        "a sentence",
    ]
    assert not any("\x1b" in line or "\r" in line for line in lines)


def test_a_table_wider_than_the_terminal_is_shown_in_bands():
    """Each begins with the columns that tell its rows apart, and nothing is cut."""
    rows = table("recipe", "C", "loss", "learning rate", left=("recipe",))
    rows.add_row("llama", "1e9", "2.1", "0.01 to 0.04")
    rows.add_row("llama", "2e9", "1.9", "0.02 to 0.08")
    texts = {}
    for width in (28, 99, 9):
        console = Console(width=width)
        with console.capture() as capture:
            console.print(rows)
        texts[width] = [line.rstrip() for line in capture.get().splitlines()]
    assert texts[28] == [
        "recipe    C  loss",
        "llama   1e9   2.1",
        "llama   2e9   1.9",
        "",
        "recipe    C  learning rate",
        "llama   1e9   0.01 to 0.04",
        "llama   2e9   0.02 to 0.08",
    ]
    assert texts[99][1] == "llama   1e9   2.1   0.01 to 0.04"
    assert len(texts[9]) == 3  # no band has room for a column: cut
