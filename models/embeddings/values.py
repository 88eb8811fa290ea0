"""Value embeddings: what a token adds to the values of attention, whatever its context.

Each layer that has one reads a table of its own, of a vector per token, which is added to the
token's values in all heads. It costs a look-up and no product. From modded-nanogpt's records
(github.com/KellerJordan/modded-nanogpt, 2024, "value embeddings") and nanochat; related to the
value residual of Zhou et al. 2024 (arXiv 2410.17897), which adds the first layer's values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.config import ModelConfig


class ValueEmbedding(nn.Module):
    """tokens (B, L) int64 -> values (B, L, G * K), at first all 0; of ranks that divide the heads,
    those of this rank's."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        s = config.sizes
        self.weight = nn.Parameter(torch.zeros(s.vocab_size, s.kv_width))

    def forward(self, tokens_BL: Tensor) -> Tensor:
        return F.embedding(tokens_BL, self.weight)
