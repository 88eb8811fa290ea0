"""Which documents a dataset keeps, in which split, in which samples: decided before any is encoded.

Invariant: decided by the documents' hashes and the config alone. A document is held out because of
its own hash, so it stays held out whatever else is added to or taken from the corpus. Everything
here is a bound on keys, so that a plan of any corpus is a few numbers.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from forescale.data.prepare.baselines import SAMPLE_FILES
from forescale.data.prepare.columns import UnitFile
from forescale.data.prepare.dedupe import Run, dropped_of, kept_of
from forescale.data.text.documents import Document, Report, Source, Unit
from forescale.data.text.pieces import cut
from forescale.errors import UserError

SPLITS = ("train", "validation")
COMPARED = 16_000_000  # bytes of held-out text, and of its sample, that compressors are tried on
_ALL = 1 << 64  # above every key


class ChangedError(UserError):
    """The source gave other documents than before: what was made of it is worth nothing."""

    def __init__(self, where: str, what: str = "changed while it was read", todo: str = ""):
        super().__init__(where, what, todo or "give the same command again")


class NoTextError(UserError):
    """The source holds nothing to train on."""


class Bounds(NamedTuple):
    """Keys below `held_out` are validation, from there on training. Of the training documents those
    below `tokenizer` are the sample that a BPE is trained on, those below `compared` the one that
    compressors see before the held-out text; 0 where there is none.

    is_single: there is one document; its last part (a share of it, cut at a line) is held out.
    """

    held_out: int
    tokenizer: int
    compared: int
    is_single: bool


class Part(NamedTuple):
    """What a document, or a part of one, is to be: text for a split."""

    split: str
    key: int
    name: str
    text: bytes


@dataclass(frozen=True)
class Plan:
    """A plan, picklable: where the hashes and ranges lie, and the bounds on keys."""

    hashes: Path
    ranges: Sequence[Path]
    bounds: Bounds
    validation: float

    def parts(self, source: Source, number: int, unit: Unit, report: Report) -> Iterator[Part]:
        """A unit's documents that are kept, in their order. Duplicates go into the report.

        Raises ChangedError where a document isn't the one that was hashed.
        """
        documents = source.read(unit, Report())
        with UnitFile(self.hashes / f"{number:06d}") as file:
            dropped = np.concatenate([dropped_of(path, number) for path in self.ranges])
            for run in map(Run._make, file.facts["runs"]):
                keys, is_kept = np.zeros((2, run.documents), np.uint64)
                places = run.column(file, "document") - np.uint64(run.first)
                keys[places], is_kept[places] = run.column(file, "key"), 1
                here = dropped - np.uint64(run.first)  # what lies before wraps round
                is_kept[here[here < run.documents]] = 0
                columns = (run.column(file, "raw").tolist(), keys.tolist(), is_kept.tolist())
                for raw, key, kept in zip(*columns, strict=True):
                    document = next(documents, None)
                    if document is None or xxhash.xxh3_64_intdigest(document.text) != raw:
                        raise ChangedError(unit.label)
                    if kept:
                        yield from self._of(key, document)
                    else:
                        report.add("duplicate", document.name)
        if next(documents, None) is not None:
            raise ChangedError(unit.label)

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
    """The bounds for what the files in ranges/ keep.

    validation: the share of documents that is held out; at least one is, the one with the lowest
    key. sampled: bytes of training text for the tokenizer's sample, 0 for none; both samples take
    the documents with the lowest keys. Raises UserError where nothing is left to train on.
    """
    held_out, held_bytes, count, total = int(validation * _ALL), 0, 0, 0
    for path in ranges:
        keys, sizes = kept_of(path)
        if validation and len(keys) and not count:
            held_out = max(held_out, int(keys[0]) + 1)
        count += len(keys)
        total += int(sizes.sum())
        held_bytes += int(sizes[: _position(keys, held_out)].sum())
    if validation and count == 1:
        return Bounds(0, _ALL if sampled else 0, _ALL if total <= COMPARED else 0, is_single=True)
    if held_bytes == total:
        raise NoTextError("the source", "leaves no text to train on", "give more documents")
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
    """The end of the keys from `start` on whose documents hold `limit` bytes and are `documents` at
    most; inclusive: with the document that reaches the limit, else without what goes beyond."""
    bound = 0
    for path in ranges if limit else ():
        keys, sizes = kept_of(path)
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
    """How many of the ascending keys are below `bound`, which may be 2^64."""
    return len(keys) if bound >= _ALL else int(np.searchsorted(keys, np.uint64(bound)))
