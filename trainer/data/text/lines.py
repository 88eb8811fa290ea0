"""JSON lines: a document each, of a whole file or of the lines that begin in a range of its bytes.

Invariant: cut at any offsets, the ranges of a file give together the documents of the whole, each
once. Where a range's first line begins is found from the bytes around it, with no scan of the file.
"""

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from forescale.data.text.documents import Document, Policy, Report, decoded
from forescale.errors import UserError

_BLOCK = 1 << 20
_KEYS = 8  # named in a message


class TextKey:
    """Takes the text out of rows, and remembers what they hold as long as none has any."""

    def __init__(self, key: str):
        self.key = key
        self.rows = 0
        self._found = self._array = False
        self._keys: dict[str, None] = {}

    def text(self, row: Any) -> str | None:
        """The text under the key, or under a path of keys like "meta.text"."""
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

    def check(self, where: str, what: str) -> None:
        """Raises UserError if there were rows (`what`: a line, a member) and none had the key."""
        if self._found or not self.rows:
            return
        if self._array:
            todo = f"make lines of it: jq -c '.[]' {where} > rows.jsonl"
            raise UserError(where, "holds a JSON array where each line should be a row", todo)
        if self.key in self._keys:
            raise UserError(where, f"what is under {self.key!r} is no text", "name another key")
        there = ", ".join(sorted(self._keys)[:_KEYS])
        have = f"there are {there}" if there else f"see its first {what}"
        raise UserError(where, f"no {what} has a text under {self.key!r}", f"name the key ({have})")


def read_lines(
    name: str,
    lines: Iterator[tuple[int, bytes]],
    text_key: TextKey,
    report: Report,
    policy: Policy,
) -> Iterator[Document]:
    """The document of every (offset, line), named by its offset in bytes: "rows.jsonl@1234".

    Blank lines are passed over; others that give no document stand in the report.
    """
    for offset, line in lines:
        if not line.isspace():
            yield from json_document(f"{name}@{offset}", line, text_key, report, policy)


def json_document(
    name: str, raw: bytes, text_key: TextKey, report: Report, policy: Policy
) -> Iterator[Document]:
    """The text under the key of one JSON value."""
    text_key.rows += 1
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        if policy.undecodable != "replace":
            yield from decoded(name, raw, report, policy)
            return
        report.add("undecodable, replaced", f"{name} (byte {e.start})")
        text = raw.decode("utf-8", "replace")
    try:
        found = text_key.text(json.loads(text.removeprefix("\ufeff")))
    except (ValueError, RecursionError):
        report.add("malformed", name)
        return
    if found is None:
        report.add(f"no text under {text_key.key!r}", name)
    else:
        yield from decoded(name, found, report, policy)


def lines_between(
    f: BinaryIO, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in [start, stop) with their offsets, up to the end without a `stop`.

    `f` stands at max(0, start - 1): only the byte before `start` says whether a line begins there.
    """
    at = max(0, start - 1)
    if start:
        while not (part := f.readline(_BLOCK)).endswith(b"\n"):
            at += len(part)
            if not part or (stop is not None and at >= stop):
                return  # the line that began before goes beyond this range
        at += len(part)
    while (stop is None or at < stop) and (line := f.readline()):
        yield at, line
        at += len(line)
