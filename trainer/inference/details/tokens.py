"""The loss of each held-out token.

Invariant: windows and losses are those of `score`, so that the sum over all tokens is its loss.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from forescale.console import Progress, silent
from forescale.data.dataset import Split
from forescale.data.stream import held_out_places, spread, validation_windows
from forescale.models.positions.position import document_starts, positions_of


@dataclass(frozen=True)
class WindowLosses:
    """The targets of a window, (n,) each. ids: the tokens; nats: their losses; document: the number
    in the split of the document that each belongs to; seen: how many tokens the model sees before
    it."""

    ids: np.ndarray
    nats: np.ndarray
    document: np.ndarray
    seen: np.ndarray


@torch.no_grad()
def window_losses(
    model: nn.Module,
    split: Split,
    sequence_length: int,
    *,
    windows: int | None = None,
    documents: bool = False,
    progress: Progress = silent,
) -> Iterator[WindowLosses]:
    """Yield the losses of each window of a split, or of so many, evenly spread, as the next token
    is the target. documents: attention stays within documents, as trained.

    Logits of one window are held at a time, (L, V) fp32.
    """
    device = next(model.parameters()).device
    places = held_out_places(split, sequence_length, None)
    chosen = [places[i] for i in spread(len(places), windows)]
    parts = validation_windows(split, sequence_length, 1, limit=windows, documents=documents)
    number_of = _Documents(split)
    for done, (window, (shard, ((start, size),))) in enumerate(zip(parts, chosen, strict=True), 1):
        (tokens_1L, targets_1L), named = window.arguments(device)
        n = size - 1
        logits_LV = model(tokens_1L, **named)[0, :n].float()
        nats_L = F.cross_entropy(logits_LV, targets_1L[0, :n], reduction="none")
        starts = None if window.documents is None else document_starts(window.documents)
        length, where = window.tokens.shape[1], window.tokens.device
        positions_L = positions_of(length, where, None, starts).view(-1)[:n]
        yield WindowLosses(
            targets_1L[0, :n].cpu().numpy(),
            nats_L.double().cpu().numpy(),
            number_of(shard, np.arange(start + 1, start + size)),
            positions_L.cpu().numpy() + 1,
        )
        progress("losses of tokens", done, len(chosen), "windows")


class _Documents:
    """The numbers of documents in a split, by the place of a token."""

    def __init__(self, split: Split):
        self._split, self._shard = split, -1
        self._ends, self._before = np.empty(0, np.int64), 0

    def __call__(self, shard: int, tokens: np.ndarray) -> np.ndarray:
        """Return the number of the document of each token of a shard. Shards come in order."""
        while self._shard < shard:
            self._before += len(self._ends)
            self._shard += 1
            length = self._split.shard_tokens[self._shard]
            self._ends = self._split.document_ends(self._shard, 0, length)
        return self._before + np.searchsorted(self._ends, tokens, side="right")
