"""The sequence that a run reads: sources, their mixture, skipped samples, damaged members.

    sample indices -> places (mixture, order) -> substitutes for damaged windows -> tokens

Invariant: the tokens of sample g depend only on the data, the configuration and the quarantine; not
on ranks, workers, or where a run was resumed. With the policy `substitute` a window that touches a
damaged member is replaced by an intact window of the same source and length, chosen by (seed, g);
so the number of targets of a step doesn't change. A whole bin, such as a pair, replaces another.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any, NamedTuple

import numpy as np
import xxhash

from forescale.data.bins import Bins
from forescale.data.dataset import Damaged, Split
from forescale.data.mixture import Interval, Mixture, Places, unskipped
from forescale.data.objective import NEXT_TOKEN, Objective
from forescale.data.order import mix64
from forescale.ground.errors import UserError

OnRead = Callable[[str, str], None]  # called with source and shard before a read
_NONE = np.empty(0, np.int64)
_SPAN = 1024  # samples
_TRIES = 1000  # candidates for one window before the source counts as lost


class LostMember(NamedTuple):
    """A damaged member: its source, the number of its shard there and its key in the shard."""

    source: str
    shard: int
    member: str


@dataclass(frozen=True)
class Rows:
    """Windows as arrays, a row each.

    numbers: (n,) int64, the global index g of each; tokens: (n, L + 1) ids, 0 beyond the end of a
    short one; sizes: (n,) int64, tokens of each; documents: (n, L + 1) int32, number of each
    token's document in its window, or None; ignored: (n, L + 1) bool, True for what is no target of
    a bin (BinKind.mark_ignored), or None; cuts: (n, Bins.edges) int64, the ends of the first pieces
    of each bin, or None; references: (n, 2) float32, see Feed, or None.
    """

    numbers: np.ndarray
    tokens: np.ndarray
    sizes: np.ndarray
    documents: np.ndarray | None
    ignored: np.ndarray | None
    cuts: np.ndarray | None
    references: np.ndarray | None

    def number_documents(self, i: int, ends: np.ndarray) -> None:
        """Number the documents of row i, which end before `ends`."""
        assert self.documents is not None
        places = np.arange(self.documents.shape[1])
        self.documents[i] = np.searchsorted(ends, places, side="right")

    def mark_pieces(self, i: int, bins: Bins, ends: np.ndarray) -> None:
        """Give the objective the ends of the pieces of row i, a bin, or mark what is no target."""
        if self.cuts is not None:
            self.cuts[i] = ends[: bins.edges]
        elif self.ignored is not None:
            bins.mark_ignored(self.ignored[i], ends)


def empty_rows(
    count: int,
    sequence_length: int,
    dtype: np.dtype,
    documents: bool,
    bins: Bins | None,
    references: object | None,
) -> Rows:
    """Return rows of one token 0, with the arrays that such windows need."""
    shape = (count, sequence_length + 1)
    has_ignored = bins is not None and not bins.edges
    return Rows(
        numbers=np.zeros(count, np.int64),
        tokens=np.zeros(shape, dtype),
        sizes=np.ones(count, np.int64),
        documents=np.zeros(shape, np.int32) if documents else None,
        ignored=np.zeros(shape, np.bool_) if has_ignored else None,
        cuts=np.zeros((count, bins.edges), np.int64) if bins is not None and bins.edges else None,
        references=None if references is None else np.zeros((count, 2), np.float32),
    )


@dataclass(frozen=True)
class Samples(Rows):
    """Windows of a step. hash: sum mod 2^64 of the windows' hashes; lost: members that proved
    damaged while they were read."""

    places: Places
    hash: int
    lost: frozenset[LostMember]


def window_hash(g: int, tokens: np.ndarray) -> int:
    """Return XXH3-64 of the window's tokens as stored in memory, without padding, seeded with g."""
    return xxhash.xxh3_64_intdigest(tokens.data, g)


