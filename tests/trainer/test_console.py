"""Lengths of time, tables and the console, as every page uses them."""

import sys

import pytest
from rich.text import Text

from forescale.console import (
    is_terminal,
    open_console,
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
    made = table("run", "loss", left=("run",))
    made.add_row("a-long-name" * 10, "1.5")
    made.add_row("b", "12.25")
    open_console().print(made)
    lines = capsys.readouterr().out.splitlines()
    assert "a-long-name" * 10 in lines[1]
    assert [line.rstrip()[-5:].lstrip() for line in lines] == ["loss", "1.5", "12.25"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc\r\n", "a\tb\nc\r\n"),
        ("\x1b[2J", r"\x1b[2J"),
        ("\x9b31m\x07\x7f", r"\x9b31m\x07\x7f"),
        ("over\rwritten", r"over\x0dwritten"),
        ("caf\udce9", r"caf\xe9"),  # a name in Latin-1, as Python holds it
        ("naïve 数据 🙂", "naïve 数据 🙂"),
    ],
)
def test_control_characters_are_shown_as_text(text, shown):
    assert visible(text) == shown


def test_tables_measure_what_they_show(capsys):
    made = table("run", "loss", left=("run",))
    made.add_row(Text("a\x1b[1m"), "1.5")
    made.add_row("\x1b[31mb", "2.5")
    console = open_console(force_terminal=True, width=40)
    console.print(made)
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
