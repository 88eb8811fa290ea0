"""Tables of bins: the runs of tokens of each row that is more than one stretch of the text.

    PackedKind          whole documents side by side in a window (forescale.data.packing)
    PairKind            a document that is a source, a separator and a target
    ConversationKind    a document with responses to learn
    PreferenceKind      a document of two conversations, the chosen and the rejected one

One scan of a split makes the tables, so that the targets of a step are known before anything is
read. They stay in the cache, one file a split, read shard by shard:

    each shard's table    offsets <i8, starts <i8, lengths <i4 (forescale.data.packing.Packing)
    head                  JSON: the request; bins, pieces, targets and XXH3 of each table; facts
    end                   sha256 of the head, 32 bytes; length of the head, <u8

Invariant: a table depends only on the dataset's identity, the split and the kind. Each document is
in it once or, unless documents are packed, is counted once as left out. A table is used only after
it was compared with its checksum in the head, and the head with the end. A file that is only partly
written never has its final name.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import xxhash

from forescale.data.dataset import Split
from forescale.data.packing import Packing, pack
from forescale.ground.console import Progress, silent
from forescale.ground.errors import UserError
from forescale.ground.storage import HashingFile, fsync_path, make_folder
from forescale.remote.store import LocalFile

_DTYPES = tuple(map(np.dtype, ("<i8", "<i8", "<i4")))  # offsets, starts, lengths
_SHA256, _LENGTH = 32, 8  # bytes at the end
_OPEN = 64  # tables kept in memory, about 32 KiB per million tokens
_BLOCK = 1 << 22  # tokens that are searched for separators at a time
_NO_END = "damaged: it doesn't end like a table of bins"
_AGAIN = "delete the file; it is computed again"
Facts = dict[str, int]


class _Row(NamedTuple):
    """The head's entry for one shard."""

    bins: int
    pieces: int
    targets: int
    xxh3: str

    @property
    def size(self) -> int:
        """Bytes of the table: offsets, starts, lengths."""
        return 8 * (self.bins + 1) + (8 + 4) * self.pieces


class Documents(NamedTuple):
    """The documents of one shard: first tokens and exclusive ends, int64 of shape (documents,);
    divided: bool, whether a part of the document is in another shard."""

    starts: np.ndarray
    ends: np.ndarray
    divided: np.ndarray


@dataclass(frozen=True)
class BinKind:
    """What makes a bin. The fields of a kind decide its tables, and are part of their names."""

    folder: ClassVar[str]
    version: ClassVar[int]  # increase it also if other documents become bins, or facts change
    unit: ClassVar[str] = "window"  # name of a bin
    is_whole: ClassVar[bool] = True  # a bin is never shortened
    # How many of the first ends of a bin's pieces the objective gets, as `cuts`; 0: it gets none,
    # and positions without a target are marked instead (mark_ignored).
    edges: ClassVar[int] = 0
    # Names and words of the facts that count what is left out, and that hold the greatest lengths.
    reasons: ClassVar[dict[str, str]] = {}
    longest: ClassVar[dict[str, str]] = {}

    @property
    def window_length(self) -> int:
        """The most tokens of a bin, less one."""
        raise NotImplementedError

    def targets(self, table: Packing) -> np.ndarray:
        """Return the number of targets of each bin of a table: int64 of shape (bins,)."""
        raise NotImplementedError

    def find(self, split: Split, shard: int, documents: Documents, facts: Facts) -> Packing:
        """Return the table of a shard; add to the facts."""
        raise NotImplementedError

    def mark_ignored(self, row: np.ndarray, ends: np.ndarray) -> None:
        """Set to True what is no target of a row, bool (L + 1,). ends: of its pieces."""
        raise NotImplementedError

    def path(self, split: Split, identity: str, cache: Path) -> Path:
        numbers = "-".join(map(str, astuple(self)))
        name = f"{identity[:32]}-{split.name}-{numbers}.v{self.version}"
        return Path(cache) / self.folder / name

    def open(self, split: Split, identity: str, cache: Path, progress: Progress = silent) -> "Bins":
        """Return the bins of a split; scan it first if its table isn't in the cache.

        identity: the dataset's. A scan needs the memory of one shard's documents. Several processes
        may scan at the same time: all write the same bytes. Raises UserError for a damaged table or
        a dataset without such rows, and the errors of reading a shard.
        """
        path = self.path(split, identity, cache)
        fields = {"version": self.version, "identity": identity, "split": split.name}
        request = {**fields, **asdict(self)}
        if path.exists():
            return Bins(path, request, self)
        make_folder(path.parent)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        names = ("documents", "row_tokens", *self.longest, *self.reasons) if self.is_whole else ()
        facts, rows, done = dict.fromkeys(names, 0), list[_Row](), 0
        phase = f"find {self.unit}s" if self.is_whole else "pack documents"
        try:
            with HashingFile(temporary) as f:
                for shard, documents in enumerate(_documents(split)):
                    table = self.find(split, shard, documents, facts)
                    arrays = zip((table.offsets, table.starts, table.lengths), _DTYPES, strict=True)
                    raw = b"".join(a.astype(dtype, copy=False).tobytes() for a, dtype in arrays)
                    f.write(raw)
                    targets, digest = int(self.targets(table).sum()), xxhash.xxh3_64_hexdigest(raw)
                    rows.append(_Row(table.num_bins, len(table.starts), targets, digest))
                    done += split.shard_tokens[shard]
                    progress(phase, done, sum(split.shard_tokens), "tokens")
                head = {**request, "shards": rows, **({"facts": facts} if facts else {})}
                text = json.dumps(head).encode()
                f.write(text + hashlib.sha256(text).digest())
                f.write(len(text).to_bytes(_LENGTH, "little"))
                f.finish()
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        fsync_path(path.parent)
        return Bins(path, request, self)


