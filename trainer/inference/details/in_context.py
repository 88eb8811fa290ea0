"""How much the context helps: the in-context-learning score.

Olsson et al. 2022 (arXiv 2209.11895): the loss of the 500th token of a context minus that of the
50th, a mean over texts. It is negative for a model that uses its context. In windows of fewer than
500 tokens, the last token takes the place of the 500th, and one a tenth as far that of the 50th;
such scores compare only where both places are equal.
"""

import math
from dataclasses import dataclass

import numpy as np

from forescale.inference.details.tokens import WindowLosses

LATE, RATIO = 500, 10


@dataclass(frozen=True)
class InContext:
    """score: the mean difference, in nats, of the losses of tokens before which the model sees
    `late` and `early` others, of the same document if it keeps documents apart; stderr: its
    standard error, pairs taken as independent; late_loss, early_loss: the means. NaN without a
    pair."""

    late: int
    early: int
    score: float
    stderr: float
    late_loss: float
    early_loss: float
    pairs: int


class InContextSums:
    """Collects the pairs of losses. length: the most tokens that the model sees."""

    def __init__(self, length: int):
        self._late = min(LATE, length)
        self._early = max(1, self._late // RATIO)
        self._pairs: list[np.ndarray] = []

    def add(self, found: WindowLosses) -> None:
        """Take the pairs of a window."""
        late = np.flatnonzero(found.seen == self._late)
        # Seen tokens follow each other, so the early one is as many columns before.
        early = late - (self._late - self._early)
        self._pairs.append(np.stack([found.nats[late], found.nats[early]]))

    def score(self) -> InContext:
        """Return the score over all pairs."""
        late, early = np.concatenate([np.empty((2, 0)), *self._pairs], 1)
        n, change = len(late), late - early
        stderr = float(change.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
        means = [float(x.mean()) if n else math.nan for x in (change, late, early)]
        return InContext(self._late, self._early, means[0], stderr, means[1], means[2], n)
