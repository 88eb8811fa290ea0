"""Formats of text: plain files, HTML pages, JSON and JSON lines.

Invariant: however a file of JSON lines is cut into ranges of bytes, they give together the
documents of the whole file, each once; the first line of a range is found from the bytes around it,
without scanning the file. The time for a page is linear in its length, whatever it holds
(html.parser of the standard library needs minutes for 80 kB of `<a '`, and stops at some pages). A
page that breaks the rules of HTML gives some text, never an error.
"""

import html
import json
import re
from collections.abc import Iterator
from io import BufferedReader
from typing import Any, BinaryIO

from forescale.data.text.documents import Document, Intake
from forescale.data.text.opening import Budget, is_text
from forescale.ground.errors import UserError

_BLOCK = 1 << 20
_KEYS = 8  # maximum number named in a message
_HIDDEN = ("script", "style")  # elements whose content is no text
_BLOCK_NAMES = (
    "address article aside blockquote body br caption dd details div dl dt fieldset figcaption "
    "figure footer form h1 h2 h3 h4 h5 h6 head header hr html li main nav ol option p pre section "
    "summary table tbody td tfoot th thead title tr ul"
)
_BLOCKS = frozenset(_BLOCK_NAMES.split())
_NAME = re.compile(r"</?([a-zA-Z][a-zA-Z0-9]*)")
_SPACES = re.compile(r"[ \t\r\f\v]+")
_LINES = re.compile(r" ?\n[ \n]*\n ?")


class TextKey:
    """Extracts the text from rows, and remembers their keys until one row has the text."""

    def __init__(self, key: str):
        """key: name of a field, or a path such as "meta.text"."""
        self.key = key
        self.rows = 0
        self._has_text = self._is_array = False
        self._keys: dict[str, None] = {}

    def text(self, row: Any) -> str | None:
        """Return the text under the key or path; None if there is none."""
        value = value_at(row, self.key)
        if isinstance(value, str):
            self._has_text = True
            return value
        if isinstance(row, dict) and len(self._keys) < _KEYS:
            self._keys |= dict.fromkeys(row)
        self._is_array |= isinstance(row, list) and self.rows == 1
        return None

    def check(self, where: str, row: str) -> None:
        """Raise UserError if there were rows (`row`: line or member) but none had the key."""
        if self._has_text or not self.rows:
            return
        if self._is_array:
            todo = f"convert it to lines: jq -c '.[]' {where} > rows.jsonl"
            raise UserError(where, "holds a JSON array, not one row per line", todo)
        if self.key in self._keys:
            problem = f"the values of key {self.key!r} aren't text"
            raise UserError(where, problem, "choose another text_key")
        keys = ", ".join(sorted(self._keys)[:_KEYS])
        todo = f"set text_key ({f'keys: {keys}' if keys else f'see the first {row}'})"
        raise UserError(where, f"no {row} has a text under {self.key!r}", todo)


def value_at(row: Any, path: str) -> Any:
    """Return the value under a key or a path such as "meta.text"; None if there is none."""
    value = row.get(path) if isinstance(row, dict) else None
    if value is None and "." in path:
        value = row
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
    return value


def read_plain(
    intake: Intake, name: str, where: str, stream: BufferedReader, kind: str
) -> Iterator[Document]:
    """Yield the document of a stream. kind: plain, html or bare, from `opening.kind_of`."""
    if kind == "bare" and not is_text(stream):
        while stream.read(_BLOCK):  # verify the rest: it may be compressed
            pass
        intake.report.add("no suffix and not text", name)
        return
    budget = Budget(name, where, intake.policy.max_document_bytes)
    blocks, size = list[bytes](), 0
    while block := stream.read(_BLOCK):
        if budget.allows(size):  # beyond the limit the rest is only verified
            blocks.append(block)
        size += len(block)
    if kind == "html":
        intake.report.add("markup removed", name)
    yield from intake.documents(name, b"".join(blocks), text_of if kind == "html" else None)


