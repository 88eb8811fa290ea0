"""The verdict of a trial, from the gains of its pairs: better, no better, or not yet known.

    better       the gain is above 0: its e-value has passed the threshold of the attempt
    no better    the gain is below the smallest one worth having: that e-value has passed 1 / alpha

The threshold of attempt k of a campaign is k (k + 1) / (alpha (d + 1)), where d attempts before it
were better. If no change is better, the chance that any is called so is at most alpha, whatever the
attempts share: a sum over attempts. That at most a share of alpha of the better ones is luck is
proven where attempts share no runs (e-LOND, Xu and Ramdas 2024, arXiv 2311.06412); ours share those
of the base, of which the manual has a simulation.

Invariant: a pure function of the gains in the order of their seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from forescale.trials.evidence import interval, log_evidence

Word = Literal["better", "no better", "not yet known"]
LEVEL = 0.9  # of intervals


def threshold(alpha: float, number: int, better: int) -> float:
    """Return the e-value that attempt `number` (1, 2, ...) needs, after `better` discoveries."""
    return number * (number + 1) / (alpha * (better + 1))


@dataclass(frozen=True)
class Verdict:
    """word; gains: of log loss, those that it took; evidence, against: log e-values of a gain above
    0, and of one below the smallest worth having, the largest so far."""

    word: Word
    gains: tuple[float, ...]
    evidence: float
    against: float

    @property
    def pairs(self) -> int:
        return len(self.gains)

    @property
    def gain(self) -> float:
        """The mean gain; 0 before the first pair."""
        return float(np.mean(self.gains)) if self.gains else 0.0

    @cached_property
    def ends(self) -> tuple[float, float]:
        """The ends of the gain's confidence sequence, at LEVEL."""
        return interval(self.gains, LEVEL)

    def __str__(self) -> str:
        low, high = self.ends
        pairs = f"after {self.pairs} pairs"
        if not math.isfinite(low) or not math.isfinite(high):
            return f"Gain {self.gain:+.2%} of the loss {pairs}."
        span = f"{LEVEL:.0%} at any time: {low:+.2%} to {high:+.2%}"
        return f"Gain {self.gain:+.2%} of the loss ({span}) {pairs}."


def spread(gains: Sequence[Sequence[float]]) -> float | None:
    """Return the standard deviation of a gain about the mean of its trial, from those of several
    trials; None with fewer than two degrees of freedom, or where none differs."""
    trials = [np.asarray(x, dtype=np.float64) for x in gains if len(x)]
    freedom = sum(len(x) - 1 for x in trials)
    squares = sum(float(((x - x.mean()) ** 2).sum()) for x in trials)
    return math.sqrt(squares / freedom) or None if freedom >= 2 else None


def verdict(gains: Sequence[float], smallest: float, needed: float, alpha: float) -> Verdict:
    """Return the verdict after these gains. smallest: of log loss, worth having; needed: the
    e-value of better. The first of the two that was shown decides."""
    x = np.asarray(gains, dtype=np.float64)
    if not len(x):
        return Verdict("not yet known", (), 0.0, 0.0)
    evidence, against = log_evidence(x), log_evidence(-x, -smallest)
    is_better, is_not = evidence >= math.log(needed), against >= -math.log(alpha)
    word: Word = "not yet known"
    pairs = len(x)
    if (is_better | is_not).any():
        pairs = int((is_better | is_not).argmax()) + 1
        word = "better" if is_better[pairs - 1] else "no better"
    tops = float(evidence[:pairs].max()), float(against[:pairs].max())
    return Verdict(word, tuple(gains[:pairs]), *tops)
