"""The documents of a dataset, their splits and samples, chosen before anything is encoded.

Invariant: decided only by the documents' hashes and the config. A document is held out because of
its own hash, so it stays held out whatever is added to or removed from the corpus. All decisions
are bounds on keys, so the selection for any corpus is a few numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from forescale.data.prepare.columns import UnitFile
from forescale.data.prepare.dedupe import HashRun, dropped_of, unique_of
from forescale.data.text.documents import Document, DocumentSource, ReadingReport, Unit, cut
from forescale.ground.errors import UserError

SPLITS = ("train", "validation")
VALIDATION = SPLITS[1]
# The most held-out text, and the largest sample, for the comparison with compressors.
COMPARED, SAMPLE_FILES = 16_000_000, 400  # bytes, documents
_ALL = 1 << 64  # above every key
_CHANGED = ("changed while it was being read", "run the same command again")


class ChangedError(UserError):
    """The source gave other documents than before: all units made from it are invalid."""


class NoTextError(UserError):
    """The source holds nothing to train on."""


class Bounds(NamedTuple):
    """Bounds on document keys.

    Documents with keys below `held_out` are validation, the others training. Training documents
    below `tokenizer` are the sample for training a BPE, those below `compared` the sample that
    compressors see before the held-out text; 0 if there is no sample. is_single: there is only one
    document; its last part (a fraction of it, cut at a line) is held out.
    """

    held_out: int
    tokenizer: int
    compared: int
    is_single: bool


class Part(NamedTuple):
    """A document, or part of one, that goes into a split."""

    split: str
    key: int
    name: str
    text: bytes


@dataclass(frozen=True)
class Selection:
    """The selected documents, picklable: paths of hashes and ranges, and the bounds on keys."""

    hashes: Path
    ranges: Sequence[Path]
    bounds: Bounds
    validation: float

    def parts(
        self, source: DocumentSource, number: int, unit: Unit, report: ReadingReport
    ) -> Iterator[Part]:
        """Yield a unit's selected documents, in order. Duplicates are added to the report.

        Raises ChangedError if a document isn't the one that was hashed.
        """
        documents = source.read(unit, ReadingReport())
        with UnitFile(self.hashes / f"{number:06d}") as file:
            dropped = np.concatenate([dropped_of(path, number) for path in self.ranges])
            for run in map(HashRun._make, file.facts["runs"]):
                keys, unique = np.zeros((2, run.documents), np.uint64)
                places = run.column(file, "document") - np.uint64(run.first)
                keys[places], unique[places] = run.column(file, "key"), 1
                here = dropped - np.uint64(run.first)  # earlier documents wrap to large numbers
                unique[here[here < run.documents]] = 0
                columns = (run.column(file, "raw").tolist(), keys.tolist(), unique.tolist())
                for raw, key, is_first in zip(*columns, strict=True):
                    document = next(documents, None)
                    if document is None or xxhash.xxh3_64_intdigest(document.text) != raw:
                        raise ChangedError(unit.label, *_CHANGED)
                    if is_first:
                        yield from self._of(key, document)
                    else:
                        report.add("duplicate", document.name)
        if next(documents, None) is not None:
            raise ChangedError(unit.label, *_CHANGED)

    def _of(self, key: int, document: Document) -> Iterator[Part]:
        name, text = document.name, document.text
        if self.bounds.is_single:
            at = cut(text, 0, max(1, round(len(text) * (1 - self.validation))))
            yield Part("train", key, f"{name} (first part)", text[:at])
            if at < len(text):
                yield Part("validation", key, f"{name} (last part)", text[at:])
        else:
            yield Part("validation" if key < self.bounds.held_out else "train", key, name, text)


def choose(ranges: Sequence[Path], validation: float, sampled: int) -> Bounds:
    """Return the bounds for the distinct documents in ranges/.

    validation: fraction of the documents to hold out; at least one is held out, the one with the
    lowest key. sampled: bytes of training text for the tokenizer's sample, 0 for none; both samples
    take the documents with the lowest keys. Raises UserError if nothing is left to train on.
    """
    held_out, held_bytes, count, total = int(validation * _ALL), 0, 0, 0
    for path in ranges:
        keys, sizes = unique_of(path)
        if validation and len(keys) and not count:
            held_out = max(held_out, int(keys[0]) + 1)
        count += len(keys)
        total += int(sizes.sum())
        held_bytes += int(sizes[: _position(keys, held_out)].sum())
    if validation and count == 1:
        return Bounds(0, _ALL if sampled else 0, _ALL if total <= COMPARED else 0, is_single=True)
    if held_bytes == total:
        raise NoTextError("the source", "leaves no text for training", "give more documents")
    compared = COMPARED if 0 < held_bytes <= COMPARED else 0
    return Bounds(
        held_out,
        _bound(ranges, held_out, sampled, count, inclusive=True),
        _bound(ranges, held_out, compared, SAMPLE_FILES, inclusive=False),
        is_single=False,
    )


def _bound(
    ranges: Sequence[Path], start: int, limit: int, documents: int, *, inclusive: bool
) -> int:
    """Return the exclusive end of the keys from `start` on whose documents hold `limit` bytes and
    are at most `documents`. inclusive: including the document that reaches the limit."""
    bound = 0
    for path in ranges if limit else ():
        keys, sizes = unique_of(path)
        at = _position(keys, start)
        keys, totals = keys[at:], np.cumsum(sizes[at:].astype(np.int64))
        fits = int(np.searchsorted(totals, limit, side="left" if inclusive else "right"))
        taken = min(fits + inclusive, documents, len(keys))
        if taken:
            bound = int(keys[taken - 1]) + 1
            limit -= int(totals[taken - 1])
            documents -= taken
        if taken < len(keys) or not documents or limit <= 0:
            break
    return bound


def _position(keys: np.ndarray, bound: int) -> int:
    """Return the number of ascending keys below `bound`, which may be 2^64."""
    return len(keys) if bound >= _ALL else int(np.searchsorted(keys, np.uint64(bound)))
