"""The loss of a run as a few lines of text, for the terminal.

Invariant: it costs the same for a long run as for a short one, because of a long file only rows
at even distances are read. `forescale status` must start at once, so this file imports no numpy;
and it draws the dots itself, since the import of plotext takes 0.2 s, half of the verb's own time.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from statistics import median

from forescale.run.rows import Row, each_row

_READ_WHOLE = 1 << 20  # bytes of a file that is read from end to end
_SAMPLES = 400  # rows that are read of a longer one, and those in its last bytes:
_END = 1 << 14
_EARLY = 0.03  # of the steps: what is higher there is drawn at the upper edge
_WINDOW = 40  # a median is taken over this part of the points
_LEAST = 3  # points from which on there is a curve
# The bit of each dot of a braille character: by column, from the lowest dot up.
_BITS = ((0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08))
_ASCII = ("_", ".", "-", "'")  # a dot at a quarter of a line, from the lowest up
_LEVELS = 4  # of one line


def needs_ascii(encoding: str, terminal: str) -> bool:
    """Return True where braille can't be shown: by the encoding of the output, or because the
    terminal ($TERM) is the bare console of Linux, whose font has none."""
    try:
        "⣿│".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return True
    return terminal == "linux"


def losses_of(path: Path) -> list[tuple[int, float]]:
    """Return steps and finite losses of a file of rows: all, or some at even distances. Raises
    UserError for a damaged row among those that are read."""

    def steps_from(begin: int) -> Iterator[Row]:
        return (row for row, _ in each_row(path, begin) if row.get("kind") == "train")

    size, rows = path.stat().st_size if path.exists() else 0, list[Row]()
    if size > _READ_WHOLE:
        for i in range(_SAMPLES):
            rows += islice(steps_from(size * i // _SAMPLES), 1)
    rows += steps_from(max(0, size - _END) if rows else 0)
    losses = {row["step"]: row.get("loss", math.nan) for row in rows}
    return [(step, losses[step]) for step in sorted(losses) if math.isfinite(losses[step])]


def lines(
    points: Sequence[tuple[int, float]], width: int, in_ascii: bool, height: int = 6
) -> list[str]:
    """Return the curve of (step, loss) points as lines of text; none if the points are too few.
    width: columns of the whole; in_ascii: only ASCII characters, else braille; height: lines of the
    curve, without that of the steps."""
    left = 8  # columns of the numbers
    columns = (width - left - 1) * (1 if in_ascii else 2)
    if len(points) < _LEAST or columns < 10:
        return []
    last, reach = points[-1][0], len(points) // _WINDOW // 2
    losses = [loss for _, loss in points]  # each becomes the median of those around it
    around = (losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses)))
    points = [(step, median(near)) for (step, _), near in zip(points, around, strict=True)]
    late = [loss for step, loss in points if step >= _EARLY * last]
    low, high = min(late), max(late)
    heights = _heights(points, columns, low, high, height * _LEVELS)
    blank, per = (ord(" "), 1) if in_ascii else (0x2800, 2)  # per: columns of a character
    cells = [[blank] * (max(heights) // per + 1) for _ in range(height)]
    for column, level in heights.items():
        row, dot = height - 1 - level // _LEVELS, level % _LEVELS
        if in_ascii:
            cells[row][column] = ord(_ASCII[dot])
        else:
            cells[row][column // 2] |= _BITS[column % 2][dot]
    drawn = ["".join(map(chr, characters)) for characters in cells]
    numbers = [""] * height
    numbers[0], numbers[-1] = f"{high:.4g}", f"{low:.4g}"
    edge = "|" if in_ascii else "│"
    rows = [f"{n:>{left - 1}} {edge}{row}".rstrip() for n, row in zip(numbers, drawn, strict=True)]
    end = f"step {last:,}"
    return [*rows, f"{'loss':>{left - 1}}  0{end:>{len(drawn[0]) - 1}}"]


def _heights(
    points: Sequence[tuple[int, float]], columns: int, low: float, high: float, levels: int
) -> dict[int, int]:
    """Return the level, from 0, of the median loss in each column that has one; between columns
    that have one by a straight line."""
    inside: dict[int, list[float]] = {}
    for step, loss in points:
        inside.setdefault((columns - 1) * step // points[-1][0], []).append(loss)
    known = {
        column: min(high, max(low, median(losses))) for column, losses in sorted(inside.items())
    }
    scale = (levels - 1) / (high - low) if high > low else 0.0
    levels_of = {column: round((loss - low) * scale) for column, loss in known.items()}
    for (begin, first), (end, second) in pairwise(known.items()):
        for between in range(begin + 1, end):
            value = first + (second - first) * (between - begin) / (end - begin)
            levels_of[between] = round((value - low) * scale)
    return levels_of
