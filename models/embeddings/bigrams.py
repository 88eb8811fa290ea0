"""Vectors of pairs: a table that is read at a hash of a token and the one before it.

A model of the pairs without a layer: it leaves less for the layers to learn. From modded-nanogpt's
records (github.com/KellerJordan/modded-nanogpt, 2026, "bigram hash embedding"); hashed tables of
n-grams go back to Mikolov et al. 2011 and to fastText (Joulin et al. 2016, arXiv 1607.01759).

Invariant: a token without a visible one before it (the first of a row or of a document, or behind
padding) has a row that depends on itself alone, so that documents don't see each other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.config import ModelConfig
from forescale.models.mixers.context import Context, continued

NONE = -1  # stands for the token before, where there is none


class BigramEmbedding(nn.Module):
    """tokens (B, L) int64, before (B, L) int64 -> vectors (B, L, D), at first all 0.

    bigram_rows is the number of rows; pairs with the same hash share one.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.rows = config.bigram_rows
        self.weight = nn.Parameter(torch.zeros(self.rows, config.sizes.width))

    def forward(self, tokens_BL: Tensor, before_BL: Tensor) -> Tensor:
        return F.embedding(hashes(tokens_BL, before_BL, self.rows), self.weight)


def hashes(tokens_BL: Tensor, before_BL: Tensor, rows: int) -> Tensor:
    """Return the row of each pair, (B, L) int64, 0 to rows - 1: the same on every machine."""
    # Odd factors keep all bits of an id; the shift lets the high ones count in a small table.
    mixed = (tokens_BL * 0x9E3779B1) ^ ((before_BL + 1) * 0x85EBCA6B)
    return (mixed ^ (mixed >> 17)) % rows


def before(
    tokens_BL: Tensor, last_B1: Tensor | None, starts_BS: Tensor | None, real_BS: Tensor | None
) -> Tensor:
    """Return the token before each, (B, L) int64, NONE where it has none that it sees.

    last: the token before the first column, if a cache has read one; starts and real: as in
    mixers.context.Context, of S >= L columns, the last of which are these.
    """
    first_B1 = tokens_BL.new_full((len(tokens_BL), 1), NONE) if last_B1 is None else last_B1
    found = torch.cat((first_B1, tokens_BL[:, :-1]), 1)
    if starts_BS is None and real_BS is None:
        return found
    seen_BL = continued(tokens_BL, Context(starts=starts_BS, real=real_BS))
    return found.masked_fill(seen_BL == 0, NONE)