def _documents(split: Split) -> Iterator[Documents]:
    """Yield the documents of each shard; what a shard has of a divided one counts as one."""
    continues = False
    for shard, tokens in enumerate(split.shard_tokens):
        stored = split.document_ends(shard, 0, tokens) if tokens else np.empty(0, np.int64)
        # Sorted and unique even for a foreign corpus.
        ends = np.unique(np.append(stored, tokens))
        ends = ends[ends > 0]
        divided = np.zeros(len(ends), np.bool_)
        if tokens:
            divided[0] = continues
            continues = not (stored == tokens).any()
            divided[-1] |= continues
        yield Documents(np.append(0, ends)[: len(ends)], ends, divided)


@dataclass(frozen=True)
class PackedKind(BinKind):
    """Documents side by side in windows of L + 1 tokens. A document that continues in another shard
    is packed in parts."""

    sequence_length: int

    folder, version, is_whole = "packing", 2, False

    @property
    def window_length(self) -> int:
        return self.sequence_length

    def targets(self, table: Packing) -> np.ndarray:
        return table.targets

    def find(self, split: Split, shard: int, documents: Documents, facts: Facts) -> Packing:
        return pack(documents.ends - documents.starts, self.sequence_length)

    def mark_ignored(self, row: np.ndarray, ends: np.ndarray) -> None:
        """Mark the first token of each piece but the first: another document precedes it."""
        row[ends[:-1]] = True


@dataclass(frozen=True)
class PairKind(BinKind):
    """A pair has two pieces: its source, and its separator with its target. separator: the id of
    the token, of which a document's first counts; source, target: the most tokens before and after
    it."""

    separator: int
    source: int
    target: int

    folder, version, unit, edges = "pairs", 3, "pair", 1
    reasons: ClassVar[dict[str, str]] = {
        "without_separator": "without the separator",
        "without_source": "with nothing before it",
        "without_target": "with nothing after it",
        "too_long": "longer than their columns",
        "divided": "divided between shards",
    }
    longest: ClassVar[dict[str, str]] = {
        "longest_source": "the longest source has",
        "longest_target": "the longest target",
    }

    @property
    def window_length(self) -> int:
        return self.source + self.target

    def targets(self, table: Packing) -> np.ndarray:
        """Return the tokens after each separator, from 1 on."""
        return table.lengths[1::2].astype(np.int64) - 1

    def find(self, split: Split, shard: int, documents: Documents, facts: Facts) -> Packing:
        """Count each document that is left out under the first reason that holds."""
        starts, ends, divided = documents
        cuts, tokens = np.full(len(ends), -1), split.shard_tokens[shard]  # -1: no separator
        for first in range(0, tokens, _BLOCK):
            block = split.read(shard, first, min(_BLOCK, tokens - first))
            places = first + np.flatnonzero(block == self.separator)
            document, at = np.unique(np.searchsorted(ends, places, "right"), return_index=True)
            new = cuts[document] < 0
            cuts[document[new]] = places[at[new]]
        source, target = cuts - starts, ends - cuts - 1
        fits = (source <= self.source) & (target <= self.target)
        reasons = {
            "divided": divided,
            "without_separator": cuts < 0,
            "without_source": source == 0,
            "without_target": target == 0,
            "too_long": ~fits,
        }
        facts["documents"] += len(starts)
        stays = np.ones(len(starts), np.bool_)
        for name, holds in reasons.items():
            if name == "too_long":
                for key, lengths in (("longest_source", source), ("longest_target", target)):
                    facts[key] = max(facts[key], int(lengths[stays].max(initial=0)))
            facts[name] += int((stays & holds).sum())
            stays &= ~holds
        runs = np.stack([starts, cuts], 1)[stays].ravel()
        lengths = np.stack([source, target + 1], 1)[stays].ravel().astype(np.int32)
        facts["row_tokens"] += int(lengths.sum(dtype=np.int64))
        return Packing(2 * np.arange(stays.sum() + 1), runs, lengths)


