"""Prompts with answers of your own: a row is [source | target], both of one document.

Invariant: the number of targets of a pair depends on its length alone, and where its tokens lie in
the row on its lengths; nothing is drawn.
"""

import numpy as np

from forescale.data.objective import IGNORED


class Pairs:
    """A document is source, separator, target, and the token that ends it; the model writes the
    target, to its end, after the source and the separator.

    An encoder reads the source, from both sides; the decoder reads the separator and the target,
    and predicts the token after each. (T5 begins with an id of padding instead of the separator.)
    Without an encoder a decoder reads source, separator and target as one row.

    source at the end of columns [0, split)
    separator and target, less its last token, at the start of columns [split, columns)

    A window is a pair (data/objectives/pair_table.py): sizes are those of its tokens, cuts, (n, 1),
    those of its source, 0 for a row of padding. The length of a window in the data order, which
    num_targets takes, is that of separator and target.
    """

    def __init__(self, sequence_length: int, separator: str, source: int | None = None):
        """separator: as the config names it; source: the columns of a source, half of them if left
        out. Raises ValueError if they leave no column for the target."""
        self.columns, self.separator = sequence_length, separator
        self.split = sequence_length // 2 if source is None else source
        if not 0 < self.split < sequence_length:
            raise ValueError(f"{sequence_length} columns are too few for a source and a target")

    def num_targets(self, sizes: np.ndarray) -> np.ndarray:
        return np.asarray(sizes, np.int64) - 1

    def examples(
        self, tokens: np.ndarray, sizes: np.ndarray, numbers: np.ndarray, cuts: np.ndarray
    ) -> np.ndarray:
        split, pair = self.split, np.zeros((2, len(tokens), self.columns), np.int64)
        pair[1] = IGNORED
        for i, (cut, size) in enumerate(zip(cuts[:, 0].tolist(), sizes.tolist(), strict=True)):
            if cut:  # else a row of padding
                end = split + size - 1 - cut
                pair[0, i, split - cut : end] = tokens[i, : size - 1]
                pair[1, i, split:end] = tokens[i, cut + 1 : size]
        return pair

    def padding_mask(self, sizes: np.ndarray, cuts: np.ndarray) -> np.ndarray:
        """Return (n, columns), False before the source and beyond the target."""
        columns = np.arange(self.columns)  # beside cuts, (n, 1)
        first, end = self.split - cuts, self.split + sizes[:, None] - 1 - cuts
        return (columns >= first) & (columns < end) & (cuts > 0)
