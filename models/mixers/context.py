"""The inputs of a mixer besides the hidden states: positions, masks and the cache.

Invariant: a mixer that takes the mask sees exactly the keys that the mask shows. Other mixers use
`starts` and `real`, which say the same, or a view made of them, and need no memory of size L by L.
"""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from forescale.models.decoding.cache import Memory
from forescale.models.parallel.groups import SequenceGroup
from forescale.models.positions.position import Rotation

# True while torch changes its own products in place afterwards: selective checkpointing keeps none
# of them, because it would keep the changed ones.
CHANGES_PRODUCTS: ContextVar[bool] = ContextVar("CHANGES_PRODUCTS", default=False)


class Sloped(NamedTuple):
    """Who sees whom, and alibi's biases, which flex_attention takes off the scores in fp32: slopes
    (H,) of this rank's heads, times distances of positions (S,) or (B, S)."""

    blocks: BlockMask
    slopes: Tensor
    positions: Tensor

    def score(self, score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Return a scaled score with its bias: flex_attention's score_mod."""
        at = self.positions
        distance = at[query] - at[key] if at.dim() == 1 else at[row, query] - at[row, key]
        return score - self.slopes[head] * distance


Mask = Tensor | BlockMask | Sloped


class Context(NamedTuple):
    """The inputs of a mixer beside the hidden states; None: absent. A call reads L columns, and S
    is L + the columns that the cache has read before.

    rotation: of queries and keys, with rotary positions.
    mask (B, 1, L, S): added to the scores, 0 for a visible key, else -inf (masks.additive_mask).
        Without it a token attends to itself and all earlier tokens or, in a model that is not
        causal, to all tokens. With alibi or relative positions, for mixers that take biases, it is
        (B or 1, H, L, S) and has the biases of visible keys (positions/biases.py). On a GPU it is a
        BlockMask where only documents and padding hide keys (masks.block_mask), and with alibi a
        Sloped.
    starts (B, S): the column at which each token's document begins.
    real (B, S): False at padding.
    memory: the cache of this layer, where a mixer reads what it stored about earlier columns and
        stores what later ones need; the only field that differs between layers with one view.
    counted (B, L): the tokens that count for the balance of experts; None: all.
    source (B, S, D): the encoder's output, in the decoder of an encoder-decoder.
    source_mask (B, 1, 1, S): added to the scores of the encoder's tokens.
    view: the result of the mixer's viewer (part.Mixer.viewer) for this forward pass.
    values (B, L, G, K): of the first layer, in later layers with value_residual.
    token_values (B, L, G * K): added to the values of a layer with a value embedding.
    group: the ranks that divide the columns of the rows. L are then this rank's columns; mask,
        starts, real and view are of all columns, and a mask with heads has this rank's heads. With
        a ring of ranks, view is None, and mask the slopes of alibi or None: mixers/ring.py makes
        the rest of starts and real.
    """

    rotation: Rotation | None = None
    mask: Mask | None = None
    starts: Tensor | None = None
    real: Tensor | None = None
    memory: Memory | None = None
    counted: Tensor | None = None
    source: Tensor | None = None
    source_mask: Tensor | None = None
    view: Any = None
    values: Tensor | None = None
    token_values: Tensor | None = None
    group: SequenceGroup | None = None


class Columns(NamedTuple):
    """The queries and keys of a forward pass, for masks and views.

    positions (S,) or (B, S), see positions_of; length: L queries, the last of the S columns; starts
    and real as in Context; dtype: of queries and keys; decoding: with a cache; drops: with dropout.
    """

    positions: Tensor
    length: int
    starts: Tensor | None = None
    real: Tensor | None = None
    dtype: torch.dtype = torch.float32
    decoding: bool = False
    drops: bool = False


Viewer = Callable[[Columns], Any]  # makes Context.view


def continued(x_BL: Tensor, context: Context, before: int = 0) -> Tensor:
    """Return (B or 1, L), 1 where the previous token is visible, else 0, in the dtype of x (B, L,
    ...).

    A recurrence starts again at each 0: at a new document, after padding, at the first token.
    before: of the columns of x, where ranks divide rows, those that come before this rank's.
    """
    if context.group is None:
        return _continued(x_BL, context, x_BL.shape[1])
    whole_BL = _continued(x_BL, context, (x_BL.shape[1] - before) * context.group.size)
    return context.group.columns(whole_BL, before)


def _continued(x_BL: Tensor, context: Context, length: int) -> Tensor:
    either = context.starts if context.starts is not None else context.real
    if either is None:
        is_first = context.memory is None or context.memory.is_empty
        return F.pad(x_BL.new_ones(1, length - is_first), (int(is_first), 0))
    follows_BS = either.new_ones(either.shape[0], either.shape[1] - 1).bool()
    if context.starts is not None:
        follows_BS = context.starts[:, 1:] == context.starts[:, :-1]
    if context.real is not None:
        follows_BS = follows_BS & context.real[:, 1:].bool() & context.real[:, :-1].bool()
    return F.pad(follows_BS, (1, 0))[:, -length:].to(x_BL.dtype)


def earlier(x_BLD: Tensor, by: int) -> Tensor:
    """Return x of `by` tokens earlier, 0 before the first, (B, L, D)."""
    return F.pad(x_BLD, (0, 0, by, 0))[:, : x_BLD.shape[1]]