@dataclass(frozen=True)
class ConversationKind(BinKind):
    """A conversation has an even number of pieces that follow each other: read, learned, read, ...
    What follows the last learned token is no part of it. sequence_length: its most tokens, less
    one."""

    sequence_length: int

    folder, version, unit = "conversations", 1, "conversation"
    reasons: ClassVar[dict[str, str]] = {
        "without_response": "without a response",
        "too_long": "longer than a window",
        "divided": "divided between shards",
    }
    longest: ClassVar[dict[str, str]] = {"longest": "the longest has"}

    @property
    def window_length(self) -> int:
        return self.sequence_length

    def targets(self, table: Packing) -> np.ndarray:
        """Return the learned tokens of each conversation, from 1 on."""
        learned = table.lengths.astype(np.int64)
        learned[::2] = 0
        return np.add.reduceat(learned, table.offsets[:-1]) if table.num_bins else learned

    def find(self, split: Split, shard: int, documents: Documents, facts: Facts) -> Packing:
        """Raise UserError if the dataset has no column of learned tokens."""
        has_tokens = bool(split.shard_tokens[shard])
        learned = split.learned(shard) if has_tokens else np.empty(0, np.bool_)
        if learned is None:
            problem = "doesn't say which of its tokens are responses"
            todo = "make such a dataset with forescale finetune FROM data=FILE.jsonl"
            raise UserError(split.shard_name(shard), problem, todo)
        edges = []  # first token of each conversation, and the ends of its pieces
        for first, end, divided in zip(*(a.tolist() for a in documents), strict=True):
            is_learned = learned[first:end].copy()
            is_learned[:1] = False  # nothing stands before it
            ends = np.flatnonzero(is_learned[1:] != is_learned[:-1]) + 1
            if len(ends) % 2:  # the last piece is learned, to the document's end
                ends = np.append(ends, len(is_learned))
            sizes = self._sizes(ends)
            facts["documents"] += 1
            facts["longest"] = max(facts["longest"], *sizes, 0)
            if divided or not sizes or max(sizes) > self.sequence_length + 1:
                facts["divided" if divided else "too_long" if sizes else "without_response"] += 1
            else:
                facts["row_tokens"] += sum(sizes)
                edges.append(first + np.append(0, ends))
        offsets = np.cumsum([0, *(len(e) - 1 for e in edges)])
        starts = np.concatenate([np.empty(0, np.int64), *(e[:-1] for e in edges)])
        lengths = np.concatenate([np.empty(0, np.int64), *map(np.diff, edges)])
        return Packing(offsets, starts, lengths.astype(np.int32))

    def mark_ignored(self, row: np.ndarray, ends: np.ndarray) -> None:
        """Mark the pieces that are only read."""
        first = 0
        for read, learned in zip(ends[::2].tolist(), ends[1::2].tolist(), strict=True):
            row[first:read] = True
            first = learned

    def _sizes(self, edges: np.ndarray) -> list[int]:
        """Return the tokens of each row that a document becomes; none if it becomes none."""
        return [int(edges[-1])] if len(edges) else []


@dataclass(frozen=True)
class PreferenceKind(ConversationKind):
    """A preference has four pieces: the prompt and the chosen response, the prompt again and the
    rejected one. sequence_length: the most tokens of a side, less one."""

    folder, unit, edges = "preferences", "preference", 4

    @property
    def window_length(self) -> int:
        return 2 * self.sequence_length + 1

    def targets(self, table: Packing) -> np.ndarray:
        """Return 1 for each preference: its loss is one number."""
        return np.ones(table.num_bins, np.int64)

    def _sizes(self, edges: np.ndarray) -> list[int]:
        return [int(edges[1]), int(edges[3] - edges[1])] if len(edges) == 4 else []


