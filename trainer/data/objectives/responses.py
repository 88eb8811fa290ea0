"""Conversations: the model learns to write the responses, given all earlier text.

Invariant: a row is one conversation from its first token on, so that attention needs no mask of
documents and a recurrence no reset; nothing is drawn.
"""

import numpy as np

from forescale.data.objective import NextToken


class Responses(NextToken):
    """Predict each next token of a response, and the token that ends it; other tokens are context.

    A window is a conversation (ConversationKind of data/bins.py), padded on the right. Its length
    in the data order, which num_targets takes, is the number of its targets + 1. `examples` returns
    all next tokens; ConversationKind.mark_ignored marks those that are no targets.
    """

    def num_targets(self, sizes: np.ndarray) -> np.ndarray:
        return np.asarray(sizes, np.int64) - 1
