"""Which documents a dataset keeps, in which split, in which order: decided once, before encoding.

Invariant: decided by the documents' text and the config alone. A document is held out because of
its own hash, so it stays held out whatever else is added to or taken from the corpus.
"""

import hashlib
from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np

from trainer.data.order import mix64
from trainer.data.progress import Progress
from trainer.data.text import Document, Report, Source
from trainer.errors import UserError

SPLITS = ("train", "validation")


class Plan:
    """One pass over the source: hashes, exact duplicates (the first is kept), the split.

    `validation` is the share of documents whose hash holds them out; at least one is, the one with
    the lowest hash, and of a source with a single document its last part (cut at a line end).
    Memory: about 200 bytes a document. Raises UserError where no document is left.
    """

    def __init__(self, source: Source, validation: float, seed: int, progress: Progress):
        self.source, self.seed = source, seed
        self.report = Report()
        self._flags = bytearray()  # for every document of the source: is it kept?
        lengths, keys = array("q"), array("Q")
        corpus, seen = hashlib.sha256(), set()
        for document in source.documents(self.report):
            digest = hashlib.sha256(document.text).digest()
            self._flags.append(digest not in seen)
            if digest in seen:
                self.report.add("duplicate", document.name)
                continue
            seen.add(digest)
            lengths.append(len(document.text))
            keys.append(int.from_bytes(digest[:8], "little"))
            corpus.update(f"{document.name}\0{digest.hex()}\n".encode())
            if len(keys) % 64 == 0:
                progress("read documents", len(keys), None, "documents")
        self.lengths = np.frombuffer(lengths, np.int64)
        self.keys = np.frombuffer(keys, np.uint64)
        self.corpus_hash = corpus.hexdigest()
        if not len(keys):
            left_out = ", ".join(f"{n} {why}" for why, n in self.report.counts.items())
            raise UserError(
                "the source", "holds no usable document", f"left out: {left_out or 'nothing'}"
            )
        progress("read documents", len(keys), len(keys), "documents")
        self.held_out = self.keys < np.uint64(min(validation * 2**64, 2**64 - 1))
        if validation and not self.held_out.any():
            self.held_out[np.argmin(self.keys)] = True

    def indices(self, split: str) -> np.ndarray:
        """The kept documents of a split, in corpus order."""
        return np.flatnonzero(self.held_out if split == "validation" else ~self.held_out)

    def shuffled(self, split: str) -> np.ndarray:
        """The same in the order in which they are written: by a hash of their hash and the seed."""
        indices = self.indices(split)
        salt = mix64(np.array([self.seed % 2**64], np.uint64) + np.uint64(1))
        return indices[np.argsort(mix64(self.keys[indices] ^ salt), kind="stable")]

    def sample(self, documents: int) -> np.ndarray:
        """A fixed sample of the training documents (lowest hashes), in corpus order."""
        train = self.indices("train")
        return np.sort(train[np.argsort(self.keys[train], kind="stable")[:documents]])

    def sample_bytes(self, limit: int) -> np.ndarray:
        """Training documents by hash until they hold `limit` bytes, in corpus order."""
        train = self.indices("train")
        by_hash = train[np.argsort(self.keys[train], kind="stable")]
        count = np.searchsorted(np.cumsum(self.lengths[by_hash]), limit)
        return np.sort(by_hash[: count + 1])

    def bytes(self, split: str) -> int:
        return int(self.lengths[self.indices(split)].sum())

    def documents(self, wanted: np.ndarray | None = None) -> Iterator[tuple[int, Document]]:
        """Another pass over the kept documents (or the wanted ones of them) with their indices."""
        chosen = np.ones(len(self.keys), bool)
        if wanted is not None:
            chosen[:] = False
            chosen[wanted] = True
        index = 0
        for flag, document in zip(self._flags, self.source.documents(Report()), strict=False):
            if not flag:
                continue
            if index < len(chosen) and chosen[index]:
                digest = hashlib.sha256(document.text).digest()
                if int.from_bytes(digest[:8], "little") != int(self.keys[index]):
                    raise UserError(document.name, "changed while it was read", "try again")
                yield index, document
            index += 1
        if index != len(self.keys):
            raise UserError("the source", "changed while it was read", "try again")


class Halves:
    """A source of one document as two: what comes before its last part, and that part."""

    def __init__(self, source: Source, validation: float):
        self._source, self._share = source, validation

    def describe(self) -> dict[str, Any]:
        return self._source.describe()

    def documents(self, report: Report) -> Iterator[Document]:
        for document in self._source.documents(report):
            at = cut(document.text, 0, max(1, round(len(document.text) * (1 - self._share))))
            yield Document(f"{document.name} (first part)", document.text[:at])
            yield Document(f"{document.name} (last part)", document.text[at:])


def cut(text: bytes, start: int, size: int) -> int:
    """The end of a piece of UTF-8 that begins at `start` and holds at most `size` bytes: after a
    line, or where the second half of the piece has no line end, between two characters."""
    end = start + size
    if end >= len(text):
        return len(text)
    if (line := text.rfind(b"\n", start + size // 2, end)) >= 0:
        return line + 1
    while text[end] & 0xC0 == 0x80 and end > start:
        end -= 1
    return end if end > start else len(text)


def pieces(text: bytes, size: int) -> Iterator[str]:
    """The text in pieces of at most `size` bytes (4 or more); joined they are the text."""
    start = 0
    while True:
        end = cut(text, start, size)
        yield text[start:end].decode("utf-8")
        if end == len(text):
            return
        start = end
