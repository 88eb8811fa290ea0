"""Types for reading text: documents, units of work, the policy for faulty text, the report.

Invariant: a Document's text is valid UTF-8 and not blank; everything that gives no document, or a
changed text, is listed in the ReadingReport with its reason. Nothing is left out silently.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from forescale.data.text.where import Where
from forescale.ground.errors import UserError

_LONGEST_URL = 4096  # characters; a longer one counts as unknown
_LISTED = 200  # names kept for each reason; the counts are always exact
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One text: a name that is the same on every machine, and valid UTF-8. url: where it was found;
    "" if that isn't known; attributes: what a curation found out about it."""

    name: str
    text: bytes
    url: str = ""
    attributes: dict[str, str | float] = field(default_factory=dict)


@dataclass
class ReadingReport:
    """What was left out or changed: a count for every reason, and the first 200 names of each."""

    counts: dict[str, int] = field(default_factory=dict)
    listed: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.merge(ReadingReport({reason: 1}, {reason: [name]}))

    def merge(self, other: "ReadingReport") -> None:
        """Append a later report. The reports of all units, merged in source order, equal the report
        of the whole."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            names = self.listed.setdefault(reason, [])
            names.extend(other.listed[reason][: _LISTED - len(names)])

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """Return count and first names by reason, as stored in the manifest."""
        return {
            reason: {"count": count, "first": self.listed[reason]}
            for reason, count in sorted(self.counts.items())
        }


@dataclass(frozen=True)
class Policy:
    """What to do with text that isn't UTF-8, is blank, or is longer than a limit in bytes.

    `replace` writes U+FFFD for bytes that aren't UTF-8; `cut` drops the text beyond the limit,
    between two characters; `fail` raises an error that names the document. All except `keep` are
    counted. What the limit drops isn't examined otherwise.
    """

    undecodable: str = "skip"  # skip | replace | fail
    empty: str = "skip"  # skip | fail
    long: str = "keep"  # keep | cut | skip | fail
    max_document_bytes: int | None = None  # for cut, skip and fail: the longest document allowed

    def is_long(self, size: int) -> bool:
        limit = self.max_document_bytes
        return self.long != "keep" and limit is not None and size > limit

    def check(self) -> None:
        """Raise UserError for an unknown choice, or a limit that has no effect."""
        choices = {
            "undecodable": ("skip", "replace", "fail"),
            "empty": ("skip", "fail"),
            "long": ("keep", "cut", "skip", "fail"),
        }
        for key, known in choices.items():
            if (choice := getattr(self, key)) not in known:
                todo = f"choose {' or '.join(known)}"
                raise UserError(key, f"{choice!r} isn't a valid policy", todo)
        if self.long == "keep" and self.max_document_bytes is not None:
            problem = f"{self.max_document_bytes} has no effect while long documents are kept"
            raise UserError("max_document_bytes", problem, "set long to cut, skip or fail")
        if self.long != "keep" and (self.max_document_bytes or 0) < 1:
            problem = f"must be at least 1 with long={self.long}"
            raise UserError("max_document_bytes", problem, "set a limit, or set long to keep")


@dataclass(frozen=True)
class Unit:
    """A part of a source that is read at once; its contents depend only on the input.

    label: name for messages; size: weight in bytes for a progress bar; source: index of its input
    in `DocumentSource.sources`. The rest is defined by the source: items [first, last) of its list;
    if that is one item, possibly only the part [start, stop) of it (stop 0: the whole item).
    """

    label: str
    size: int
    source: int
    first: int = 0
    last: int = 0
    start: int = 0
    stop: int = 0


class DocumentSource(Protocol):
    """A source of documents. Picklable: workers get their own copy.

    "Source order" is the order of `units()`, and inside a unit the order of its documents.
    """

    sources: list[str]  # names of the inputs, without machine paths

    def units(self) -> list[Unit]:
        """Return the units; the same for the same input, on any machine."""

    def read(self, unit: Unit, report: ReadingReport) -> Iterator[Document]:
        """Yield the documents of a unit, the same at each call."""

    def state(self) -> Iterator[tuple[Any, ...]]:
        """Yield what changes when the input does, even if its size doesn't: finished units of an
        interrupted build are used again only if this is the same."""

    def describe(self) -> dict[str, Any]:
        """Return the request as JSON without machine paths; it is stored in the manifest."""


@dataclass(frozen=True)
class Intake:
    """Makes documents of the texts of a unit, and reports the others.

    key: of the text in rows (JSON, tables); suffixes: further ones of plain text; url_key: of the
    address in a row of JSON, or column of a table; "": none is read; where: which rows are read.
    """

    report: ReadingReport
    policy: Policy = field(default_factory=Policy)
    key: str = "text"
    suffixes: Sequence[str] = ()
    url_key: str = ""
    where: Where = field(default_factory=lambda: Where({}))

    def reads(self, name: str, value_at: Callable[[str], Any]) -> bool:
        """Return whether a row is read by the rules of `where`; report it if it isn't."""
        if not (is_read := self.where.reads(value_at)):
            self.report.add("left out by where", name)
        return is_read

    def documents(
        self,
        name: str,
        text: bytes | str,
        convert: Callable[[str], str] | None = None,
        url: str = "",
    ) -> Iterator[Document]:
        """Yield the document, or nothing. Raises UserError if the policy is `fail`.

        A str comes from a JSON parser or a table; its only possible fault is half a surrogate pair.
        Bytes more than 3 beyond the policy's limit needn't be passed. convert: applied to the
        decoded text.
        """
        is_cut = False
        if isinstance(text, bytes) and self.policy.is_long(len(text)):
            if (short := self._shortened(name, text, self.report)) is None:
                return
            text, is_cut = short, True
        try:
            if isinstance(text, str):
                raw = text.encode("utf-8")
            else:
                text.decode("utf-8")
                raw = text
        except UnicodeError as e:
            if not self.may_replace(name, e):
                return
            text = text if isinstance(text, str) else text.decode("utf-8", "replace")
            raw = _SURROGATES.sub("\ufffd", text).encode("utf-8")
        if self.policy.is_long(len(raw)):
            unreported = ReadingReport() if is_cut else self.report
            if (short := self._shortened(name, raw, unreported)) is None:
                return
            raw = short
        if convert is not None:
            raw = convert(raw.decode("utf-8")).encode("utf-8")
        if raw and not raw.isspace():
            yield Document(name, raw, url if len(url) <= _LONGEST_URL else "")
        elif self.policy.empty == "fail":
            raise UserError(name, "holds no text", "remove it, or choose empty=skip")
        else:
            self.report.add("empty", name)

    def _shortened(self, name: str, raw: bytes, report: ReadingReport) -> bytes | None:
        """Return the part of a long document that the policy keeps; None if that is nothing."""
        if self.policy.long != "cut":
            self.skip_long(name)
            return None
        report.add("long, cut", name)
        end = limit = self.policy.max_document_bytes or 0
        # To the end of a character; in bytes that aren't UTF-8 within 3 bytes of it.
        while max(0, limit - 3) < end < len(raw) and raw[end] & 0xC0 == 0x80:
            end -= 1
        return raw[:end]

    def skip_long(self, name: str, reason: str = "long") -> None:
        """Report a document that is skipped as too long; raise UserError by the policy `fail`."""
        if self.policy.long == "fail":
            problem = f"is longer than {self.policy.max_document_bytes:,} bytes"
            raise UserError(name, problem, "raise max_document_bytes, or choose long=cut or skip")
        self.report.add(reason, name)

    def may_replace(self, name: str, fault: UnicodeError) -> bool:
        """Report text that isn't UTF-8; return True if the policy is to replace what is wrong.
        Raises UserError if it is to fail."""
        at = "half a surrogate pair"
        if isinstance(fault, UnicodeDecodeError):
            at = f"byte {fault.start}"
        if self.policy.undecodable == "fail":
            todo = "fix it, or choose undecodable=skip or replace"
            raise UserError(name, f"isn't UTF-8 ({at})", todo) from None
        is_replaced = self.policy.undecodable == "replace"
        reason = "undecodable, replaced" if is_replaced else "undecodable"
        self.report.add(reason, f"{name} ({at})")
        return is_replaced


def cut(text: bytes, start: int, size: int) -> int:
    """Return the end of a piece of UTF-8 that begins at `start` and holds at most `size` bytes:
    after a line, or between two characters if the second half of the piece has no line end."""
    end = start + size
    if end >= len(text):
        return len(text)
    if (line := text.rfind(b"\n", start + size // 2, end)) >= 0:
        return line + 1
    while text[end] & 0xC0 == 0x80 and end > start:
        end -= 1
    return end if end > start else len(text)


def pieces(text: bytes, size: int) -> Iterator[str]:
    """Yield the text in pieces of at most `size` bytes (4 or more); joined they equal the text."""
    start = 0
    while True:
        end = cut(text, start, size)
        yield text[start:end].decode("utf-8")
        if end == len(text):
            return
        start = end