def narrow_dtype(vocab_size: int) -> np.dtype:
    """Return the dtype for ids. Equal text has equal hashes, whatever the shards' dtype."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Feed:
    """Reads samples by their index.

    splits: the training split of each source, by the mixture's names; skipped: intervals of samples
    that are skipped; substitute: replace damaged windows instead of raising; documents: number the
    documents of each window; bins: of each source, if its windows are bins; objective: chooses the
    targets; references: of each source two numbers for each bin, float32 of shape (bins, 2).
    """

    def __init__(
        self,
        splits: dict[str, Split],
        mixture: Mixture,
        vocab_size: int,
        *,
        skipped: Sequence[Interval] = (),
        substitute: bool = False,
        documents: bool = False,
        bins: Mapping[str, Bins] | None = None,
        objective: Objective = NEXT_TOKEN,
        references: Mapping[str, np.ndarray] | None = None,
        seed: int = 0,
    ):
        self.names, self.splits = list(splits), list(splits.values())
        self.mixture, self.skipped = mixture, tuple(skipped)
        self.dtype = narrow_dtype(vocab_size)
        self.substitute, self.documents, self.seed = substitute, documents, seed
        self.objective = objective
        self.bins = [bins[name] for name in splits] if bins else None
        self.references = [references[name] for name in splits] if references else None
        self.unit = self.bins[0].unit if self.bins else "window"
        self.are_whole = bool(self.bins and self.bins[0].are_whole)
        self._span = lru_cache(4)(lambda n: mixture.places(n * _SPAN, (n + 1) * _SPAN))

    def step(self, g: int, count: int) -> list[Interval]:
        """Return `count` samples from g on, without skipped ones: those of a step."""
        return unskipped(self.skipped, g, count)

    def targets(self, intervals: Iterable[Interval]) -> np.ndarray:
        """Return the targets of each source in these samples: int64 of shape (sources,)."""
        if self.objective is not NEXT_TOKEN:
            places = self._places(intervals)
            counts = self.objective.num_targets(places.length)
            return np.bincount(places.source, counts, len(self.names)).astype(np.int64)
        return sum(
            (self.mixture.targets(*interval) for interval in intervals),
            start=np.zeros(len(self.names), np.int64),
        )

    def read(
        self,
        intervals: Sequence[Interval],
        quarantine: frozenset[LostMember] = frozenset(),
        on_read: OnRead = lambda source, shard: None,
    ) -> Samples:
        """Return the windows of these samples.

        quarantine: members known to be damaged; on_read: called with source and shard before each
        read. Raises UserError for damage, unless it may be substituted; in that case only if almost
        all of a source is damaged.
        """
        places = self._places(intervals)
        bins = self.bins[0] if self.bins else None
        length, count = self.mixture.sequence_length, len(places.shard)
        rows = empty_rows(count, length, self.dtype, self.documents, bins, self.references)
        rows.numbers[:] = np.concatenate([self.mixture.numbers(*i) for i in intervals])
        rows.sizes[:] = places.length
        numbers, known = rows.numbers.tolist(), set(quarantine)
        one_by_one = bool(known) or self.documents or bins is not None
        if one_by_one or not self._read_all(places, rows.tokens, on_read):
            for i, (g, *place) in enumerate(zip(numbers, *places.lists(), strict=True)):
                ends = self._read(g, place, known, rows.tokens[i], on_read)
                if rows.documents is not None:
                    rows.number_documents(i, bins.kind.document_ends(ends) if bins else ends)
                if bins is not None:
                    rows.sizes[i] = ends[-1]
                    rows.mark_pieces(i, bins, ends)
                if rows.references is not None and self.bins and self.references:
                    source, shard, number, _ = place
                    number += int(self.bins[source].counts[:shard].sum())
                    rows.references[i] = self.references[source][number]
        windows: Iterable[Any] = rows.tokens
        if (places.length <= length).any():
            windows = (r[:n] for r, n in zip(rows.tokens, rows.sizes.tolist(), strict=True))
        digest = sum(map(window_hash, numbers, windows)) % 2**64
        return Samples(**vars(rows), places=places, hash=digest, lost=frozenset(known - quarantine))

    def _places(self, intervals: Iterable[Interval]) -> Places:
        """Return where these samples lie, computed for _SPAN at once: a few cost nearly as much."""
        parts = []
        for g, end in intervals:
            while g < end:
                number, first = divmod(g, _SPAN)
                span = self._span(number)
                parts.append(Places(*(column[first : first + end - g] for column in span)))
                g += len(parts[-1].shard)
        return Places(*map(np.concatenate, zip(*parts, strict=True)))

    def will_read(self, intervals: Iterable[Interval]) -> None:
        """Prefetch the remote data of these samples, in order. It is only a hint, but needs the
        index: raises UserError if that can't be read."""
        far = [split.is_remote for split in self.splits]
        for interval in intervals if any(far) else ():
            places = self.mixture.places(*interval)
            for source, split in enumerate(self.splits):
                if far[source]:
                    mine = places.source == source
                    split.will_read(*self._runs(source, Places(*(c[mine] for c in places))))

    def _runs(self, source: int, places: Places) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return shard, first token and size of all token runs in these windows of a source."""
        if self.bins is None:
            return places.shard, places.start, places.length
        pieces = [self._pieces(*place) for place in zip(*places.lists(), strict=True)]
        shard = np.repeat(places.shard, list(map(len, pieces)))
        runs = np.array([run for held in pieces for run in held], np.int64).reshape(-1, 2)
        some = runs[:, 1] > 0  # of conversations side by side
        return shard[some], runs[some, 0], runs[some, 1]

    def _pieces(self, source: int, shard: int, start: int, size: int) -> list[tuple[int, int]]:
        """Return (first token, tokens) of all token runs that a window consists of."""
        return self.bins[source].pieces(shard, start, size - 1) if self.bins else [(start, size)]

    def _read_all(self, places: Places, tokens: np.ndarray, on_read: OnRead) -> bool:
        """Read full and short windows shard by shard. Return False if one has to be substituted:
        then the contents of `tokens` are undefined."""
        short = places.length < tokens.shape[1]
        any_short = bool(short.any())
        try:
            for source, shard, rows in _by_shard(places):
                split = self.splits[source]
                on_read(self.names[source], split.shard_name(shard))
                for i in rows[short[rows]].tolist() if any_short else ():
                    split.read_into(shard, int(places.start[i]), tokens[i, : places.length[i]])
                full = rows[~short[rows]] if any_short else rows
                split.shard(shard).read_rows(full, places.start[full], tokens)
        except Damaged:
            if not self.substitute:
                raise
            return False
        return True

    def _read(
        self, g: int, place: list[int], known: set[LostMember], out: np.ndarray, on_read: OnRead
    ) -> np.ndarray:
        """Read one window or its substitute into `out`. Return the ends of its pieces if it is
        packed, otherwise of its documents if requested. place: of the window; afterwards of what
        was read."""
        source, *window, size = place
        split, name = self.splits[source], self.names[source]

        def is_lost(shard: int, first: int, length: int) -> bool:
            hit = {lost.member for lost in known if lost.source == name and lost.shard == shard}
            if not hit or "" in hit:  # a lost shard can't be opened
                return bool(hit)
            return not hit.isdisjoint(split.members(shard, first, length))

        others = self._whole if self.are_whole else self._windows
        for shard, start in chain([window], others(g, source, size)):
            pieces = self._pieces(source, shard, start, size)
            if not any(is_lost(shard, *piece) for piece in pieces if piece[1]):
                on_read(name, split.shard_name(shard))
                try:
                    ends = np.cumsum([length for _, length in pieces])
                    for end, (first, length) in zip(ends.tolist(), pieces, strict=True):
                        if length:
                            split.read_into(shard, first, out[end - length : end])
                    if self.bins is not None:
                        place[1:3] = shard, start
                        return ends
                    return split.document_ends(shard, start, size) if self.documents else _NONE
                except Damaged as e:
                    if not self.substitute:
                        raise
                    known.add(LostMember(name, e.shard, e.member))
        problem = f"{_TRIES} substitutes in a row touch damaged members"
        if self.are_whole:
            problem = (
                f"a {self.unit} is damaged, and no intact one has as many targets, {size - 1:,}"
            )
        raise UserError(f"source {name}", problem, "restore the dataset from a copy")

    def _windows(self, g: int, source: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield shard and start of other windows with size - 1 targets, drawn by (seed, g)."""
        order = self.mixture.orders[source]
        for attempt in range(_TRIES - 1):
            drawn = self._drawn(g, attempt)
            while True:
                drawn = mix64(drawn + np.uint64(0x9E3779B97F4A7C15))
                shard, start, length = order.window(int(drawn[0]) % order.windows_per_epoch)
                if length >= size:
                    break
            yield shard, start

    def _whole(self, g: int, source: int, size: int) -> Iterator[tuple[int, int]]:
        """Yield shard and number of all bins of the source with exactly size - 1 targets: of some
        sizes there are few. The first one is drawn by (seed, g)."""
        order = self.mixture.orders[source]
        first = int(mix64(self._drawn(g, 0))[0]) % order.windows_per_epoch
        for low, high in ((first, order.windows_per_epoch), (0, first)):
            for at in range(low, high, _SPAN):
                windows = order.windows(at, min(at + _SPAN, high))
                for i in np.flatnonzero(windows.length == size).tolist():
                    yield int(windows.shard[i]), int(windows.start[i])

    def _drawn(self, g: int, attempt: int) -> np.ndarray:
        """Return the seed of a draw, uint64 of shape (1,)."""
        return np.array([(self.seed << 32) ^ (attempt << 48) ^ g], np.uint64)


def _by_shard(places: Places) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield source, shard and the rows of its windows, shard by shard."""
    rows = np.lexsort((places.shard, places.source))
    source, shard = places.source[rows], places.shard[rows]
    turns = np.flatnonzero((source[1:] != source[:-1]) | (shard[1:] != shard[:-1])) + 1
    for a, b in pairwise([0, *turns.tolist(), len(rows)]):
        yield int(source[a]), int(shard[a]), rows[a:b]