def read_json(
    intake: Intake, name: str, where: str, stream: BinaryIO, text_key: TextKey
) -> Iterator[Document]:
    """Yield the document of a stream that is one JSON value."""
    budget, blocks, size = Budget.of_line(name, where, intake.policy), list[bytes](), 0
    while block := stream.read(_BLOCK):
        size += len(block)
        if budget.allows(size):
            blocks.append(block)
        else:
            blocks.clear()
    if size and not blocks:
        text_key.rows += 1
        intake.skip_long(name)
    else:
        yield from _json_document(intake, name, b"".join(blocks), text_key)


def read_lines(
    intake: Intake,
    name: str,
    where: str,
    stream: BinaryIO,
    text_key: TextKey,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[Document]:
    """Yield the document of every line that begins in [start, stop), named by its offset in bytes:
    "rows.jsonl@1234". See `lines_between` for the stream.

    Blank lines are skipped; other lines that give no document are reported, also those that are too
    long to be held.
    """
    budget = Budget.of_line(name, where, intake.policy)
    for offset, line in lines_between(stream, budget, start, stop):
        if line is None:
            text_key.rows += 1
            intake.skip_long(f"{name}@{offset}", "long line")
        elif not line.isspace():
            yield from _json_document(intake, f"{name}@{offset}", line, text_key)


def _json_document(intake: Intake, name: str, raw: bytes, text_key: TextKey) -> Iterator[Document]:
    text_key.rows += 1
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        if not intake.may_replace(name, e):
            return
        text = raw.decode("utf-8", "replace")
    try:
        row = json.loads(text.removeprefix("\ufeff"))
        value = text_key.text(row)
    except (ValueError, RecursionError):
        intake.report.add("malformed", name)
        return
    if value is None:
        intake.report.add(f"no text under {text_key.key!r}", name)
    elif intake.reads(name, lambda key: value_at(row, key)):
        url = value_at(row, intake.url_key)
        yield from intake.documents(name, value, url=url if isinstance(url, str) else "")


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
        part = f.readline(_BLOCK)
        parts, size = [part], len(part)
        while len(part) == _BLOCK and not part.endswith(b"\n"):
            part = f.readline(_BLOCK)
            size += len(part)
            if budget.allows(size):
                parts.append(part)
            else:
                parts.clear()
        if not size:
            return
        yield at, b"".join(parts) if parts else None
        at += size


def text_of(page: str) -> str:
    """Return the text of a page: a line for each block, one space for each run of spaces,
    characters for entities such as &amp;."""
    joined = _SPACES.sub(" ", html.unescape("".join(_pieces(page))))
    lines = _LINES.sub("\n\n", joined).replace(" \n", "\n").replace("\n ", "\n").strip()
    return f"{lines}\n" if lines else ""


def _pieces(page: str) -> Iterator[str]:
    """Yield the text between tags, and a line end for each tag of a block."""
    lower, at = page.lower(), 0
    if len(lower) != len(page):  # a few capitals become two characters
        lower = page
    endless: set[str] = set()  # ends that don't come any more: nothing is searched twice
    while (start := page.find("<", at)) >= 0:
        yield page[at:start]
        name, end = _NAME.match(lower, start), None
        if page.startswith("<!--", start):
            end = _after(lower, "-->", start + 4, endless)
        elif name and name[1] in _HIDDEN and lower[start + 1] != "/":
            opened = _after(lower, ">", start, endless)
            end = opened and _after(lower, f"</{name[1]}", opened, endless)
            end = end and _after(lower, ">", end, endless)
        if end is None and (name or page.startswith(("<!", "<?"), start)):
            end = _after(lower, ">", start, endless)
        if end is None:
            yield "<"
            at = start + 1
            continue
        if name and name[1] in _BLOCKS:
            yield "\n"
        at = end
    yield page[at:]


def _after(text: str, part: str, start: int, endless: set[str]) -> int | None:
    """Return the end of the next `part` from `start` on; None if there is none."""
    if part in endless:
        return None
    if (at := text.find(part, start)) < 0:
        endless.add(part)
        return None
    return at + len(part)
