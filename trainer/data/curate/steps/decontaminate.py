"""Texts of evaluations are kept out of training: documents that share a word n-gram with one.

The rule is that of GPT-3 (arXiv 2005.14165, appendix C): n-grams of 13 words in lower case without
punctuation; an evaluation text of 8 to 12 words counts as one n-gram, one of fewer is not compared.
`action: drop` drops a document that shares one. `action: cut` is the paper's: the n-gram goes with
200 characters on either side, then what is shorter than 200 characters; a document that falls into
more than 10 pieces goes whole. The paper makes documents of the pieces; here a blank line joins
them. Not done: the paper spares n-grams that occur more than 10 times in the training text.

Memory: 10 bytes and up to 16 more for each n-gram of the evaluations, at most 10 million of them.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from forescale.data.curate.step import Draft
from forescale.data.curate.words import ngram_hashes, words_of
from forescale.data.shard import MANIFEST
from forescale.ground.errors import UserError

_SHORTEST = 8  # words: the least n of the paper
_MOST = 10_000_000  # n-grams of the evaluations
_WAITING = 1 << 20  # n-grams that are sorted together
_AROUND, _LEAST, _PIECES = 200, 200, 10
_TABLE = bytes(
    b if b >= 128 else ord(chr(b).lower()) if chr(b).isalnum() else 32 for b in range(256)
)
# Punctuation of three bytes: general, Chinese and Japanese, of full width; and of two in Latin-1.
_THREE = re.compile(
    rb"\xe2\x80[\x80-\xbf]|\xe2\x81[\x80-\xaf]|\xe3\x80[\x80-\x84\x88-\x91]"
    rb"|\xef\xbc[\x81-\x8f\x9a-\xa0]"
)
_TWO = re.compile(rb"\xc2[\x80-\xa9\xab-\xb4\xb6-\xb9\xbb-\xbf]")


class _Grams:
    """Hashes of the n-grams of one n, sorted, with the input that each is from, and a table by
    which nearly all others are ruled out at once."""

    def __init__(self) -> None:
        self.hashes, self.inputs = np.empty(0, np.uint64), np.empty(0, np.uint16)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._size = 0
        self._shift, self._table = np.uint64(0), np.empty(0, bool)

    def add(self, hashes: np.ndarray, source: int) -> None:
        self._waiting.append((hashes, np.full(len(hashes), source, np.uint16)))
        self._size += len(hashes)
        if self._size > max(_WAITING, len(self.hashes)):
            self.sort()

    def sort(self) -> None:
        """Take in what waits; of equal hashes the first input counts."""
        parts = zip((self.hashes, self.inputs), *self._waiting, strict=True)
        hashes, inputs = (np.concatenate(column) for column in parts)
        self.hashes, first = np.unique(hashes, return_index=True)
        self.inputs, self._waiting, self._size = inputs[first], [], 0

    def close(self) -> None:
        """Take in what waits, and make the table."""
        self.sort()
        bits = min(26, max(10, (16 * len(self.hashes)).bit_length()))
        self._shift, self._table = np.uint64(64 - bits), np.zeros(1 << bits, bool)
        self._table[self.hashes >> self._shift] = True

    def matches(self, hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the places of the hashes that are n-grams of an evaluation, and their inputs."""
        place = np.flatnonzero(self._table[hashes >> self._shift])
        entry = np.searchsorted(self.hashes, hashes[place])
        entry[entry == len(self.hashes)] = 0
        equal = self.hashes[entry] == hashes[place]
        return place[equal], self.inputs[entry[equal]]


