"""Repeated passages over all units: each stays where it occurs first, and is cut elsewhere.

    anchor_unit     texts of a unit -> anchors/000012: hashes of chosen n-grams and their places
    find_repeats    a range of the hashes over all units -> repeats/0003: places of anchors that
                    occurred before, and of their first occurrence
    cut_unit        texts of a unit, and repeats -> the passages to cut, each verified in the text

After Lee et al. (arXiv 2107.06499), who cut passages of 50 tokens or more, found by a suffix array
over the corpus. Here n-grams of `words` words are chosen by winnowing (Schleimer et al. 2003): of
every `window` neighbouring n-grams the one with the lowest hash, the last of equal ones. An n-gram
that occurred before, in source order (unit, document, place), is extended in both documents as far
as the words are equal. White space between words is not compared.

Guarantees: a passage of words + window - 1 words or more that occurred before is found, and all of
it cut but at most window - 1 words at either end; these go too where the first occurrence of the
n-gram has them. Every cut is a passage of `words` words or more, equal word by word to one that
occurred before; of each word one occurrence stays.

Invariant: the passages depend on the texts and the settings alone: not on the number of processes,
restarts, or where ranges are cut.

Memory: about 100 MB for `anchor_unit` and `find_repeats`, and 30 bytes for each byte of the largest
document beyond some MB; for `cut_unit` twice that, and 24 bytes for each repeated anchor of the
unit. Disk: 16 bytes for each of some (window + 1) / 2 words, that is a fifth of the text.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from forescale.data.curate.words import Words, mixed, ngram_hashes, words_of
from forescale.data.prepare.columns import UnitFile, UnitWriter, facts, finished
from forescale.data.prepare.pool import Tick
from forescale.ground.errors import UserError

VERSION = 1  # raise it when other passages are found than before
_RUN = 1 << 20  # anchors sorted together
_HELD = 1 << 22  # words of earlier documents held while a unit is cut
Fetch = Callable[[int, int], str]  # the text of a unit's document, as `anchor_unit` got it


@dataclass(frozen=True)
class Substrings:
    """Settings: `words`, the shortest passage that is cut; `window`, of neighbouring n-grams of
    which one is stored: a larger one takes less disk, and misses more of the shortest passages."""

    words: int = 50  # of the shortest passage that is cut
    window: int = 25  # neighbouring n-grams of which one is stored

    def check(self) -> None:
        for key, least, most in (("words", 5, 10_000), ("window", 1, 1000)):
            if not least <= getattr(self, key) <= most:
                problem = f"{getattr(self, key)} is out of range"
                raise UserError(key, problem, f"set it to {least} to {most}")


class AnchorRun(NamedTuple):
    """A run of a file in anchors/: offset in bytes, and anchors: hashes, ascending, equal ones in
    source order. Behind them are their documents, and then their places in words (uint32)."""

    offset: int
    anchors: int

    def column(self, file: UnitFile, place: int, start: int, stop: int) -> np.ndarray:
        """Return entries [start, stop) of the documents (0) or the places (1)."""
        offset = self.offset + (8 + 4 * place) * self.anchors
        return file.column(offset, stop - start, "<u4", start)


def anchor_unit(
    texts: Iterable[str | None], out: UnitWriter, settings: Substrings
) -> dict[str, Any]:
    """Add the anchors of a unit's texts to `out`, and return the facts to finish it with.

    texts: of each document in order; None for one that is dropped already: it is numbered, and
    never an earlier occurrence.
    """
    runs: list[AnchorRun] = []
    parts: list[np.ndarray] = []  # rows of hash, document, place
    size = 0
    for number, text in enumerate(texts):
        if text is None:
            continue
        hashes = ngram_hashes(words_of(text.encode()).hash, settings.words)
        place = winnowed(hashes, settings.window)
        # One document may hold a million anchors: a run takes whole documents.
        # Winnowing takes low hashes: mixed again, they fill ranges of equal width alike.
        keys = mixed(hashes[place])
        parts.append(np.stack([keys, np.full(len(place), number, "<u8"), place]))
        size += len(place)
        if size >= _RUN:
            runs.append(_add_run(parts, out))
            size = 0
    if size:
        runs.append(_add_run(parts, out))
    return {"runs": runs}


def winnowed(hashes: np.ndarray, window: int) -> np.ndarray:
    """Return the places (uint64, ascending) that winnowing chooses: in every `window` neighbouring
    hashes the last of the lowest; of fewer hashes one."""
    count = len(hashes)
    window = min(window, count)
    if not count:
        return np.empty(0, np.uint64)
    # The place of the lowest of 1, 2, 4 ... hashes from each one on, then of two such that overlap.
    place, size = np.arange(count), 1
    while 2 * size <= window:
        place, size = _lower(hashes, place[:-size], place[size:]), 2 * size
    if shift := window - size:
        place = _lower(hashes, place[:-shift], place[shift:])
    return place[np.flatnonzero(np.diff(place, prepend=-1))].astype(np.uint64)


def _lower(hashes: np.ndarray, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return of two places that with the lower hash; `other` is the later one."""
    return np.where(hashes[other] <= hashes[one], other, one)


