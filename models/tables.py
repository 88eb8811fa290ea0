"""Tables of vectors beside the vocabulary's: of pairs of tokens, and of each layer's values.

Both are look-ups, without a product. A model of the pairs needs no layer, and so leaves less for
the layers to learn. From modded-nanogpt's records (github.com/KellerJordan/modded-nanogpt, 2024 and
2026, "value embeddings" and "bigram hash embedding"); hashed tables of n-grams go back to Mikolov
et al. 2011 and to fastText (Joulin et al. 2016, arXiv 1607.01759); value embeddings are related to
the value residual of Zhou et al. 2024 (arXiv 2410.17897), which adds the first layer's values.

Invariant: a token without a visible previous one (the first of a row or of a document, or behind
padding) has a row of pairs that depends on itself alone, so that documents don't see each other.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.config import ModelConfig
from forescale.models.mixers.context import Context, continued

NONE = -1  # stands for the previous token, where there is none


class ValueEmbedding(nn.Module):
    """tokens (B, L) int64 -> what is added to their values in all heads, (B, L, G * K), at first 0;
    of ranks that divide the heads, those of this rank's. Each layer that has one has its own table.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        s = config.sizes
        self.weight = nn.Parameter(torch.zeros(s.vocab_size, s.kv_width))

    def forward(self, tokens_BL: Tensor) -> Tensor:
        return F.embedding(tokens_BL, self.weight)


class BigramEmbedding(nn.Module):
    """tokens (B, L) int64, previous (B, L) int64 -> vectors (B, L, D), at first all 0.

    bigram_rows is the number of rows; pairs with the same hash share one.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.rows = config.bigram_rows
        self.weight = nn.Parameter(torch.zeros(self.rows, config.sizes.width))

    def forward(self, tokens_BL: Tensor, previous_BL: Tensor) -> Tensor:
        return F.embedding(hashes(tokens_BL, previous_BL, self.rows), self.weight)


def hashes(tokens_BL: Tensor, previous_BL: Tensor, rows: int) -> Tensor:
    """Return the row of each pair, (B, L) int64, 0 to rows - 1: the same on every machine."""
    # Odd factors keep all bits of an id; the shift lets the high ones count in a small table.
    mixed = (tokens_BL * 0x9E3779B1) ^ ((previous_BL + 1) * 0x85EBCA6B)
    return (mixed ^ (mixed >> 17)) % rows


def previous(
    tokens_BL: Tensor, last_B1: Tensor | None, starts_BS: Tensor | None, real_BS: Tensor | None
) -> Tensor:
    """Return the previous token of each, (B, L) int64, NONE where it sees none.

    last: the token before the first column, if a cache has read one; starts and real: as in
    mixers.context.Context, of S >= L columns, the last of which are these.
    """
    first_B1 = tokens_BL.new_full((len(tokens_BL), 1), NONE) if last_B1 is None else last_B1
    previous_BL = torch.cat((first_B1, tokens_BL[:, :-1]), 1)
    if starts_BS is None and real_BS is None:
        return previous_BL
    seen_BL = continued(tokens_BL, Context(starts=starts_BS, real=real_BS))
    return previous_BL.masked_fill(seen_BL == 0, NONE)
