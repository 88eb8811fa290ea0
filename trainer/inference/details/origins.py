"""Bits per byte by the origin of a document: its file type, and the input that it came with."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forescale.data.dataset import Dataset
from forescale.inference.details.tokens import WindowLosses
from forescale.train.evaluate import ratio_stderr


@dataclass(frozen=True)
class Part:
    """The documents of one origin. bits_per_byte: as of Score, of their text alone, with its
    standard error over documents, which are taken as independent; documents, bytes: how many of
    each were scored, a document also if only a part of it was."""

    name: str
    bits_per_byte: float
    stderr: float
    documents: int
    bytes: int


class DocumentSums:
    """Adds up the nats and bytes of each held-out document."""

    def __init__(self, dataset: Dataset, split: str):
        self._dataset, self._split = dataset, split
        size = dataset.split(split).num_documents
        self._nats, self._bytes = np.zeros(size), np.zeros(size, np.int64)

    def add(self, found: WindowLosses) -> None:
        """Add the targets of a window."""
        np.add.at(self._nats, found.document, found.nats)
        np.add.at(self._bytes, found.document, self._dataset.token_bytes[found.ids])

    def parts(self) -> dict[str, list[Part]]:
        """Return the parts by `kind` (file types) and by `source` (inputs of the dataset), each in
        the order of their bytes, the most first; empty if the dataset doesn't know them: it knows
        them of its validation split, if it was built from text by this version."""
        origins = self._dataset.origins if self._split == "validation" else None
        if origins is None:
            return {}
        named = {"kind": origins["kinds"], "source": origins["sources"]}
        return {by: self._by(np.array(origins[by], np.int64), names) for by, names in named.items()}

    def _by(self, number: np.ndarray, names: Sequence[str]) -> list[Part]:
        found = [self._part(name, number == i) for i, name in enumerate(names)]
        return sorted((p for p in found if p.bytes), key=lambda part: -part.bytes)

    def _part(self, name: str, chosen: np.ndarray) -> Part:
        scored = chosen & ((self._bytes > 0) | (self._nats > 0))
        nats, count = self._nats[scored], self._bytes[scored]
        if not (total := int(count.sum())):
            return Part(name, math.nan, math.nan, len(nats), 0)
        ratio = math.fsum(nats) / total
        stderr = ratio_stderr(nats, count, ratio)
        return Part(name, ratio / math.log(2), stderr / math.log(2), len(nats), total)