def _add_run(parts: list[np.ndarray], out: UnitWriter) -> AnchorRun:
    """Write a run of the parts, which are then forgotten."""
    key, document, place = np.concatenate(parts, axis=1)
    parts.clear()
    order = np.argsort(key, kind="stable")
    offset = out.add(key[order].astype("<u8"))
    out.add(document[order].astype("<u4"))
    out.add(place[order].astype("<u4"))
    return AnchorRun(offset, len(key))


def anchor_runs(directory: Path, units: int) -> list[list[AnchorRun]]:
    """Return the runs of all units; for `find_repeats`, and the number of anchors."""
    return [
        [AnchorRun(*run) for run in facts(directory / f"{number:06d}")["runs"]]
        for number in range(units)
    ]


def find_repeats(
    anchors: Path,
    directory: Path,
    units: list[list[AnchorRun]],
    number: int,
    low: int,
    high: int,
    tick: Tick,
) -> None:
    """Find the anchors with hashes in [low, high) that occurred before; the range of this number.
    The ranges are those of `selection.range_edges`."""
    path = directory / f"{number:04d}"
    if done := finished(path):
        tick(done["anchors"], 0)
        return
    keys, rows = [np.empty(0, "<u8")], [np.empty((3, 0), "<u4")]  # unit, document, place
    for number_of_unit, runs in enumerate(units):
        with UnitFile(anchors / f"{number_of_unit:06d}") as file:
            for run in runs:
                start = file.search(run.offset, run.anchors, low)
                stop = file.search(run.offset, run.anchors, high)
                if start < stop:
                    keys.append(file.column(run.offset, stop - start, "<u8", start))
                    unit = np.full(stop - start, number_of_unit, "<u4")
                    columns = (run.column(file, place, start, stop) for place in (0, 1))
                    rows.append(np.stack([unit, *columns]))
    key, row = np.concatenate(keys), np.concatenate(rows, axis=1)
    order = np.argsort(key, kind="stable")  # rows are in source order
    opens = np.ones(len(key), bool)
    opens[1:] = key[order[1:]] != key[order[:-1]]
    first = order[np.flatnonzero(opens)[np.cumsum(opens) - 1]]
    repeated = np.flatnonzero(first != order)
    repeated = repeated[np.argsort(order[repeated])]  # back in source order
    later, earlier = row[:, order[repeated]], row[:, first[repeated]]
    starts = np.searchsorted(later[0], np.arange(len(units) + 1)).astype("<u8")
    with UnitWriter(path) as out:
        table = np.ascontiguousarray(np.concatenate([later[1:], earlier]).T, "<u4")
        offsets = [out.add(starts), out.add(table)]
        out.finish({"anchors": len(key), "repeats": len(repeated), "offsets": offsets})
    tick(len(key), 0)


def _repeats_of(ranges: Sequence[Path], number: int) -> np.ndarray:
    """Return the repeats of a unit: rows of document, place, and the unit, document and place of
    the first occurrence; by document and place."""
    parts = [np.empty((0, 5), "<u4")]
    for path in ranges:
        with UnitFile(path) as file:
            starts, rows = file.facts["offsets"]
            start, stop = map(int, file.column(starts, 2, "<u8", number))
            parts.append(file.column(rows, 5 * (stop - start), "<u4", 5 * start).reshape(-1, 5))
    rows = np.concatenate(parts)
    return rows[np.lexsort((rows[:, 1], rows[:, 0]))]


