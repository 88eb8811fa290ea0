"""The documents of a dataset: duplicates, splits and samples, decided before anything is encoded.

Two documents are equal if their normalised text is: Unicode NFC, CRLF as LF, no spaces and tabs at
the ends of lines, no blank lines at the beginning and the end. The SHA-256 of that text, truncated
to 128 bits, is the document's hash; its first 64 bits are the document's key, which decides
everything else: whether the document is held out, is in a sample, and its position in the shuffle.

The share `validation` of the documents is held out, those with the lowest keys. A small input gives
more, so that its loss means something: see _held_out.

Invariant: of equal documents the first in source order (unit, then document) stays, independent of
how the source is cut into units and of the order in which they are hashed. A document in the share
`validation` is held out because of its own hash, so it stays held out whatever is added to or
removed from the corpus. All decisions are bounds on keys, so the selection for any corpus is a few
numbers for each input.

    hashes/000012     per unit, in runs of _RUN documents: hash, number and size of the distinct
                      ones, sorted by hash; XXH3-64 of every document's bytes, in their order
    ranges/0003       per range of the hashes, over all units: key, size and input of the distinct
                      documents, sorted by key; unit by unit the documents that equal an earlier one

A task holds one run of a unit, or one range: about 100 MB.
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from forescale.data.prepare.columns import UnitFile, UnitWriter, finished
from forescale.data.prepare.pool import Tick
from forescale.data.text.documents import Document, DocumentSource, ReadingReport, Unit, cut
from forescale.ground.errors import UserError

SPLITS = ("train", "validation")
VALIDATION = SPLITS[1]
# Bytes: the most held-out text that compressors are compared on, the most training text before it.
COMPARED, BEFORE = 16_000_000, 64_000_000
# At least so many documents of an input are held out, and so many bytes of the corpus (some 200,000
# tokens), but at most a tenth of the input: an input of fewer than _FEW documents gives the last
# part of each, as does one whose lowest keys belong to documents with over a quarter of its text.
_DOCUMENTS, _BYTES, _TENTH, _FEW, _QUARTER = 8, 750_000, 0.1, 20, 0.25
# Inputs of fewer than _FEW documents, such as the files of a glob, count as one if they are over
# _SMALL, and all inputs if they are over _INPUTS.
_SMALL, _INPUTS = 8, 64
_ALL = 1 << 64  # above every key
_CHANGED = ("changed while it was being read", "run the same command again")
_RUN = 1 << 17  # documents
_RANGE = 1 << 20  # approximate documents per range


def normalised(text: bytes) -> bytes:
    """Return the normalised text (valid UTF-8); see the head of this file."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.decode("utf-8")).encode("utf-8")
    if b"\r" in text:
        text = text.replace(b"\r\n", b"\n")
    if b" \n" in text or b"\t\n" in text:
        text = b"\n".join(line.rstrip(b" \t") for line in text.split(b"\n"))
    text = text.rstrip(b" \t\n")
    return text.lstrip(b"\n")


def document_hash(text: bytes) -> tuple[int, int]:
    """Return the document's key, and the other 64 bits of its hash."""
    digest = hashlib.sha256(normalised(text)).digest()
    return int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:16], "big")


class HashRun(NamedTuple):
    """A run of a file in hashes/: offset in bytes, first document, documents, distinct ones."""

    offset: int
    first: int  # document of the unit
    documents: int
    distinct: int

    def column(self, file: UnitFile, name: str, start: int = 0, stop: int | None = None):
        """Return entries [start, stop) of `key`, `low`, `document`, `size` or `raw`."""
        place = ("key", "low", "document", "size", "raw").index(name)
        length = (self.documents if name == "raw" else self.distinct) if stop is None else stop
        return file.column(self.offset + 8 * place * self.distinct, length - start, "<u8", start)


def hash_unit(source: DocumentSource, directory: Path, number: int, unit: Unit, tick: Tick) -> None:
    """Hash the documents of a unit."""
    if finished(path := directory / f"{number:06d}"):
        tick(unit.size, 0)
        return
    report, runs = ReadingReport(), []
    first, size, left = 0, 0, unit.size
    documents = source.read(unit, report)
    with UnitWriter(path) as out:
        while True:
            rows: list[tuple[int, ...]] = []
            for document in islice(documents, _RUN):
                text, index = document.text, first + len(rows)
                digest = xxhash.xxh3_64_intdigest(text)
                rows.append((*document_hash(text), index, len(text), digest))
                # At most `left`: a compressed unit holds more bytes than its size.
                step = min(left, len(text))
                left -= step
                tick(step, 0)
            if not rows:
                break
            key, low, place, sizes, raw = map(np.ascontiguousarray, np.array(rows, "<u8").T)
            order = np.lexsort((low, key))  # stable: equal hashes keep their order
            order = order[is_first(key[order], low[order])]
            columns = (key[order], low[order], place[order], sizes[order], raw)
            offset, *_ = [out.add(column) for column in columns]
            runs.append(HashRun(offset, first, len(rows), len(order)))
            first += len(rows)
            size += int(sizes.sum())
        tick(left, 0)
        out.finish({"documents": first, "bytes": size, "runs": runs, "report": asdict(report)})


