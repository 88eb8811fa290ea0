"""Sampling: from logits to one token of each row.

The rules are those of transformers' logits processors, in the same order: repetition penalty,
temperature, top-k, nucleus sampling (top-p), min-p. Invariant: a token depends on the logits of its
row and on one random number of its own, so a row is sampled in a batch as alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampler:
    """The parameters of sampling.

    temperature divides the logits; 0 takes the most likely token. top_k keeps the k most likely
    tokens, and those as likely as the last of them; None: all. top_p, nucleus sampling, keeps the
    fewest most likely tokens whose probabilities add up to it (Holtzman et al. 2019, arXiv
    1904.09751). min_p keeps tokens with at least this fraction of the largest probability (Nguyen
    et al. 2024, arXiv 2407.01082). repetition_penalty divides the positive logits of tokens that
    are in the row already, and multiplies negative ones (Keskar et al. 2019, arXiv 1909.05858); 1:
    no penalty. Raises ValueError for a value that leaves no token or has no meaning.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature {self.temperature} is negative; give 0 or more.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k {self.top_k} leaves no token; give at least 1.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is no share; give more than 0, at most 1.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p {self.min_p} is no share; give 0 to 1.")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty {self.repetition_penalty}: give more than 0.")

    @property
    def draws(self) -> bool:
        """True if tokens are drawn at random."""
        return self.temperature > 0

    @property
    def reads_row(self) -> bool:
        """True if the choice depends on the tokens of the row."""
        return self.repetition_penalty != 1

    def penalised(self, logits_BV: Tensor, held_BV: Tensor | None) -> Tensor:
        """Return the logits after the penalty. held: True for the tokens of a row."""
        if held_BV is None or not self.reads_row:
            return logits_BV
        by = self.repetition_penalty
        less_BV = torch.where(logits_BV < 0, logits_BV * by, logits_BV / by)
        return torch.where(held_BV, less_BV, logits_BV)

    def candidates(self, logits_BV: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return scores (B, C), -inf for excluded tokens, and their tokens (B, C); None: all tokens
        in order. Probabilities are the softmax of scores. The temperature is above 0."""
        # The largest is 0: however low the temperature, no score overflows.
        scores = (logits_BV - logits_BV.amax(-1, keepdim=True)) / self.temperature
        ids = None
        if self.top_k is not None and self.top_k < scores.shape[1]:
            scores, ids = _best(scores, self.top_k)
        elif self.top_p < 1:
            scores, ids = scores.sort(descending=True)
        if self.top_p < 1:
            # The probability of a token and all less likely ones, added up from the least.
            tail = scores.flip(-1).softmax(-1).cumsum(-1).flip(-1)
            dropped = tail <= 1 - self.top_p
            dropped[:, 0] = False
            scores = scores.masked_fill(dropped, -torch.inf)
        if self.min_p > 0:
            share = scores.softmax(-1)
            least = self.min_p * share.amax(-1, keepdim=True)
            scores = scores.masked_fill(share < least, -torch.inf)
        return scores, ids

    def choose(
        self, logits_BV: Tensor, drawn_B1: Tensor | None, held_BV: Tensor | None = None
    ) -> Tensor:
        """Return one token of each row, (B, 1) int64.

        drawn: a random number in [0, 1) for each row, fp64; None at temperature 0. held: see
        `penalised`.
        """
        logits_BV = self.penalised(logits_BV, held_BV)
        if not self.draws or drawn_B1 is None:
            return logits_BV.argmax(-1, keepdim=True)
        scores, ids = self.candidates(logits_BV)
        # In fp32 a sum over a large vocabulary would lose the least likely tokens.
        sums = scores.softmax(-1).double().cumsum(-1)
        chosen = torch.searchsorted(sums, drawn_B1 * sums[:, -1:], right=True)
        chosen = chosen.clamp(max=sums.shape[1] - 1)
        return chosen if ids is None else ids.gather(1, chosen)


def _best(scores_BV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest scores and their tokens, and those equal to the last of them."""
    best, ids = scores_BV.topk(k + 1)
    last = best[:, k - 1 : k]
    if not ((best[:, k:] == last) & (last > -torch.inf)).any():
        return best[:, :k], ids[:, :k]
    most = int((scores_BV >= last).masked_fill(last == -torch.inf, False).sum(-1).max())
    best, ids = scores_BV.topk(max(k, most))
    return best.masked_fill(best < last, -torch.inf), ids
