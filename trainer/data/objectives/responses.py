"""Conversations: the model learns to write the responses, given all earlier text; and preferences:
it learns to prefer the chosen of two responses, compared with a fixed reference model (DPO,
Rafailov et al. 2023, arXiv 2305.18290).

Invariant: a row is one conversation from its first token on, so that attention needs no mask of
documents and a recurrence no reset, or several that a mask keeps apart; a preference becomes two
rows, the chosen conversation and then the rejected one; nothing is random.
"""

import numpy as np

from forescale.data.objective import IGNORED, NextToken


class Responses(NextToken):
    """Predict each next token of a response, and the token that ends it; other tokens are context.

    A window is a conversation, or several, padded on the right (bin_kinds.py). Its length
    in the data order, which num_targets takes, is the number of its targets + 1. `examples` returns
    all next tokens; ConversationKind.mark_ignored marks those that are no targets.
    """

    def num_targets(self, sizes: np.ndarray) -> np.ndarray:
        return np.asarray(sizes, np.int64) - 1


class Preferences:
    """Two rows a window, each [prompt | response], padded on the right. Targets are the tokens of
    the response and the token that ends it.

    A window has the tokens of both conversations, one after the other (PreferenceKind of
    bin_kinds.py): at most 2 * (columns + 1). In the data order it has one target: a step's loss is
    the mean over its preferences. models/heads/preferences.py computes it from the rows.
    """

    rows = 2

    def __init__(self, sequence_length: int, beta: float):
        """beta: factor of the log-probability ratio to the reference."""
        self.columns, self.beta = sequence_length, beta
        self.window_length = 2 * sequence_length + 1

    def num_targets(self, sizes: np.ndarray) -> np.ndarray:
        return np.ones_like(np.asarray(sizes, np.int64))

    def examples(
        self, tokens: np.ndarray, sizes: np.ndarray, numbers: np.ndarray, cuts: np.ndarray
    ) -> np.ndarray:
        """As an objective does (data/objective.py), but (2, 2n, columns). cuts: (n, 4), where the
        chosen prompt and response and the rejected ones end in a window; 0 for a row of padding."""
        pair = np.zeros((2, 2 * len(tokens), self.columns), np.int64)
        pair[1] = IGNORED
        for i, (prompt, chosen, other, rejected) in enumerate(cuts.tolist()):
            for row, (first, cut, end) in enumerate(
                ((0, prompt, chosen), (chosen, other, rejected))
            ):
                if end > first:
                    size = end - first
                    pair[0, 2 * i + row, : size - 1] = tokens[i, first : end - 1]
                    pair[1, 2 * i + row, cut - first - 1 : size - 1] = tokens[i, cut:end]
        return pair
