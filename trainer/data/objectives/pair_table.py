"""Which documents of a split are pairs: a table with a bin for each, of two runs of tokens, its
source, and its separator with its target.

The file is that of packing tables (data/packing_table.py), made by one scan of the split, so that
the targets of a step are known before anything is read. A document is left out, and counted, if it
has no separator, nothing before or after it, more tokens than its columns, or a part in another
shard; the first separator counts.

Invariant: a table depends only on the dataset's identity, the split, the separator and the columns;
each document is in it once, or counted once as left out.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer

from forescale.console import Progress, silent
from forescale.data.dataset import Split
from forescale.data.packing import Packing
from forescale.data.packing_table import Bins, write_tables
from forescale.errors import UserError, shortened

_VERSION = 3  # increase it also if other documents become pairs, or facts change
_SHOWN = 60  # characters of a separator in a message
_BLOCK = 1 << 22  # tokens that are scanned at a time
_ESCAPES = {r"\t": "\t", r"\n": "\n"}


class PairKind(NamedTuple):
    """What makes a pair. separator: the id of the token; source: the most tokens before it; target:
    the most tokens after it."""

    separator: int
    source: int
    target: int

    def path(self, split: Split, identity: str, cache: Path) -> Path:
        """Return where the table of a split is kept."""
        numbers = "-".join(map(str, self))
        return Path(cache) / "pairs" / f"{identity[:32]}-{split.name}-{numbers}.v{_VERSION}"

    def open(
        self, split: Split, identity: str, cache: Path, progress: Progress = silent
    ) -> "PairBins":
        """Return the pairs of a split; find them first if their table isn't in the cache, which
        reads all its tokens. Errors as of packing_table.open_bins."""
        path = self.path(split, identity, cache)
        made = {"version": _VERSION, "identity": identity, "split": split.name, **self._asdict()}
        if not path.exists():
            scan = _Scan(split, self, progress)
            write_tables(path, made, scan.tables(), lambda: scan.facts)
        return PairBins(path, made, self)


def separator_id(tokenizer: Tokenizer, separator: str, end_of_text: int) -> int:
    """Return the id of a separator: of an id, itself, and of a text, that of its one token; \\t and
    \\n stand for a tab and the end of a line.

    Raises UserError if the tokenizer has no such token, or documents end with it.
    """
    where, shown = "objective.pairs_separator", shown_separator(separator)
    if separator.isdecimal():
        found = int(separator) if len(separator) < 10 else -1  # beyond every vocabulary
        if found < 0 or tokenizer.id_to_token(found) is None:
            problem = f"{shown} is no id of the tokenizer, which has {tokenizer.get_vocab_size():,}"
            raise UserError(where, problem, "give the id of a token, or its text")
    else:
        ids = _ids_of(tokenizer, separator)
        if len(ids) != 1:
            problem = f"{shown} is {len(ids)} tokens in this dataset's tokenizer"
            todo = "give a text that is one token, such as \\t, or the id of a token"
            raise UserError(where, problem, todo)
        found = ids[0]
    if found == end_of_text:
        problem = f"{shown} is the token that ends each document"
        raise UserError(where, problem, "give another one, which stands inside the documents")
    return found


def shown_separator(separator: str) -> str:
    """Return a separator as a message shows it, in quotes: a tab, however it is named, as \\t."""
    return shortened(repr(_unescaped(separator)), _SHOWN)


def _unescaped(separator: str) -> str:
    """Return the text that a separator's name stands for."""
    for escape, character in _ESCAPES.items():
        separator = separator.replace(escape, character)
    return separator


def _ids_of(tokenizer: Tokenizer, separator: str) -> list[int]:
    """Return the tokens of a text, as it would stand in a document; of the name of a special token,
    which no text has but a corpus of token ids may, that token."""
    text = _unescaped(separator)
    for index, added in tokenizer.get_added_tokens_decoder().items():
        if added.content == text:
            return [index]
    if any("\ud800" <= character <= "\udfff" for character in text):
        return []  # not UTF-8
    tokenizer.encode_special_tokens = True  # as in documents
    return tokenizer.encode(text, add_special_tokens=False).ids


class PairTable(Packing):
    """The pairs of a shard. Pair b has two runs, source and separator with target, of tokens
    [starts[2b], starts[2b] + lengths[2b]) and those that follow them."""

    @property
    def targets(self) -> np.ndarray:
        """Targets of each pair: int64 of shape (pairs,), from 1 on."""
        return self.lengths[1::2].astype(np.int64) - 1


