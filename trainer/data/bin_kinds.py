"""What becomes a bin, the tokens of one row: a kind finds the bins of a shard.

    PackedKind          whole documents side by side in a window (forescale.data.packing)
    PairKind            a document that is a source, a separator and a target
    ConversationKind    a document with responses to learn
    PackedConversationKind   several of them side by side
    PreferenceKind      a document of two conversations, the chosen and the rejected one

Invariant: each document is in a bin once or, unless documents are packed, is counted once as left
out.
"""

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from forescale.data.dataset import Split
from forescale.data.packing import Packing, pack
from forescale.ground.errors import UserError

_BLOCK = 1 << 22  # tokens that are searched for separators at a time
Facts = dict[str, int]


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

    def document_ends(self, ends: np.ndarray) -> np.ndarray:
        """Return where the documents of a row end. ends: of its pieces."""
        return ends

    def path(self, split: Split, identity: str, cache: Path) -> Path:
        numbers = "-".join(map(str, astuple(self)))
        name = f"{identity[:32]}-{split.name}-{numbers}.v{self.version}"
        return Path(cache) / self.folder / name


def documents_of(split: Split) -> Iterator[Documents]:
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
class PackedConversationKind(ConversationKind):
    """Whole conversations side by side, by best fit (packing.py). Two empty pieces mark the border
    between two conversations: two, so that context and response still alternate."""

    folder, unit = "packed-conversations", "row"

    def find(self, split: Split, shard: int, documents: Documents, facts: Facts) -> Packing:
        one_by_one = super().find(split, shard, documents, facts)
        if not one_by_one.num_bins:
            return one_by_one
        pieces = [one_by_one.pieces(number) for number in range(one_by_one.num_bins)]
        sizes = np.array([lengths.sum() for _, lengths in pieces])
        packed = pack(sizes, self.sequence_length)
        numbers = np.searchsorted(np.cumsum(sizes) - sizes, packed.starts)
        starts, lengths, offsets = list[np.ndarray](), list[np.ndarray](), [0]
        for number in range(packed.num_bins):
            of = numbers[packed.offsets[number] : packed.offsets[number + 1]].tolist()
            for i, conversation in enumerate(of):
                first, tokens = pieces[conversation]
                starts.append(np.append(first[:1].repeat(2 * (i > 0)), first))
                lengths.append(np.append(np.zeros(2 * (i > 0), np.int32), tokens))
            offsets.append(sum(map(len, starts[-len(of) :])) + offsets[-1])
        every = np.concatenate(lengths).astype(np.int32)
        return Packing(np.array(offsets, np.int64), np.concatenate(starts), every)

    def document_ends(self, ends: np.ndarray) -> np.ndarray:
        return np.append(np.unique(ends[1:][np.diff(ends) == 0]), ends[-1:])


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
