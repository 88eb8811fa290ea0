"""Which documents of a split are preferences: a table with a bin for each, of four runs of tokens,
a prompt and the chosen response, the prompt again and the rejected one.

Made as the tables of conversations are (data/objectives/conversation_table.py), of datasets whose
documents have two conversations each, one after the other. Left out, and counted, is what is no
such pair, has a conversation of more tokens than a row, or a part in another shard.

Invariant: a table depends only on the dataset's identity, the split and the length of a row; each
document is in it once, or counted once as left out.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from forescale.console import Progress, silent
from forescale.data.dataset import Split
from forescale.data.objectives.conversation_table import ConversationBins, Scan
from forescale.data.packing import Packing
from forescale.data.packing_table import write_tables

_VERSION = 1  # increase it also if other documents become preferences, or facts change


class PreferenceTable(Packing):
    """The preferences of a shard, of four runs each, which follow each other."""

    @property
    def targets(self) -> np.ndarray:
        """Targets of each preference, one: int64 of shape (preferences,)."""
        return np.ones(self.num_bins, np.int64)


class PreferenceBins(ConversationBins):
    """The preferences of a split, as bins; facts as of conversations, longest of one side."""

    unit = "preference"
    edges = 4

    def _packing(self, *arrays: np.ndarray) -> Packing:
        return PreferenceTable(self.sequence_length, *arrays)


class PreferenceKind(NamedTuple):
    """What makes a preference. sequence_length: one less than the most tokens of a side."""

    sequence_length: int

    def path(self, split: Split, identity: str, cache: Path) -> Path:
        """Return where the table of a split is kept."""
        name = f"{identity[:32]}-{split.name}-{self.sequence_length}.v{_VERSION}"
        return Path(cache) / "preferences" / name

    def open(
        self, split: Split, identity: str, cache: Path, progress: Progress = silent
    ) -> PreferenceBins:
        """Return the preferences of a split; find them first if their table isn't in the cache.
        Errors as of conversations."""
        path, window = self.path(split, identity, cache), 2 * self.sequence_length + 1
        made = {"version": _VERSION, "identity": identity, "split": split.name, **self._asdict()}
        if not path.exists():
            scan = _Scan(split, self.sequence_length + 1, progress)
            write_tables(path, made, scan.tables(), lambda: scan.facts)
        return PreferenceBins(path, made, window)


class _Scan(Scan):
    unit = "preferences"

    def _table(self, *arrays: np.ndarray) -> Packing:
        return PreferenceTable(2 * self._most - 1, *arrays)

    def _sizes(self, edges: np.ndarray) -> list[int]:
        return [int(edges[1]), int(edges[3] - edges[1])] if len(edges) == 4 else []
