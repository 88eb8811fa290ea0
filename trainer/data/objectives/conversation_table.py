"""Which documents of a split are conversations to learn from: a table with a bin for each, of runs
of tokens that are read and runs that are learned, in turn.

The file is that of packing tables (data/packing_table.py), made by one scan of the split's column
of learned tokens (data/conversations/), so that the targets of a step are known before anything is
read. A document is left out, and counted, if it has no learned token, more tokens than a window, or
a part in another shard. What follows the last learned token is no part of a bin.

Invariant: a table depends only on the dataset's identity, the split and the length of a window;
each document is in it once, or counted once as left out.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from forescale.console import Progress, silent
from forescale.data.dataset import Split
from forescale.data.packing import Packing
from forescale.data.packing_table import Bins, write_tables
from forescale.errors import UserError

_VERSION = 1  # increase it also if other documents become conversations, or facts change
LEFT_OUT = {
    "without_response": "without a response",
    "too_long": "longer than a window",
    "divided": "divided between shards",
}


class ConversationTable(Packing):
    """The conversations of a shard. A conversation has an even number of runs, each of tokens
    [starts[i], starts[i] + lengths[i]) that follow those of the run before: read, learned, ..."""

    @property
    def targets(self) -> np.ndarray:
        """Targets of each conversation: int64 of shape (conversations,), from 1 on."""
        learned = self.lengths.astype(np.int64)
        learned[::2] = 0
        return np.add.reduceat(learned, self.offsets[:-1]) if self.num_bins else learned


class ConversationBins(Bins):
    """The conversations of a split, as bins. facts: documents, and how many of them are left out
    and why (LEFT_OUT); row_tokens, the tokens of the conversations; longest, in tokens, too."""

    unit = "conversation"

    def pieces(self, shard: int, number: int, targets: int | None = None) -> list[tuple[int, int]]:
        """Return (first token in the shard, tokens) of the runs."""
        return list(zip(*(a.tolist() for a in self.table(shard).pieces(number)), strict=True))

    def mark_ignored(self, row: np.ndarray, ends: np.ndarray) -> None:
        first = 0
        for read, learned in zip(ends[::2].tolist(), ends[1::2].tolist(), strict=True):
            row[first:read] = True
            first = learned

    def left_out(self) -> str | None:
        facts, kept = self.facts, int(self.counts.sum())
        reasons = [f"{facts[name]:,} {words}" for name, words in LEFT_OUT.items() if facts[name]]
        if not reasons:
            return None
        found = f"{facts['documents'] - kept:,} of {facts['documents']:,} {self.unit}s are left "
        found += f"out: {', '.join(reasons)}"
        return found + (f" (the longest has {facts['longest']:,} tokens)" * bool(facts["too_long"]))

    def _packing(self, *arrays: np.ndarray) -> Packing:
        return ConversationTable(self.sequence_length, *arrays)


class ConversationKind(NamedTuple):
    """What makes a conversation. sequence_length: one less than the most
    tokens that it has."""

    sequence_length: int

    def path(self, split: Split, identity: str, cache: Path) -> Path:
        """Return where the table of a split is kept."""
        name = f"{identity[:32]}-{split.name}-{self.sequence_length}.v{_VERSION}"
        return Path(cache) / "conversations" / name

    def open(
        self, split: Split, identity: str, cache: Path, progress: Progress = silent
    ) -> ConversationBins:
        """Return the conversations of a split; find them first if their table isn't in the cache.
        Raises UserError if the dataset has no column of learned tokens; and as open_bins."""
        path = self.path(split, identity, cache)
        made = {"version": _VERSION, "identity": identity, "split": split.name, **self._asdict()}
        if not path.exists():
            scan = Scan(split, self.sequence_length + 1, progress)
            write_tables(path, made, scan.tables(), lambda: scan.facts)
        return ConversationBins(path, made, self.sequence_length)


class Scan:
    """One pass over a split; facts are whole after the last table. most: tokens of a row."""

    unit: ClassVar[str] = "conversations"

    def __init__(self, split: Split, most: int, progress: Progress):
        self._split, self._most, self._progress = split, most, progress
        self.facts = dict.fromkeys(("documents", "row_tokens", "longest", *LEFT_OUT), 0)

    def tables(self) -> Iterator[Packing]:
        """Yield the table of each shard."""
        done, total = 0, sum(self._split.shard_tokens)
        goes_on = False
        for shard, tokens in enumerate(self._split.shard_tokens):
            learned = self._split.learned(shard) if tokens else np.empty(0, np.bool_)
            if learned is None:
                problem = "doesn't say which of its tokens are responses"
                todo = "make such a dataset with forescale finetune FROM data=FILE.jsonl"
                raise UserError(self._split.shard_name(shard), problem, todo)
            ends = self._split.document_ends(shard, 0, tokens).tolist()
            runs: list[np.ndarray] = []
            for first, end in zip([0, *ends], ends, strict=False):
                runs += self._runs(first, learned[first:end], divided=goes_on)
                goes_on = False
            goes_on = bool(tokens) and (not ends or ends[-1] < tokens)
            self.facts["documents"] += goes_on
            self.facts["divided"] += goes_on
            offsets = np.cumsum([0, *(len(run) - 1 for run in runs)])
            starts = np.concatenate([np.empty(0, np.int64), *(run[:-1] for run in runs)])
            lengths = np.concatenate([np.empty(0, np.int64), *map(np.diff, runs)])
            yield self._table(offsets, starts, lengths.astype(np.int32))
            done += tokens
            self._progress(f"find {self.unit}", done, total, "tokens")

    def _runs(self, first: int, learned: np.ndarray, divided: bool) -> list[np.ndarray]:
        """Return the edges of a document's runs, its end included, counted in the shard; nothing if
        it is left out."""
        learned = learned.copy()
        learned[:1] = False  # nothing stands before it
        edges = np.flatnonzero(learned[1:] != learned[:-1]) + 1
        if len(edges) % 2:  # the last run is learned, to the document's end
            edges = np.append(edges, len(learned))
        sizes = self._sizes(edges)
        self.facts["documents"] += not divided
        self.facts["longest"] = max(self.facts["longest"], *sizes, 0)
        if divided:
            return []  # counted in the shard where it begins
        if not sizes or max(sizes) > self._most:
            self.facts["too_long" if sizes else "without_response"] += 1
            return []
        self.facts["row_tokens"] += sum(sizes)
        return [first + np.append(0, edges)]

    def _sizes(self, edges: np.ndarray) -> list[int]:
        """Return the tokens of each row that a document becomes; none if it becomes none."""
        return [int(edges[-1])] if len(edges) else []

    def _table(self, *arrays: np.ndarray) -> Packing:
        return ConversationTable(self._most - 1, *arrays)
