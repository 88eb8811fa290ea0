"""Attention of a decoder's tokens to the encoder's output."""

from torch import Tensor

from forescale.models.config import ModelConfig
from forescale.models.mixers.attention import Attention
from forescale.models.mixers.context import Context


class CrossAttention(Attention):
    """(B, T, D) -> (B, T, D): Attention whose keys and values are of context.source, (B, S, D), all
    of which every token sees (Vaswani et al. 2017, section 3.2.3). Keys and queries don't rotate:
    the source has its positions already.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.causal = False

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        assert context.source is not None
        return self.attend(x_BLD, context.source, Context(mask=context.source_mask))
