"""The curve in the terminal: its shape is that of the losses, and a long file costs no more."""

import json

import pytest

from forescale.monitor import curve
from forescale.run.rows import RowWriter

FALLING = [(step, 8.0 - step / 20) for step in range(1, 101)]
_BITS = dict(zip(curve._BITS[0] + curve._BITS[1], [*range(4), *range(4)], strict=True))


def levels(lines: list[str], in_ascii: bool) -> list[int]:
    """The level of the dot in each column of the text, read back from the characters."""
    rows = [line.split("|" if in_ascii else "│")[1] for line in lines[:-1]]
    levels_of = {}
    for i, row in enumerate(reversed(rows)):
        for column, sign in enumerate(row):
            if in_ascii and sign != " ":
                levels_of[column] = 4 * i + curve._ASCII.index(sign)
            elif not in_ascii:
                for right, bits in enumerate(curve._BITS):
                    for level, bit in enumerate(bits):
                        if (ord(sign) - 0x2800) & bit:
                            levels_of[2 * column + right] = 4 * i + level
    return [levels_of[column] for column in sorted(levels_of)]


@pytest.mark.parametrize("in_ascii", [True, False])
def test_a_falling_loss_falls_from_the_top_left_to_the_bottom_right(in_ascii):
    lines = curve.lines(FALLING, 60, in_ascii)
    assert len(lines) == 7
    assert max(map(len, lines)) <= 60
    drawn = levels(lines, in_ascii)
    assert len(drawn) >= 50 * (1 if in_ascii else 2)  # every column has its dot
    assert drawn == sorted(drawn, reverse=True)
    assert (drawn[0], drawn[-1]) == (23, 0)
    assert lines[0].split()[0].startswith("7.8")
    assert lines[-1].endswith("step 100")
    assert all(line.isascii() for line in lines) == in_ascii


def test_few_steps_or_columns_have_no_curve_and_equal_losses_a_flat_one():
    assert curve.lines(FALLING[:2], 80, True) == []
    assert curve.lines(FALLING, 15, True) == []
    assert set(levels(curve.lines([(i, 2.0) for i in range(1, 9)], 40, True), True)) == {0}


def test_of_a_long_file_some_rows_are_read_from_its_beginning_to_its_end(tmp_path, monkeypatch):
    writer = RowWriter(tmp_path / "metrics.jsonl")
    for step, loss in FALLING:
        writer.add({"kind": "train", "step": step, "loss": loss if step != 50 else float("nan")})
    whole = curve.losses_of(writer.path)
    assert whole == [pair for pair in FALLING if pair[0] != 50]
    monkeypatch.setattr(curve, "_READ_WHOLE", 1000)
    monkeypatch.setattr(curve, "_SAMPLES", 20)
    monkeypatch.setattr(curve, "_END", 200)
    some = curve.losses_of(writer.path)
    assert 15 <= len(some) <= 24
    assert set(some) <= set(whole)
    assert some[0][0] <= 3
    assert some[-1] == whole[-1]
    assert curve.losses_of(tmp_path / "nothing.jsonl") == []


def test_ascii_is_for_terminals_that_have_no_braille():
    assert not curve.needs_ascii("utf-8", "xterm")
    assert curve.needs_ascii("ascii", "xterm")
    assert curve.needs_ascii("iso-8859-1", "xterm")
    assert curve.needs_ascii("utf-8", "linux")


def test_status_shows_it(trained, forescale, monkeypatch):
    code, out, _ = forescale("status", trained.path)
    assert code == 0
    assert "step 8\n" in out
    _, out, _ = forescale("status", trained.path, "--json")
    assert json.loads(out)["step"] == 8
