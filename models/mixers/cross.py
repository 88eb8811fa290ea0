"""Attention of a decoder's tokens to the encoder's output."""

from torch import Tensor

from forescale.models.config import ModelConfig
from forescale.models.mixers.attention import Attention
from forescale.models.mixers.context import Context


class CrossAttention(Attention):
    """(B, T, D) -> (B, T, D): Attention whose keys and values are of context.source, (B, S, D), all
    of which every token sees (Vaswani et al. 2017, section 3.2.3). Keys and queries don't rotate:
    the source has its positions already. A cache keeps the keys and values of the source, which the
    first call makes.
    """

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.causal = False

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        k_BSGK, v_BSGK = self._of_source(context)
        # The source is whole: no column of the decoder's adds to its keys.
        seen = Context(mask=context.source_mask)
        return self._written(
            x_BLD, self._attend(self._queries(x_BLD, context), k_BSGK, v_BSGK, seen)
        )

    def _of_source(self, context: Context) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the source, (B, S, G, K) each."""
        memory = context.memory
        if memory is not None:
            kept = memory.get("source_key"), memory.get("source_value")
            if kept[0] is not None and kept[1] is not None:
                return kept[0], kept[1]
        assert context.source is not None
        found = self._keys_and_values(context.source, context)
        if memory is not None:
            memory["source_key"], memory["source_value"] = found
        return found