class PairBins(Bins):
    """The pairs of a split, as bins. facts: documents, and how many of them are left out and why
    (LEFT_OUT); row_tokens, the tokens of the pairs alone; longest_source and longest_target, of
    the pairs and those that are too long."""

    unit = "pair"
    edges = 1

    def __init__(self, path: Path, made: dict[str, Any], kind: PairKind):
        self.kind = kind
        super().__init__(path, made, kind.source + kind.target)

    def pieces(self, shard: int, number: int, targets: int | None = None) -> list[tuple[int, int]]:
        """Return (first token in the shard, tokens) of source and separator with target."""
        found = zip(*(a.tolist() for a in self.table(shard).pieces(number)), strict=True)
        return list(found)

    def left_out(self) -> str | None:
        facts = self.facts
        reasons = [f"{facts[name]:,} {words}" for name, words in LEFT_OUT.items() if facts[name]]
        if not reasons:
            return None
        kept, documents = int(self.counts.sum()), facts["documents"]
        found = f"{documents - kept:,} of {documents:,} documents are left out, because they are "
        found += f"no pairs: {', '.join(reasons)}"
        if facts["too_long"]:
            found += f" (the longest source has {facts['longest_source']:,} tokens, the longest "
            found += f"target {facts['longest_target']:,})"
        return found

    def _packing(self, *arrays: np.ndarray) -> Packing:
        return PairTable(self.sequence_length, *arrays)


LEFT_OUT = {
    "without_separator": "without the separator",
    "without_source": "with nothing before it",
    "without_target": "with nothing after it",
    "too_long": "longer than their columns",
    "divided": "divided between shards",
}


class _Scan:
    """One pass over the tokens of a split; facts are whole after the last table."""

    def __init__(self, split: Split, kind: PairKind, progress: Progress):
        self._split, self._kind, self._progress = split, kind, progress
        names = ("documents", "row_tokens", "longest_source", "longest_target", *LEFT_OUT)
        self.facts = dict.fromkeys(names, 0)

    def tables(self) -> Iterator[PairTable]:
        """Yield the table of each shard."""
        done, goes_on = 0, False
        sizes = self._split.shard_tokens
        for shard, tokens in enumerate(sizes):
            if not tokens:
                yield self._table(np.empty((3, 0), np.int64), np.empty(0, np.bool_))
                continue
            # Sorted and unique even for a foreign corpus.
            ends = np.unique(self._split.document_ends(shard, 0, tokens))
            ends = ends[ends > 0]
            is_cut = not len(ends) or int(ends[-1]) < tokens
            ends = np.append(ends, tokens) if is_cut else ends
            divided = np.zeros(len(ends), np.bool_)
            divided[0] = goes_on
            divided[-1] |= is_cut
            goes_on = is_cut
            cuts = self._first_separators(shard, ends)
            yield self._table(np.stack([np.append(0, ends[:-1]), cuts, ends]), divided)
            done += tokens
            self._progress("find pairs", done, sum(sizes), "tokens")

    def _first_separators(self, shard: int, ends: np.ndarray) -> np.ndarray:
        """Return the place of each document's first separator, -1 if it has none."""
        found = np.full(len(ends), -1)
        for first in range(0, int(ends[-1]), _BLOCK):
            block = self._split.read(shard, first, min(_BLOCK, int(ends[-1]) - first))
            places = first + np.flatnonzero(block == self._kind.separator)
            document, at = np.unique(np.searchsorted(ends, places, "right"), return_index=True)
            new = found[document] < 0
            found[document[new]] = places[at[new]]
        return found

    def _table(self, places: np.ndarray, divided: np.ndarray) -> PairTable:
        """Return the table of a shard's documents: places has their starts, cuts and ends."""
        starts, cuts, ends = places
        source, target = cuts - starts, ends - cuts - 1
        held = self._kept(
            divided=divided,
            without_separator=cuts < 0,
            without_source=source == 0,
            without_target=target == 0,
        )
        for name, lengths in (("longest_source", source), ("longest_target", target)):
            self.facts[name] = max(self.facts[name], int(lengths[held].max(initial=0)))
        fits = (source <= self._kind.source) & (target <= self._kind.target)
        self.facts["documents"] += len(starts)
        self.facts["too_long"] += int((held & ~fits).sum())
        held &= fits
        offsets = 2 * np.arange(held.sum() + 1)
        runs = np.stack([starts, cuts], 1)[held].ravel()
        lengths = np.stack([source, target + 1], 1)[held].ravel().astype(np.int32)
        self.facts["row_tokens"] += int(lengths.sum(dtype=np.int64))
        return PairTable(self._kind.source + self._kind.target, offsets, runs, lengths)

    def _kept(self, **reasons: np.ndarray) -> np.ndarray:
        """Return which documents none of the reasons holds for; count each under its first one."""
        kept = np.ones(len(next(iter(reasons.values()))), np.bool_)
        for name, holds in reasons.items():
            self.facts[name] += int((kept & holds).sum())
            kept &= ~holds
        return kept