def cut_unit(
    texts: Iterable[str | None],
    number: int,
    ranges: Sequence[Path],
    fetch: Fetch,
    settings: Substrings,
) -> Iterator[list[tuple[int, int]]]:
    """Yield for each document of the unit of this number the passages to cut: first and last byte
    + 1 of the text in UTF-8, ascending, apart. A passage ends before the next word that stays.

    ranges: files of `find_repeats`, in any order; fetch: returns a text of any unit as
    `anchor_unit` got it, before anything was cut. Raises ValueError if a text is another than then.
    """
    repeats = _repeats_of(ranges, number)
    earlier = _Earlier(fetch)
    for document, text in enumerate(texts):
        start, stop = np.searchsorted(repeats[:, 0], [document, document + 1])
        if text is None or start == stop:
            yield []
            continue
        raw = text.encode()
        here = words_of(raw)
        rows = repeats[start:stop, 1:].astype(np.int64)
        if rows[-1, 0] + settings.words > len(here.hash):
            raise ValueError(f"document {document} of unit {number} is another than before")
        spans: list[tuple[int, int]] = []
        for place, *where, other in rows.tolist():
            if spans and place + settings.words <= spans[-1][1]:
                continue  # cut already
            there_raw, there = earlier.words(*where)
            span = _common(raw, here, place, there_raw, there, other, settings.words)
            if span is not None:
                _append(spans, span)
        yield [_bytes_of(here, len(raw), span) for span in spans]


def _append(spans: list[tuple[int, int]], span: tuple[int, int]) -> None:
    """Append a span of words, joined with those before it that it meets."""
    start, end = span
    while spans and start <= spans[-1][1]:
        before = spans.pop()
        start, end = min(start, before[0]), max(end, before[1])
    spans.append((start, end))


def _bytes_of(words: Words, size: int, span: tuple[int, int]) -> tuple[int, int]:
    start, end = span
    stop = words.start[end] if end < len(words.start) else size
    return int(words.start[start]), int(stop)


def _common(
    raw: bytes, here: Words, place: int, there_raw: bytes, there: Words, other: int, length: int
) -> tuple[int, int] | None:
    """Return the words [start, end) around `place` that are equal to those around `other` in the
    earlier text; None if the `length` words from there on are not: two hashes were equal by
    chance."""
    after = _equal(here.hash[place:], there.hash[other:])
    before = _equal(here.hash[:place][::-1], there.hash[:other][::-1])
    if after < length:
        return None
    start, end = place - before, place + after
    # Word hashes may be equal by chance too: the text decides.
    one = raw[here.start[start] : here.end[end - 1]]
    two = there_raw[there.start[other - before] : there.end[other + after - 1]]
    return (start, end) if b"".join(one.split()) == b"".join(two.split()) else None


def _equal(one: np.ndarray, other: np.ndarray) -> int:
    """Return how many entries are equal before the first that differs."""
    count, at, step = min(len(one), len(other)), 0, 64
    while at < count:
        stop = min(count, at + step)
        differ = one[at:stop] != other[at:stop]
        if differ.any():
            return at + int(differ.argmax())
        at, step = stop, 2 * step
    return count


class _Earlier:
    """Texts of earlier documents with their words, the last used ones held."""

    def __init__(self, fetch: Fetch):
        self._fetch, self._size = fetch, 0
        self._texts: OrderedDict[tuple[int, int], tuple[bytes, Words]] = OrderedDict()

    def words(self, unit: int, document: int) -> tuple[bytes, Words]:
        key = unit, document
        if key in self._texts:
            self._texts.move_to_end(key)
            return self._texts[key]
        raw = self._fetch(unit, document).encode()
        self._texts[key] = raw, (words := words_of(raw))
        self._size += len(words.hash)
        while self._size > _HELD and len(self._texts) > 1:
            _, (_, old) = self._texts.popitem(last=False)
            self._size -= len(old.hash)
        return raw, words


def without(text: str, passages: Sequence[tuple[int, int]]) -> str:
    """Return the text without the passages that `cut_unit` gives."""
    raw, at, parts = text.encode(), 0, []
    for start, stop in passages:
        parts.append(raw[at:start])
        at = stop
    return b"".join([*parts, raw[at:]]).decode()
