"""Near-duplicates over all units: which document goes, and the one for which it goes.

    sign_unit     texts of a unit -> signatures/000012: keys of the bands, length and score of each
    find_edges    a range of the keys over all units -> edges/0003: (document, first of its bucket)
    resolve       all edges -> duplicates: by unit, the documents that go, and for which
    dropped_of    what `duplicates` says of a unit

Documents with an equal band hash are neighbours. Of each connected component one document stays:
the first in source order (unit, then document), the longest in characters, or that of the highest
score; of equal ones the first. Documents of earlier datasets always stay. A chain of neighbours is
one component, so its ends may be less alike than the neighbours.

Invariant: the result depends on the texts, the settings and the groups alone: not on the number of
processes, restarts, the order of tasks, or where ranges are cut.

Memory: `sign_unit` and `find_edges` about 100 MB each, and in the latter 40 bytes for each document
of a bucket that is larger than a range; `resolve` 80 bytes for each document that has a
neighbour. Disk: 16 bytes a document and 12 for each of its bands, 184 with 14 bands.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from forescale.data.curate.minhash import MinHash, band_hashes
from forescale.data.prepare.columns import UnitFile, UnitWriter, facts, finished
from forescale.data.prepare.pool import Tick
from forescale.data.prepare.selection import document_hash
from forescale.ground.errors import UserError

_RUN = 1 << 20  # keys sorted together
_BATCH = 1 << 10  # texts of which the hashes are made together
_RANGE = 1 << 20  # approximate keys per range
RULES = ("first", "longest", "score")


@dataclass(frozen=True)
class Duplicates:
    """Settings: the signatures, and which document of a component stays."""

    minhash: MinHash = field(default_factory=MinHash)
    stays: str = "first"  # which one stays: first in the input, longest, or score: the highest
    across_sources: bool = True  # false: only documents of one input are compared

    def check(self) -> None:
        self.minhash.check()
        if self.stays not in RULES:
            raise UserError("stays", f"{self.stays!r} is no rule", f"choose {', '.join(RULES)}")

    def keys(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the hashes of batches of texts: documents with an equal one are neighbours."""
        return band_hashes(texts, self.minhash)