class Bins:
    """Bins of a split. Bin b of shard s is a list of token runs of the shard, one training
    sequence.

    counts: bins of each shard; targets: number of target tokens of each shard; int64 of shape
    (shards,). facts: of whole rows: documents, and how many of them are left out by each of
    `reasons`; row_tokens, the tokens of the bins; the greatest lengths. Raises UserError if the
    file is damaged or holds something else. Reading is safe from several threads.
    """

    def __init__(self, path: Path, request: dict[str, Any], kind: BinKind):
        self.path, self.kind, self.sequence_length = path, kind, kind.window_length
        self.unit, self.are_whole, self.edges = kind.unit, kind.is_whole, kind.edges
        self.mark_ignored = kind.mark_ignored
        self._file = LocalFile(path)
        end, size = _SHA256 + _LENGTH, self._file.size
        raw = self._read(max(size - end, 0), min(end, size))
        length = int.from_bytes(raw[_SHA256:], "little")
        text = self._read(size - end - length, length) if length <= size - end else bytearray()
        if hashlib.sha256(text).digest() != raw[:_SHA256]:
            raise UserError(str(path), _NO_END, _AGAIN)
        head = json.loads(text)
        self._rows, self.facts = [_Row(*row) for row in head.pop("shards")], head.pop("facts", {})
        if head != request:
            raise UserError(str(path), "its contents don't match its name", _AGAIN)
        if sum(row.size for row in self._rows) + length + end != size:
            raise UserError(str(path), _NO_END, _AGAIN)
        self._offsets = np.cumsum([0, *(row.size for row in self._rows)]).tolist()
        self.counts = np.array([row.bins for row in self._rows], np.int64)
        self.targets = np.array([row.targets for row in self._rows], np.int64)
        self.table = lru_cache(_OPEN)(self._table)

    def left_out(self) -> str | None:
        """Return how many documents are in no bin, and why, in words; None if all are in one."""
        facts, kind = self.facts, self.kind
        reasons = [f"{facts[key]:,} {words}" for key, words in kind.reasons.items() if facts[key]]
        if not reasons:
            return None
        count, total = facts["documents"] - int(self.counts.sum()), facts["documents"]
        sentence = f"{count:,} of {total:,} documents are left out, because they are no "
        sentence += f"{kind.unit}s: {', '.join(reasons)}"
        if facts["too_long"]:
            first, *others = (f"{words} {facts[key]:,}" for key, words in kind.longest.items())
            sentence += f" ({', '.join([f'{first} tokens', *others])})"
        return sentence

    def short(self, shards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of these shards' bins, numbered consecutively over the shards, have fewer
        than L targets, ascending, and how many are missing; int64 each, of one shape."""
        targets = [self.kind.targets(self.table(shard)) for shard in shards.tolist()]
        lacking = self.sequence_length - np.concatenate(targets)
        which = np.flatnonzero(lacking)
        return which, lacking[which]

    def cut(self, shard: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return, for bins given by shard and number, the number (in place of a window's first
        token) and the bin's targets + 1 (in place of its length); int64, same shape."""
        length = np.empty_like(number)
        for one in np.unique(shard).tolist():
            here = shard == one
            length[here] = self.kind.targets(self.table(one))[number[here]] + 1
        return number, length

    def pieces(self, shard: int, number: int, targets: int | None = None) -> list[tuple[int, int]]:
        """Return (first token in the shard, tokens) of a bin's pieces in order; of packed documents
        at least two tokens each.

        targets: take packed pieces only up to this number of targets, which the bin must have.
        """
        pieces = list(zip(*(a.tolist() for a in self.table(shard).pieces(number)), strict=True))
        if targets is None or self.are_whole:
            return pieces
        taken: list[tuple[int, int]] = []
        for start, length in pieces:
            if not targets:
                break
            length = min(length, targets + 1)
            taken.append((start, length))
            targets -= length - 1
        assert not targets
        return taken

    def _table(self, shard: int) -> Packing:
        row, at = self._rows[shard], self._offsets[shard]
        raw = self._read(at, row.size)
        if xxhash.xxh3_64_hexdigest(raw) != row.xxh3:
            raise UserError(str(self.path), f"damaged: the table of shard {shard}", _AGAIN)
        starts = 8 * (row.bins + 1)
        places = ((row.bins + 1, 0), (row.pieces, starts), (row.pieces, starts + 8 * row.pieces))
        arrays = (np.frombuffer(raw, d, *place) for d, place in zip(_DTYPES, places, strict=True))
        return Packing(*arrays)

    def _read(self, offset: int, size: int) -> bytearray:
        data = bytearray(size)
        self._file.read_at(offset, memoryview(data))
        return data


def num_windows(split: Split, sequence_length: int, bins: Bins | None = None) -> int:
    """Return the number of windows of held-out text: bins, or consecutive windows."""
    if bins is not None:
        return int(bins.counts.sum())
    return sum(-(-max(0, tokens - 1) // sequence_length) for tokens in split.shard_tokens)
