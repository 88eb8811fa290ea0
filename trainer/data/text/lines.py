"""JSON lines: one document per line, of a whole file or of the lines that begin in a range of
bytes.

Invariant: however a file is cut into ranges, they give together the documents of the whole file,
each once. The first line of a range is found from the bytes around it, without scanning the file.
"""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from forescale.data.text.documents import (
    Document,
    Policy,
    ReadingReport,
    decoded,
    expect_not_long,
    may_replace,
)
from forescale.data.text.opening import Budget
from forescale.ground.errors import UserError

_BLOCK = 1 << 20
_KEYS = 8  # maximum number named in a message


class TextKey:
    """Extracts the text from rows, and remembers their keys until one row has the text."""

    def __init__(self, key: str):
        """key: name of a field, or a path such as "meta.text"."""
        self.key = key
        self.rows = 0
        self._found = self._array = False
        self._keys: dict[str, None] = {}

    def text(self, row: Any) -> str | None:
        """Return the text under the key or path; None if there is none."""
        value = row.get(self.key) if isinstance(row, dict) else None
        if value is None and "." in self.key:
            value = row
            for key in self.key.split("."):
                value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str):
            self._found = True
            return value
        if isinstance(row, dict) and len(self._keys) < _KEYS:
            self._keys |= dict.fromkeys(row)
        self._array |= isinstance(row, list) and self.rows == 1
        return None

    def check(self, where: str, problem: str) -> None:
        """Raise UserError if there were rows (`what`: line or member) but none had the key."""
        if self._found or not self.rows:
            return
        if self._array:
            todo = f"convert it to lines: jq -c '.[]' {where} > rows.jsonl"
            raise UserError(where, "holds a JSON array, not one row per line", todo)
        if self.key in self._keys:
            raise UserError(
                where, f"the values of key {self.key!r} aren't text", "choose another text_key"
            )
        there = ", ".join(sorted(self._keys)[:_KEYS])
        have = f"keys: {there}" if there else f"see the first {problem}"
        problem = f"no {problem} has a text under {self.key!r}"
        raise UserError(where, problem, f"set text_key ({have})")


def read_lines(
    name: str,
    lines: Iterator[tuple[int, bytes | None]],
    text_key: TextKey,
    report: ReadingReport,
    policy: Policy,
) -> Iterator[Document]:
    """Yield the document of every (offset, line), named by its offset in bytes: "rows.jsonl@1234".

    Blank lines are skipped; other lines that give no document are reported, also those that are too
    long to be held (None).
    """
    for offset, line in lines:
        if line is None:
            text_key.rows += 1
            expect_not_long(f"{name}@{offset}", report, policy, "long line")
        elif not line.isspace():
            yield from json_document(f"{name}@{offset}", line, text_key, report, policy)


def json_document(
    name: str, raw: bytes, text_key: TextKey, report: ReadingReport, policy: Policy
) -> Iterator[Document]:
    """Yield the text under the key of one JSON value."""
    text_key.rows += 1
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        if not may_replace(name, e, report, policy):
            return
        text = raw.decode("utf-8", "replace")
    try:
        value = text_key.text(json.loads(text.removeprefix("\ufeff")))
    except (ValueError, RecursionError):
        report.add("malformed", name)
        return
    if value is None:
        report.add(f"no text under {text_key.key!r}", name)
    else:
        yield from decoded(name, value, report, policy)


def lines_between(
    f: BinaryIO, budget: Budget, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, bytes | None]]:
    """Yield the lines that begin in [start, stop) with their offsets; without `stop` up to the end.
    A line that the budget doesn't allow is None.

    `f` must be at max(0, start - 1): only the byte before `start` shows whether a line begins
    there.
    """
    at = max(0, start - 1)
    if start:
        while not (part := f.readline(_BLOCK)).endswith(b"\n"):
            at += len(part)
            if not part or (stop is not None and at >= stop):
                return  # the line that began earlier extends beyond this range
        at += len(part)
    while stop is None or at < stop:
        line, size = _line(f, budget)
        if not size:
            return
        yield at, line
        at += size


def _line(f: BinaryIO, budget: Budget) -> tuple[bytes | None, int]:
    """Return the next line and its length; None if it may not be held."""
    part = f.readline(_BLOCK)
    if len(part) < _BLOCK or part.endswith(b"\n"):
        return part, len(part)
    held, size = [part], len(part)
    while not part.endswith(b"\n") and (part := f.readline(_BLOCK)):
        size += len(part)
        if budget.allows(size):
            held.append(part)
        else:
            held.clear()
    return (b"".join(held) if held else None), size