def is_first(key: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Return for each of the sorted hashes whether it differs from the one before it."""
    first = np.ones(len(key), bool)
    first[1:] = (key[1:] != key[:-1]) | (low[1:] != low[:-1])
    return first


def range_edges(documents: int, per_range: int = _RANGE) -> list[int]:
    """Return keys that bound ranges of about `per_range` documents, from 0 to 2^64."""
    count = max(1, -(-documents // per_range))
    return [(i << 64) // count for i in range(count + 1)]


def find_distinct(
    hashes: Path,
    directory: Path,
    units: list[list[HashRun]],
    inputs: Sequence[int],
    number: int,
    low: int,
    high: int,
    tick: Tick,
) -> None:
    """Find the distinct documents with keys in [low, high), the range of this number. units: the
    runs of each; inputs: the input of each."""
    if done := finished(path := directory / f"{number:04d}"):
        tick(done["hashes"], 0)
        return
    parts = [np.empty((5, 0), np.uint64)]  # key, rest of the hash, document, size, unit
    for number_of_unit, runs in enumerate(units):
        with UnitFile(hashes / f"{number_of_unit:06d}") as file:
            for run in runs:
                start = file.search(run.offset, run.distinct, low)
                stop = file.search(run.offset, run.distinct, high)
                if start < stop:
                    names = ("key", "low", "document", "size")
                    columns = [run.column(file, name, start, stop) for name in names]
                    columns.append(np.full(stop - start, number_of_unit, np.uint64))
                    parts.append(np.stack(columns))
    key, rest, document, size, unit = np.concatenate(parts, axis=1)
    order = np.lexsort((rest, key))  # stable, so that source order decides among equals
    unique = is_first(key[order], rest[order])
    first, dropped = order[unique], np.sort(order[~unique])  # columns are in source order
    starts = np.searchsorted(unit[dropped], np.arange(len(units) + 1))
    with UnitWriter(path) as out:
        of_input = np.array(inputs, "<u8")[unit[first]]
        results = (key[first], size[first], of_input, starts.astype("<u8"), document[dropped])
        offsets = [out.add(column) for column in results]
        out.finish({"hashes": len(key), "kept": len(first), "offsets": offsets})
    tick(len(key), 0)


def unique_of(path: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return keys (ascending), sizes and inputs of the distinct documents in a file of ranges/."""
    with UnitFile(path) as file:
        keys, sizes, inputs = (
            file.column(offset, file.facts["kept"], "<u8") for offset in file.facts["offsets"][:3]
        )
        return keys, sizes.astype(np.int64), inputs.astype(np.int64)


class ChangedError(UserError):
    """The source gave other documents than before: all units made from it are invalid."""


class NoTextError(UserError):
    """The source holds nothing to train on."""


class Bounds(NamedTuple):
    """Bounds on document keys.

    Of input i, documents with keys below `held_out[i]` are validation, the others training; of each
    of these the last part is validation too, `tails[i]` of its bytes, cut at a line. Training
    documents below `tokenizer` are the sample for training a BPE, those below `compared` what a
    compressor reads before the held-out text; 0 if there is no sample.
    """

    held_out: tuple[int, ...]
    tails: tuple[float, ...]
    tokenizer: int
    compared: int


class Part(NamedTuple):
    """A document, or part of one, that goes into a split."""

    split: str
    key: int
    name: str
    text: bytes
    document: Document  # the whole of it


@dataclass(frozen=True)
class Selection:
    """The selected documents, picklable: paths of hashes and ranges, and the bounds on keys."""

    source: DocumentSource
    hashes: Path
    ranges: Sequence[Path]
    bounds: Bounds

    def parts(self, number: int, unit: Unit, report: ReadingReport) -> Iterator[Part]:
        """Yield a unit's selected documents, in order. Duplicates are added to the report.

        Raises ChangedError if a document isn't the one that was hashed.
        """
        documents = self.source.read(unit, ReadingReport())
        held_out, tail = self.bounds.held_out[unit.source], self.bounds.tails[unit.source]
        with UnitFile(self.hashes / f"{number:06d}") as file:
            dropped = np.concatenate([self._dropped(path, number) for path in self.ranges])
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
                    name, text = document.name, document.text
                    if not is_first:
                        report.add("duplicate", name)
                    elif tail:
                        at = cut(text, 0, max(1, round(len(text) * (1 - tail))))
                        yield Part("train", key, f"{name} (first part)", text[:at], document)
                        if at < len(text):
                            last = f"{name} (last part)"
                            yield Part("validation", key, last, text[at:], document)
                    else:
                        split = "validation" if key < held_out else "train"
                        yield Part(split, key, name, text, document)
        if next(documents, None) is not None:
            raise ChangedError(unit.label, *_CHANGED)

    @staticmethod
    def _dropped(path: Path, unit: int) -> np.ndarray:
        """Return a unit's documents that a file in ranges/ lists as equal to earlier ones."""
        with UnitFile(path) as file:
            *_, starts, documents = file.facts["offsets"]
            start, stop = map(int, file.column(starts, 2, "<u8", unit))
            return file.column(documents, stop - start, "<u8", start)


def choose(
    ranges: Sequence[Path],
    validation: float,
    sampled: int,
    inputs: int,
    whole: Sequence[int] = (),
) -> Bounds:
    """Return the bounds for the distinct documents in ranges/.

    validation: fraction of the documents to hold out; 0: none. sampled: bytes of training text for
    the tokenizer's sample, 0 for none; both samples take the documents with the lowest keys.
    inputs: of the source; whole: those that are held out whole, instead of that fraction. Raises
    UserError if nothing is left to train on.
    """
    held_out, tails, held_bytes, total = _held_out(ranges, validation, inputs, whole)
    if held_bytes == total:
        raise NoTextError("the source", "leaves no text for training", "give more documents")
    compared = BEFORE if 0 < held_bytes <= COMPARED else 0
    return Bounds(
        tuple(held_out),
        tuple(tails),
        _bound(ranges, held_out, sampled, inclusive=True),
        _bound(ranges, held_out, compared, inclusive=False),
    )


def _held_out(
    ranges: Sequence[Path], validation: float, inputs: int, whole: Sequence[int]
) -> tuple[list[int], list[float], int, int]:
    """Return `held_out` and `tails` of each input, the bytes that these hold out, and those of all
    documents."""
    counts, sizes = np.zeros((2, inputs), np.int64)
    for path in ranges:
        _, sizes_D, input_D = unique_of(path)
        np.add.at(counts, input_D, 1)
        np.add.at(sizes, input_D, sizes_D)
    total, held_bytes = int(sizes.sum()), 0
    bounds, tails = [0] * inputs, [0.0] * inputs
    for i in whole:
        bounds[i], held_bytes = _ALL - 1, held_bytes + int(sizes[i])  # a bound is a uint64
    for group in _groups(counts) if validation and not whole else ():
        count, size = int(counts[group].sum()), int(sizes[group].sum())
        least = min(_BYTES * size / total, _TENTH * size) if validation < _TENTH else 0.0
        bound, held = _lowest(ranges, group, validation, count // 10, least)
        tail = 0.0
        if count < _FEW or held > max(_QUARTER, 2 * validation) * size:
            tail = max(validation, min(_TENTH, _BYTES / total))
            bound, held = 0, round(tail * size)
        held_bytes += held
        for i in group:
            bounds[i], tails[i] = bound, tail
    return bounds, tails, held_bytes, total


def _groups(counts: np.ndarray) -> list[list[int]]:
    """Return the inputs that have documents, those together that count as one. counts: documents of
    each."""
    inputs = np.flatnonzero(counts).tolist()
    small = [i for i in inputs if counts[i] < _FEW]
    if len(inputs) > _INPUTS:
        return [inputs]
    if len(small) <= _SMALL:
        return [[i] for i in inputs]
    return [small, *([i] for i in inputs if i not in small)]


def _lowest(
    ranges: Sequence[Path], group: list[int], validation: float, tenth: int, least: float
) -> tuple[int, int]:
    """Return the exclusive end of the keys of a group's held-out documents, and their bytes: all in
    the share `validation`, and those after them until there are enough. tenth: of its documents;
    least: bytes."""
    bound, documents, held = int(validation * _ALL), 0, 0
    for path in ranges:
        keys, sizes, inputs = unique_of(path)
        is_here = np.isin(inputs, group)
        keys, sizes = keys[is_here], sizes[is_here]
        number, so_far = np.arange(len(keys)) + documents, np.cumsum(sizes) - sizes + held
        few = (number < max(1, min(_DOCUMENTS, tenth))) | (so_far < least)
        taken = max(_below(keys, bound), int(few.sum()))
        documents, held = documents + taken, held + int(sizes[:taken].sum())
        if taken:
            bound = max(bound, int(keys[taken - 1]) + 1)
        if taken < len(keys):
            break
    return bound, held


def _bound(ranges: Sequence[Path], held_out: list[int], limit: int, *, inclusive: bool) -> int:
    """Return the exclusive end of the keys of the training documents that hold `limit` bytes.
    held_out: bounds of each input. inclusive: including the document that reaches the limit."""
    bound, held_out_I = 0, np.array(held_out, np.uint64)
    for path in ranges if limit else ():
        keys, sizes, inputs = unique_of(path)
        is_trained = keys >= held_out_I[inputs]
        keys, totals = keys[is_trained], np.cumsum(sizes[is_trained])
        fits = int(np.searchsorted(totals, limit, side="left" if inclusive else "right"))
        taken = min(fits + inclusive, len(keys))
        if taken:
            bound = int(keys[taken - 1]) + 1
            limit -= int(totals[taken - 1])
        if taken < len(keys) or limit <= 0:
            break
    return bound


def _below(keys: np.ndarray, bound: int) -> int:
    """Return the number of ascending keys below `bound`, which may be 2^64."""
    return len(keys) if bound >= _ALL else int(np.searchsorted(keys, np.uint64(bound)))
