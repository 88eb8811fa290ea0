"""Conversations: the model learns to write the responses, and reads all that stands before them.

Invariant: a row is one conversation from its first token on, so that attention needs no mask of
documents and a recurrence no reset; nothing is drawn.
"""

import numpy as np

from forescale.data.objective import NextToken


class Responses(NextToken):
    """Predict each next token of a response, and the one that ends it; all others are only read.

    A window is a conversation (ConversationKind of data/bins.py), padded on the right. The
    length of a window in the data order, which num_targets takes, is that of its targets + 1.
    `examples` returns all next tokens; who reads the table leaves out those that don't count
    (ConversationKind.mark_ignored).
    """

    def num_targets(self, sizes: np.ndarray) -> np.ndarray:
        return np.asarray(sizes, np.int64) - 1