@dataclass
class Decontaminate:
    """Drops or cuts documents that share n-grams of words with evaluation texts.

    files: plain text, JSON lines, tables, folders and globs as `forescale shards` reads them, or a
    dataset, of which the held-out text counts; text_key: of the text in rows; words: of an n-gram;
    action: drop | cut. The attribute "contaminated" names the inputs that matched.
    """

    files: list[str] = field(default_factory=list)
    text_key: str = "text"
    words: int = 13
    action: str = "drop"

    VERSION: ClassVar[int] = 1
    SOURCE: ClassVar[str] = "GPT-3, arXiv 2005.14165, appendix C"

    def check(self) -> None:
        if not self.files:
            todo = "name files with evaluation texts, or leave the step out"
            raise UserError("decontaminate.files", "is empty", todo)
        if self.action not in ("drop", "cut"):
            problem = f"{self.action!r} is no action"
            raise UserError("decontaminate.action", problem, "choose drop or cut")
        if not _SHORTEST <= self.words <= 1000:
            todo = f"set it to {_SHORTEST} to 1000"
            raise UserError("decontaminate.words", f"{self.words} is out of range", todo)

    def __getstate__(self) -> dict[str, Any]:
        """Settings only: a process that gets the step reads the files itself."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def fingerprint(self) -> str:
        """Return a hash of the n-grams: what the files, wherever they lie, contribute."""
        digest = hashlib.sha256()
        for n, grams in sorted(self._grams.items()):
            digest.update(f"{n} {len(grams.hashes)}\n".encode())
            digest.update(grams.hashes.astype("<u8").data)
        return digest.hexdigest()

    def __call__(self, draft: Draft) -> str | None:
        words = words_of(_folded(draft.text))
        spans: list[tuple[int, int]] = []  # bytes
        inputs: set[int] = set()
        for n, grams in self._grams.items():
            place, source = grams.matches(ngram_hashes(words.hash, n))
            if len(place):
                inputs.update(source.tolist())
                ends = words.end[place + n - 1]
                spans += zip(words.start[place].tolist(), ends.tolist(), strict=True)
        if not spans:
            return None
        draft.attributes["contaminated"] = ", ".join(sorted(self._names[i] for i in inputs))
        if self.action == "drop":
            return "shares text with an evaluation"
        pieces = _pieces(draft.text, sorted(spans))
        if len(pieces) > _PIECES:
            return "shares text with an evaluation in many places"
        draft.text = "\n\n".join(piece for piece in pieces if len(piece) >= _LEAST)
        return None if draft.text else "nothing left without text of an evaluation"

    @property
    def _names(self) -> list[str]:
        return [Path(path).name or path for path in self.files]

    @cached_property
    def _grams(self) -> dict[int, _Grams]:
        """The n-grams of the evaluations by n, read at the first use."""
        grams: dict[int, _Grams] = {}
        for number, path in enumerate(self.files):
            count = 0
            for text in _texts(path, self.text_key):
                hashes = words_of(_folded(text)).hash
                if (n := min(self.words, len(hashes))) >= _SHORTEST:
                    grams.setdefault(n, _Grams()).add(ngram_hashes(hashes, n), number)
                    count += 1
                    self._check_size(path, grams)
            if not count:
                problem = f"holds no text of {_SHORTEST} words or more"
                raise UserError(path, problem, "name other files in decontaminate.files")
        for of_n in grams.values():
            of_n.close()
        self._check_size(self.files[-1], grams)
        return grams

    @staticmethod
    def _check_size(path: str, grams: dict[int, _Grams]) -> None:
        if sum(of_n.hashes.size for of_n in grams.values()) > _MOST:
            problem = f"brings the evaluation texts to more than {_MOST:,} different n-grams"
            raise UserError(path, problem, "name fewer files in decontaminate.files")


def _texts(path: str, text_key: str) -> Iterator[str]:
    """Yield the texts of an input."""
    from forescale.data.dataset import Dataset
    from forescale.data.prepare.sample import documents
    from forescale.data.text.documents import Policy, ReadingReport
    from forescale.data.text.files import Files

    if (Path(path) / MANIFEST).exists():
        for raw in documents(Dataset(Path(path)), "validation"):
            yield raw.decode("utf-8", "replace")
        return
    source = Files([path], text_key, Policy(undecodable="replace"))
    for unit in source.units():
        for document in source.read(unit, ReadingReport()):
            yield document.text.decode()


def _folded(text: str) -> bytes:
    """Return the text as it is compared, byte for byte as long as the text in UTF-8: lower case,
    punctuation as spaces."""
    raw = text.encode()
    if text.isascii():
        return raw.translate(_TABLE)
    lower = text.lower().encode()
    if len(lower) != len(raw):  # a letter whose lower case takes other bytes stays
        pairs = ((char, char.lower()) for char in text)
        lower = "".join(
            low if len(low.encode()) == len(c.encode()) else c for c, low in pairs
        ).encode()
    return _TWO.sub(b"  ", _THREE.sub(b"   ", lower.translate(_TABLE)))


def _pieces(text: str, spans: list[tuple[int, int]]) -> list[str]:
    """Return what is left of a text without the spans (ascending, in bytes) and the characters
    around them."""
    raw = np.frombuffer(text.encode(), np.uint8)
    place = np.cumsum((raw & 0xC0) != 0x80) - 1  # of the character that a byte belongs to
    pieces, at = [], 0
    for start, end in spans:
        first, last = int(place[start]) - _AROUND, int(place[end - 1]) + 1 + _AROUND
        if first > at:
            pieces.append(text[at:first])
        at = max(at, last)
    return [*pieces, text[at:]] if at < len(text) else pieces
