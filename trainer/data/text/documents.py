"""The words of reading text: documents, units of work, the policy for faulty text, the report.

Invariant: a Document's text is valid UTF-8 and not blank; whatever gives no document, or another
text than its file holds, stands in the Report with its reason. Nothing is left out silently.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from forescale.errors import UserError

_LISTED = 200  # names kept for each reason; the counts are always exact
_SURROGATES = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Document:
    """One text: a name that is the same on every machine, and UTF-8 that is known to be valid."""

    name: str
    text: bytes


@dataclass
class Report:
    """What was left out and why: a count for every reason, and the first 200 names of each."""

    counts: dict[str, int] = field(default_factory=dict)
    listed: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1
        names = self.listed.setdefault(reason, [])
        if len(names) < _LISTED:
            names.append(name)

    def merge(self, other: "Report") -> None:
        """Append a later report. Merged in plan order, the reports of units make that of all."""
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            names = self.listed.setdefault(reason, [])
            names.extend(other.listed[reason][: _LISTED - len(names)])

    def as_dict(self) -> dict[str, dict[str, Any]]:
        return {
            reason: {"count": count, "first": self.listed[reason]}
            for reason, count in sorted(self.counts.items())
        }


@dataclass(frozen=True)
class Policy:
    """What happens to text that isn't UTF-8, is blank, or is longer than a limit in bytes.

    `replace` puts U+FFFD for what isn't UTF-8; `cut` drops what goes beyond the limit, between two
    characters; `fail` ends with a sentence that names the document. All but `keep` are counted.
    """

    undecodable: str = "skip"  # skip | replace | fail
    empty: str = "skip"  # skip | fail
    long: str = "keep"  # keep | cut | skip | fail
    max_document_bytes: int | None = None  # where `long` isn't keep: the longest that is kept whole

    def check(self) -> None:
        """Raises UserError for a word that isn't one of the choices, or a limit without a use."""
        choices = {
            "undecodable": ("skip", "replace", "fail"),
            "empty": ("skip", "fail"),
            "long": ("keep", "cut", "skip", "fail"),
        }
        for key, known in choices.items():
            if (have := getattr(self, key)) not in known:
                raise UserError(key, f"{have!r} is no policy", f"choose {' or '.join(known)}")
        if self.long == "keep" and self.max_document_bytes is not None:
            what = f"{self.max_document_bytes} has no effect while long documents are kept"
            raise UserError("max_document_bytes", what, "set long to cut, skip or fail")
        if self.long != "keep" and (self.max_document_bytes or 0) < 1:
            what = f"long={self.long} needs a number of bytes from 1"
            raise UserError("max_document_bytes", what, "give one, or set long to keep")


@dataclass(frozen=True)
class Unit:
    """A share of a source that is read in one go; what it holds depends on the input alone.

    `label` names it in messages, `size` is its weight in bytes for a progress bar, `source` the
    index of its input in `Source.sources`. The rest is the source's own: items [first, last) of
    its list, and where that is one item only a part of it, [start, stop) (stop 0: the whole).
    """

    label: str
    size: int
    source: int
    first: int = 0
    last: int = 0
    start: int = 0
    stop: int = 0


class Source(Protocol):
    """Where documents come from. Picklable: workers get their own copy of it.

    All documents, in plan order, are those of every unit of `units()`, in its order.
    """

    sources: list[str]  # the names of the inputs, without machine paths

    def units(self) -> list[Unit]:
        """The same for the same input, on any machine, for any number of workers."""
        ...

    def read(self, unit: Unit, report: Report) -> Iterator[Document]:
        """The documents of a unit. Read several times over, so each pass must give the same."""
        ...

    def state(self) -> Iterator[tuple[Any, ...]]:
        """What changes where the input does, though not its size: finished units of an
        interrupted build are used again only as long as this is the same."""
        ...

    def describe(self) -> dict[str, Any]:
        """What was asked for, as JSON without machine paths; it goes into the manifest."""
        ...


KEEP_GOING = Policy()


def decoded(
    name: str, text: bytes | str, report: Report, policy: Policy = KEEP_GOING
) -> Iterator[Document]:
    """The document, or nothing, as the policy has it. Raises UserError where that is `fail`.

    A str is what a JSON parser or a table gives: text whose only fault can be half a surrogate
    pair.
    """
    try:
        raw = _utf8(text)
    except UnicodeError as e:
        at = f"byte {e.start}" if isinstance(e, UnicodeDecodeError) else "half a surrogate pair"
        if policy.undecodable == "fail":
            todo = "mend it, or choose undecodable=skip or replace"
            raise UserError(name, f"isn't UTF-8 ({at})", todo) from None
        if policy.undecodable == "skip":
            report.add("undecodable", f"{name} ({at})")
            return
        report.add("undecodable, replaced", f"{name} ({at})")
        raw = _replaced(text)
    limit = policy.max_document_bytes
    if limit is not None and len(raw) > limit and policy.long != "keep":
        if policy.long == "fail":
            what = f"is {len(raw):,} bytes long, the limit is {limit:,}"
            raise UserError(name, what, "raise max_document_bytes, or choose long=cut or skip")
        report.add("long, cut" if policy.long == "cut" else "long", name)
        if policy.long == "skip":
            return
        raw = raw[: character_end(raw, limit)]
    if not raw or raw.isspace():
        if policy.empty == "fail":
            raise UserError(name, "holds no text", "remove it, or choose empty=skip")
        report.add("empty", name)
        return
    yield Document(name, raw)


def _utf8(text: bytes | str) -> bytes:
    if isinstance(text, str):
        return text.encode("utf-8")
    text.decode("utf-8")
    return text


def _replaced(text: bytes | str) -> bytes:
    text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
    return _SURROGATES.sub("\ufffd", text).encode("utf-8")


def character_end(text: bytes, limit: int) -> int:
    """The largest end of a character in valid UTF-8 that is at most `limit`."""
    end = min(limit, len(text))
    while 0 < end < len(text) and text[end] & 0xC0 == 0x80:
        end -= 1
    return end
