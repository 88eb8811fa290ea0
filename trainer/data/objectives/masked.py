"""Masked tokens: the objective of an encoder, which sees the tokens on both sides of its targets.

Invariant: the mask of a window is a pure function of the seed, the window's number and its length;
the number of its targets depends on the length alone.
"""

import numpy as np

from forescale.data.objective import IGNORED, Draws


class MaskedTokens:
    """BERT's masks (Devlin et al. 2019, arXiv 1810.04805, section 3.1).

    A window of L + 1 tokens gives L inputs, all but its last token. So every token but a shard's
    last is an input exactly once an epoch. round(rate * L) of them, at least one, are targets. In
    the inputs a share `hidden` of the targets is replaced by the mask token, a share `random` by a
    token drawn from the whole vocabulary, and the rest is unchanged. BERT masks no special token;
    here end-of-text tokens are masked like others.

    mask_token: its id, of a special token, which occurs in no text; None: the first id beyond the
    vocabulary, vocab_size, so that the model is built with vocab_size + 1. Each epoch masks the
    same text anew ("dynamic", Liu et al. 2019, arXiv 1907.11692, section 4.1).
    """

    def __init__(
        self,
        vocab_size: int,
        seed: int,
        sequence_length: int,
        rate: float = 0.15,
        hidden: float = 0.8,
        random: float = 0.1,
        mask_token: int | None = None,
    ):
        self.vocab_size, self.seed = vocab_size, seed
        self.mask_token = vocab_size if mask_token is None else mask_token
        self.extra_ids = int(mask_token is None)
        self.sequence_length = sequence_length
        self.rate, self.hidden, self.random = rate, hidden, random

    def num_targets(self, sizes: np.ndarray) -> np.ndarray:
        inputs = np.asarray(sizes, np.int64) - 1
        return np.minimum(np.maximum(np.rint(self.rate * inputs).astype(np.int64), 1), inputs)

    def examples(self, tokens: np.ndarray, sizes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        pair = np.full((2, len(tokens), tokens.shape[1] - 1), IGNORED, np.int64)
        pair[0] = tokens[:, :-1]
        counts = self.num_targets(sizes).tolist()
        rows = zip(pair[0], pair[1], sizes.tolist(), counts, numbers.tolist(), strict=True)
        for inputs, targets, size, count, number in rows:
            inputs[size - 1 :] = 0
            draws = Draws(self.seed, number)
            chosen, kinds = draws.chosen(size - 1, count), draws.shares(count)
            targets[chosen] = inputs[chosen]
            is_random = (kinds >= self.hidden) & (kinds < self.hidden + self.random)
            inputs[chosen[is_random]] = draws.below(self.vocab_size, count)[is_random]
            inputs[chosen[kinds < self.hidden]] = self.mask_token
        return pair

    def padding_mask(self, sizes: np.ndarray) -> np.ndarray | None:
        """Return (n, L), False beyond a window's end; None if no window ends early."""
        length = self.sequence_length
        return None if (sizes > length).all() else np.arange(length) < sizes[:, None] - 1
