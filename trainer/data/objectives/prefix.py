"""Prefix language modelling: a row is [source | target], and the model continues the source.

Invariant: the columns of source and target and the number of targets depend on the window's length
alone; nothing is random.
"""

import numpy as np

from forescale.data.objective import IGNORED


class Prefix:
    """T5's prefix language modelling (Raffel et al. 2020, arXiv 1910.10683, section 3.3.1), at a
    fixed cut.

    A window of L + 1 tokens gives L inputs, all but its last. The first round(share * L) of them
    are the source, which an encoder reads in both directions. The decoder reads the others and
    predicts the token after each. So the row is that of next-token prediction, without the targets
    of the source; the decoder begins with a token of the text, where T5 begins with a padding id
    and predicts that token too.

    source of round(share * inputs) tokens, at the end of columns [0, split)
    target of the other inputs, at the start of columns [split, L)

    T5 cuts each text at a random place. Here all windows of a length are cut at the same place,
    because the number of targets must follow from the length; its place in a document is random
    nevertheless, since windows don't begin with documents. A limit of this choice: the encoder
    learns sources of one length only.
    """

    def __init__(self, sequence_length: int, share: float = 0.5):
        """Raise ValueError if sequence_length is below 2, too short for a source and a target."""
        if sequence_length < 2:
            raise ValueError(f"{sequence_length} columns are too few for a source and a target")
        self.columns, self.share = sequence_length, share
        self.split = int(self._source(np.array(sequence_length)))

    def _source(self, inputs: np.ndarray) -> np.ndarray:
        """Return the source's share, at least one for each side; a single input is the source."""
        inputs = np.asarray(inputs, np.int64)
        share = np.rint(self.share * inputs).astype(np.int64)
        return np.minimum(np.maximum(share, 1), np.maximum(inputs - 1, 0))

    def num_targets(self, sizes: np.ndarray) -> np.ndarray:
        inputs = np.asarray(sizes, np.int64) - 1
        return np.where(inputs < 2, 0, inputs - self._source(inputs))

    def examples(self, tokens: np.ndarray, sizes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        split = self.split
        pair = np.empty((2, len(tokens), self.columns), np.int64)
        pair[0], pair[1] = tokens[:, :-1], tokens[:, 1:]
        pair[1, :, :split] = IGNORED
        sources, counts = self._source(sizes - 1), self.num_targets(sizes)
        for i in np.flatnonzero(sizes <= self.columns).tolist():  # they end early
            text, source, count = tokens[i], int(sources[i]), int(counts[i])
            pair[0, i], pair[1, i] = 0, IGNORED
            if count:
                pair[0, i, split - source : split + count] = text[: source + count]
                pair[1, i, split : split + count] = text[source + 1 : source + 1 + count]
        return pair

    def padding_mask(self, sizes: np.ndarray) -> np.ndarray | None:
        """Return (n, L), False before source and beyond target; None if no window ends early."""
        if (sizes > self.columns).all():
            return None
        counts = self.num_targets(sizes)[:, None]
        source = np.where(counts, self._source(sizes - 1)[:, None], 0)
        columns = np.arange(self.columns)
        return (columns >= self.split - source) & (columns < self.split + counts)
