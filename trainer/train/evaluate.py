"""Losses on held-out text, and bits per byte.

Invariant: every target of the split is scored exactly once, and sums are added in the order of the
windows, so the result is the same at any world size. With the next token as objective, every token
but a shard's first is a target.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from forescale.data.bins import Bins
from forescale.data.dataset import Split
from forescale.data.objective import IGNORED, NEXT_TOKEN, Objective
from forescale.data.stream import MicroBatch, validation_windows
from forescale.engine.ranks import ALONE, Ranks, joined
from forescale.ground.console import plus_minus


class Scored(Protocol):
    """A score as it is logged: of a text, or of preferences (train/preferences.py)."""

    @property
    def loss(self) -> float: ...

    @property
    def windows(self) -> int: ...

    def row(self) -> dict[str, Any]: ...

    def text(self, of: str = "") -> str: ...


@dataclass(frozen=True)
class Score:
    """The score of held-out text.

    loss: mean nats per target; loss_stderr: its standard error, windows taken as independent;
    bits_per_byte: bits per byte of the UTF-8 text that the targets stand for, which compares
    tokenizers: an end-of-text token costs its bits and counts no bytes. targets, bytes, windows:
    how many were scored.

    With another objective all this is of the targets alone, a part of the text (a span's sentinel
    costs its bits and counts no bytes), so bits per byte are not the size of a compressed text. The
    targets of a source are written in order, each token after those before it and the source.
    Masked tokens are each predicted from the tokens on both sides that the fixed masks of
    held-out text leave, so that their perplexity is a pseudo-perplexity (Salazar et al. 2020, arXiv
    1910.14659, who mask one token at a time). They compare models with equal keys of `objective`,
    and never with a causal model.
    """

    loss: float
    loss_stderr: float
    bits_per_byte: float
    targets: int
    bytes: int
    windows: int

    def row(self) -> dict[str, Any]:
        """Return it as the fields of a row of metrics."""
        return vars(self)

    def text(self, of: str = "") -> str:
        """Return it as a part of a sentence. of: of what targets, if not of tokens."""
        return (
            f"loss {self.loss:.4f}{plus_minus(self.loss_stderr)}, {self.bits_per_byte:.4f} "
            f"bits per byte{of} over {self.windows:,} windows"
        )

    @property
    def perplexity(self) -> float:
        """Perplexity per token; only comparable under one tokenizer."""
        return math.exp(self.loss)


def evaluate(
    losses: Callable[[MicroBatch], Tensor],
    split: Split,
    token_bytes: np.ndarray,
    *,
    sequence_length: int,
    micro_batch: int,
    windows: int | None = None,
    documents: bool = False,
    objective: Objective = NEXT_TOKEN,
    bins: Bins | None = None,
    ranks: Ranks = ALONE,
    mark: Callable[[str], None] = lambda at: None,
) -> Score:
    """Score a split, or `windows` of its windows, evenly spread. All of `ranks` call it together.
    An empty split gives NaN over 0 windows.

    losses: returns the summed nats of each window of a micro-batch, (B,). token_bytes: bytes of
    each token, by id. documents: attention stays within documents. bins: the split's pairs or
    conversations. mark: receives the place of this rank, at every micro-batch, so that a long
    evaluation doesn't look like a rank that hangs.
    """
    mine = []
    share = (micro_batch, ranks.rank, ranks.size)
    parts = validation_windows(split, sequence_length, *share, windows, documents, objective, bins)
    for micro in parts:
        mark("evaluation")
        sums = losses(micro).double().cpu()
        real = micro.targets != IGNORED
        has_text = real & (micro.targets < len(token_bytes))  # unlike ids that an objective adds
        bytes_ = torch.from_numpy(token_bytes)[micro.targets * has_text] * has_text
        rows = zip(sums.tolist(), real.sum(1).tolist(), bytes_.sum(1).tolist(), strict=True)
        mine += [(micro.index, i, *row) for i, row in enumerate(rows) if row[1]]
    mark("summary")
    return Score(**ranks.reduce_on_main(mine, lambda parts: vars(_score_of(sorted(joined(parts))))))


def _score_of(rows: Sequence[tuple[int, int, float, int, int]]) -> Score:
    """Return the score of windows: of each its micro-batch, its place there, its nats, targets and
    bytes."""
    if not rows:
        return Score(math.nan, math.nan, math.nan, targets=0, bytes=0, windows=0)
    nats, targets, count = (np.array([row[k] for row in rows]) for k in (2, 3, 4))
    loss = math.fsum(nats) / int(targets.sum())
    return Score(
        loss=loss,
        loss_stderr=ratio_stderr(nats, targets, loss),
        bits_per_byte=math.fsum(nats) / math.log(2) / int(count.sum()),
        targets=int(targets.sum()),
        bytes=int(count.sum()),
        windows=len(rows),
    )


def pooled(scores: Sequence[Score]) -> Score:
    """Return the score of several splits together. Each split is a stratum, so the variances of
    the strata's sums add (Cochran 1977, section 5.3)."""
    targets, size = sum(s.targets for s in scores), sum(s.bytes for s in scores)
    if not targets:
        return Score(math.nan, math.nan, math.nan, targets=0, bytes=0, windows=0)
    full = [s for s in scores if s.targets]
    return Score(
        loss=math.fsum(s.loss * s.targets for s in full) / targets,
        loss_stderr=math.sqrt(math.fsum((s.loss_stderr * s.targets) ** 2 for s in full)) / targets,
        bits_per_byte=math.fsum(s.bits_per_byte * s.bytes for s in full) / size,
        targets=targets,
        bytes=size,
        windows=sum(s.windows for s in full),
    )


def ratio_stderr(sums: np.ndarray, counts: np.ndarray, ratio: float) -> float:
    """Return the standard error of sum(sums) / sum(counts) (Cochran 1977, Sampling Techniques,
    eq. 2.39)."""
    n = len(sums)
    if n < 2:
        return math.nan
    residuals = sums - ratio * counts
    return float(np.sqrt(n / (n - 1) * np.square(residuals).sum()) / counts.sum())