@dataclass(frozen=True)
class Equal:
    """Only equal texts are neighbours, by 64 bits of their hash, and of these only the documents go
    that an earlier dataset has."""

    stays = "first"
    across_sources = True

    def keys(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        hashes = (document_hash(text.encode())[:1] for text in texts)
        while batch := [*islice(hashes, _BATCH)]:
            yield np.array(batch, "<u8")


Settings = Duplicates | Equal


class KeyRun(NamedTuple):
    """A run of a file in signatures/: offset in bytes, and keys, ascending, equal ones in source
    order. Behind the keys are their documents (uint32)."""

    offset: int
    keys: int

    def documents(self, file: UnitFile, start: int, stop: int) -> np.ndarray:
        return file.column(self.offset + 8 * self.keys, stop - start, "<u4", start)


def sign_unit(
    texts: Iterable[str],
    out: UnitWriter,
    settings: Settings,
    scores: Iterable[float] | None = None,
) -> dict[str, Any]:
    """Add the signatures of a unit's texts to `out`, and return the facts to finish it with:
    documents, runs, and the offsets of lengths and scores.

    scores: of each text, where the rule is score; NaN counts as the lowest.
    """
    lengths: list[int] = []

    def counted() -> Iterator[str]:
        for text in texts:
            lengths.append(len(text))
            yield text

    runs: list[KeyRun] = []
    first = 0
    waiting: list[np.ndarray] = []
    for batch in settings.keys(counted()):
        waiting.append(batch)
        if sum(map(len, waiting)) >= max(1, _RUN // batch.shape[1]):
            first = _add_run(waiting, first, out, runs)
    if waiting:
        first = _add_run(waiting, first, out, runs)
    score = np.fromiter(islice(scores, first), "<f8") if scores is not None else np.zeros(first)
    if len(score) != first:
        raise ValueError(f"{len(score)} scores for {first} texts")
    offsets = [out.add(np.array(lengths, "<u8")), out.add(score.astype("<f8"))]
    return {"documents": first, "runs": runs, "offsets": offsets}


def _add_run(waiting: list[np.ndarray], first: int, out: UnitWriter, runs: list[KeyRun]) -> int:
    """Write a run of the waiting hashes, which are then forgotten; return the next document."""
    keys = np.concatenate(waiting)
    waiting.clear()
    count, bands = keys.shape
    keys = keys.reshape(-1)
    order = np.argsort(keys, kind="stable")
    offset = out.add(keys[order].astype("<u8"))
    out.add((order // bands + first).astype("<u4"))
    runs.append(KeyRun(offset, len(keys)))
    return first + count


class Signatures(NamedTuple):
    """What tasks know of all units: runs of each, first document of each counted over all (and the
    end), and the group of each; only documents of one group are compared. earlier: the number of
    units, the first ones, that are of earlier datasets."""

    directory: Path
    runs: list[list[KeyRun]]
    starts: list[int]
    groups: list[int]
    earlier: int = 0

    @property
    def keys(self) -> int:
        return sum(run.keys for unit in self.runs for run in unit)


def signatures(
    directory: Path, sources: Sequence[int], settings: Settings, earlier: int = 0
) -> Signatures:
    """Return the signatures of all units. sources: the source of each unit."""
    runs, starts = [], [0]
    for number in range(len(sources)):
        unit = facts(directory / f"{number:06d}")
        runs.append([KeyRun(*run) for run in unit["runs"]])
        starts.append(starts[-1] + unit["documents"])
    groups = [0] * len(sources) if settings.across_sources else list(sources)
    return Signatures(directory, runs, starts, groups, earlier)


def find_edges(
    signed: Signatures, directory: Path, number: int, low: int, high: int, tick: Tick
) -> None:
    """Find the edges of the buckets with keys in [low, high), the range of this number."""
    path = directory / f"{number:04d}"
    if done := finished(path):
        tick(done["keys"], 0)
        return
    key, document, group = _slices(signed, low, high)
    # Stable: documents are in source order within each key and group. Keys first, and the groups
    # only where there are several: the sort of two columns takes twice the memory.
    several = bool(len(group)) and bool((group != group[0]).any())
    order = np.lexsort((group, key)) if several else np.argsort(key, kind="stable")
    key, document, group = key[order], document[order], group[order]
    opens = np.ones(len(key), bool)
    opens[1:] = (key[1:] != key[:-1]) | (group[1:] != group[:-1])
    first = document[np.flatnonzero(opens)[np.cumsum(opens) - 1]]
    pairs = np.stack([document, first], axis=1)[document != first]
    pairs = np.unique(pairs, axis=0)  # the same two documents meet in several buckets
    with UnitWriter(path) as out:
        offset = out.add(np.ascontiguousarray(pairs, "<u8"))
        out.finish({"keys": len(key), "edges": len(pairs), "offset": offset})
    tick(len(key), 0)


def _slices(signed: Signatures, low: int, high: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the keys in [low, high) of all units, unit by unit, run by run, with the document,
    counted over all units, and the group of each."""
    keys, documents, groups = [np.empty(0, "<u8")], [np.empty(0, "<u8")], [np.empty(0, "<u4")]
    for number, runs in enumerate(signed.runs):
        with UnitFile(signed.directory / f"{number:06d}") as file:
            for run in runs:
                start = file.search(run.offset, run.keys, low)
                stop = file.search(run.offset, run.keys, high)
                if start < stop:
                    keys.append(file.column(run.offset, stop - start, "<u8", start))
                    place = run.documents(file, start, stop).astype("<u8")
                    documents.append(place + np.uint64(signed.starts[number]))
                    groups.append(np.full(stop - start, signed.groups[number], "<u4"))
    return np.concatenate(keys), np.concatenate(documents), np.concatenate(groups)


def resolve(
    signed: Signatures, edges: Sequence[Path], path: Path, settings: Settings, tick: Tick
) -> None:
    """Decide which documents go, and write them to the unit file `path`. edges: of all ranges."""
    if finished(path):
        tick(len(edges), 0)
        return
    nodes = _nodes(edges)
    root = _components(edges, nodes, tick)
    rank = _ranks(signed, nodes, settings.stays)
    # Within a component the one that stays comes first: the highest rank, then source order.
    order = np.lexsort((-rank, root))
    opens = np.ones(len(order), bool)
    opens[1:] = root[order[1:]] != root[order[:-1]]
    stays = np.empty(len(nodes), "<u8")
    stays[order] = nodes[order[np.flatnonzero(opens)][np.cumsum(opens) - 1]]
    starts = np.array(signed.starts, "<u8")
    goes = (stays != nodes) & (nodes >= (new := starts[signed.earlier]))
    if isinstance(settings, Equal):  # equal new ones go as without a curation
        goes &= stays < new
    gone, reason = nodes[goes], stays[goes]
    unit = np.searchsorted(starts, reason, "right") - 1
    of_unit = np.searchsorted(gone, starts)
    # Of units without documents the last of equal starts is the one that holds a document.
    of_gone = np.searchsorted(starts, gone, "right") - 1
    columns = (
        of_unit.astype("<u8"),
        (gone - starts[of_gone]).astype("<u4"),
        unit.astype("<u4"),
        (reason - starts[unit]).astype("<u4"),
    )
    with UnitWriter(path) as out:
        offsets = [out.add(column) for column in columns]
        components = int(opens.sum())
        out.finish({"documents": len(gone), "components": components, "offsets": offsets})


def dropped_of(path: Path, number: int) -> np.ndarray:
    """Return what `resolve` wrote of a unit: rows of (document, unit and document for which it
    goes), ascending by document."""
    with UnitFile(path) as file:
        starts, *offsets = file.facts["offsets"]
        start, stop = map(int, file.column(starts, 2, "<u8", number))
        columns = [file.column(offset, stop - start, "<u4", start) for offset in offsets]
        return np.stack(columns, axis=1).astype(np.int64)


def _pairs(path: Path) -> np.ndarray:
    with UnitFile(path) as file:
        count = file.facts["edges"]
        return file.column(file.facts["offset"], 2 * count, "<u8").reshape(count, 2)


def _nodes(edges: Sequence[Path]) -> np.ndarray:
    """Return the documents that have a neighbour, ascending."""
    nodes, waiting, size = np.empty(0, "<u8"), [], 0
    for path in edges:
        waiting.append(np.unique(_pairs(path)))
        size += len(waiting[-1])
        if size > max(_RANGE, len(nodes)):  # seldom, so that the time is linear
            nodes, waiting, size = np.unique(np.concatenate([nodes, *waiting])), [], 0
    return np.unique(np.concatenate([nodes, *waiting]))


def _components(edges: Sequence[Path], nodes: np.ndarray, tick: Tick) -> np.ndarray:
    """Return for each node the index of the first node of its component."""
    root, waiting, size = np.arange(len(nodes)), [], 0
    for number, path in enumerate(edges):
        pairs = _pairs(path)
        waiting.append(pairs)
        size += len(pairs)
        if size > max(_RANGE, len(nodes)) or number == len(edges) - 1:
            a, b = np.searchsorted(nodes, np.concatenate(waiting)).T
            _join(root, a, b)
            waiting, size = [], 0
        tick(1, 0)
    return root


def _join(root: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """Join the components of a[i] and b[i], in place: the root is the lowest index of each. Before
    and after, every entry points to its root directly."""
    while True:
        one, other = root[a], root[b]
        differ = one != other
        if not differ.any():
            return
        a, b, one, other = a[differ], b[differ], one[differ], other[differ]
        np.minimum.at(root, np.maximum(one, other), np.minimum(one, other))
        while True:
            above = root[root]
            if np.array_equal(above, root):
                break
            root[:] = above


def _ranks(signed: Signatures, nodes: np.ndarray, rule: str) -> np.ndarray:
    """Return the rank of each node by the rule, higher is better."""
    rank = np.zeros(len(nodes))
    bounds = np.searchsorted(nodes, np.array(signed.starts, "<u8"))
    for number in range(len(signed.runs) if rule != "first" else 0):
        start, stop = bounds[number : number + 2]
        if start == stop:
            continue
        with UnitFile(signed.directory / f"{number:06d}") as file:
            lengths, scores = file.facts["offsets"]
            offset, dtype = (lengths, "<u8") if rule == "longest" else (scores, "<f8")
            column = file.column(offset, file.facts["documents"], dtype)
            place = nodes[start:stop] - np.uint64(signed.starts[number])
            rank[start:stop] = np.nan_to_num(column[place].astype(np.float64), nan=-np.inf)
    rank[: bounds[signed.earlier]] = np.inf  # what a dataset holds stays
    return rank
