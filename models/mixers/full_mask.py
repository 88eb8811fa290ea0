"""Which mask the mixers of a forward pass are given (Context.mask), and whether any.

Invariant: with biases it has the heads of this rank alone.
"""

from collections.abc import Iterable
from functools import partial

from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from forescale.models.config import ModelConfig
from forescale.models.mixers.blocks import blocks_seen
from forescale.models.mixers.context import Columns
from forescale.models.mixers.masks import mask_of
from forescale.models.parallel.sequence import SequenceGroup
from forescale.models.parallel.tensor import TensorGroup
from forescale.models.positions.alibi import biased_mask
from forescale.models.positions.relative import RelativePosition


def full_mask(
    config: ModelConfig,
    read: Columns,
    causal: bool,
    table: RelativePosition | None,
    dividing: Iterable[TensorGroup | SequenceGroup | None] = (),
) -> Tensor | BlockMask | None:
    """Return the mask of Context for mixers that take one; None if the kernels need none.

    table: of relative positions. dividing: the ranks that divide the heads.
    """
    # flex_attention's kernels take heads of 16 and more.
    fits = config.position.kind not in ("alibi", "relative") and config.sizes.head_dim >= 16
    if fits and (blocks := blocks_seen(read, causal)) is not None:
        return blocks
    heads = slice(0, config.sizes.num_heads)
    for group in dividing:
        heads = heads if group is None else group.heads(heads)
    if config.position.kind == "alibi":
        every = config.sizes.num_heads
        return mask_of(read, causal, partial(biased_mask, num_heads=every, heads=heads))
    return mask_of(read, causal, None if table is None else partial(table, heads=heads))
