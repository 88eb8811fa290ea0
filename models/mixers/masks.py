"""Which tokens a token may attend to, and the masks that attention takes.

On CUDA a BlockMask for torch's flex_attention (Dong et al. 2024, arXiv 2412.05496), whose kernels
skip blocks that nobody sees, stands in place of a dense mask where documents or padding hide keys.
"""

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from forescale.models.config import ModelConfig
from forescale.models.mixers.context import Columns, Mask, Sloped
from forescale.models.parallel.groups import Group
from forescale.models.positions.biases import RelativePosition, biased_mask, slopes_on

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # row, head, query, key -> bool
FLEX_BLOCK = 128  # queries and keys of a block of flex_attention's kernels
_compiled = cache(torch.compile)


def visible_keys(
    padding_mask_BS: Tensor | None,
    starts_BS: Tensor | None,
    num_queries: int | None = None,
    causal: bool = True,
) -> Tensor:
    """Return (B, 1, L, S), True if the query (row) may attend to the key (column).

    A query attends to no padding, to no key of another document and, if causal, to no later key.
    Args, at least one of the first two: padding_mask (B, S), True for a real token; starts (B, S),
    see position.document_starts; num_queries: L, the last of the S columns; None: all of them. A
    padding token still attends to itself: some kernels return NaN for a softmax over no keys, and
    NaN would spread to the gradients of real tokens.
    """
    either = starts_BS if padding_mask_BS is None else padding_mask_BS
    assert either is not None
    columns_S = torch.arange(either.shape[1], device=either.device)
    first = 0 if num_queries is None else len(columns_S) - num_queries
    queries_L1 = columns_S[first:, None]
    visible = columns_S <= queries_L1 if causal else (columns_S >= 0) & (queries_L1 >= 0)
    if starts_BS is not None:
        visible = visible & (starts_BS[:, None, :] == starts_BS[:, first:, None])
    if padding_mask_BS is not None:
        visible = (visible & padding_mask_BS.bool()[:, None, :]) | (columns_S == queries_L1)
    return visible[:, None]


def additive_mask(visible_B1LS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask to add to the scores: 0 for a visible key, else -inf, in the queries' dtype.

    It needs B * L^2 values (L = 2,048 in bf16: 8 MiB per row; 8,192: 128 MiB), once per forward
    pass, until the backward pass ends. Attention would convert a boolean mask to the same, but in
    every layer, and autograd would keep each copy. With any mask, the kernels that skip invisible
    keys (flash) can't be used: every layer scores the whole square, including later tokens and
    other documents.
    """
    return torch.zeros_like(visible_B1LS, dtype=dtype).masked_fill(~visible_B1LS, -torch.inf)


def source_mask(real_BS: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a decoder adds to its scores of an encoder's tokens, (B, 1, 1, S): 0, or -inf for
    padding. A source of padding alone is visible: no softmax is over nothing."""
    real_BS = real_BS.bool()
    real_BS = real_BS | ~real_BS.any(-1, keepdim=True)
    return additive_mask(real_BS[:, None, None], dtype)


def full_mask(
    config: ModelConfig,
    columns: Columns,
    causal: bool,
    table: RelativePosition | None,
    groups: Iterable[Group | None] = (),
    in_ring: bool = False,
) -> Mask | None:
    """Return the mask of Context for mixers that take one; None if the kernels need none.

    table: of relative positions. groups: the ranks that divide the heads; a mask with biases has
    the heads of this rank alone. in_ring: see Context.mask.
    """
    positions, length, starts, real = columns[:4]
    kind, num_heads, size = config.position.kind, config.sizes.num_heads, positions.shape[-1]
    hides = starts is not None or real is not None
    heads = slice(0, num_heads)
    for group in groups:
        heads = heads if group is None else group.heads(heads)
    if in_ring:
        return slopes_on(positions, num_heads, heads) if kind == "alibi" else None
    # flex_attention's kernels take heads of 16 and more. The gradient of a table of biases would be
    # summed by atomic additions.
    fits = kind != "relative" and config.sizes.head_dim >= 16
    if fits and (hides or kind == "alibi") and fits_flex(columns):
        blocks = block_mask(sees(columns, causal), columns)
        if kind != "alibi":
            return blocks
        return Sloped(blocks, slopes_on(positions, num_heads, heads), positions)
    if not hides and 1 < length < size:
        # A causal kernel would take the first query for the first key's.
        real, hides = torch.ones(1, size, dtype=torch.bool, device=positions.device), True
    visible = visible_keys(real, starts, length, causal) if hides else None
    biases = partial(biased_mask, num_heads=num_heads) if kind == "alibi" else table
    if biases is not None:
        mask: Tensor = biases(
            positions, visible, dtype=columns.dtype, num_queries=length, heads=heads
        )
        return mask
    return None if visible is None else additive_mask(visible, columns.dtype)


def sees(columns: Columns, causal: bool, window: int = 0, global_tokens: int = 0) -> Sees:
    """Return a function of row, head, query and key columns: True if the query sees the key.

    It takes index tensors that broadcast, or scalars, as flex_attention's mask_mod. A query sees no
    padding, none of another document and, if causal, no later key; with a window none further
    behind, but for the first global_tokens of the document. Padding sees itself alone, see
    visible_keys.
    """
    positions = columns.positions

    def position(row: Tensor, column: Tensor) -> Tensor:
        return positions[column] if positions.dim() == 1 else positions[row, column]

    def joined(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        if not window:
            return key <= query if causal else key >= 0
        place = position(row, key)
        is_near = position(row, query) - place < window
        return (key <= query) & (is_near | (place < global_tokens))

    return _within_documents(joined, columns)


def _within_documents(joined: Callable[[Tensor, Tensor, Tensor], Tensor], columns: Columns) -> Sees:
    """Return `joined`, of row, query and key, without padding and other documents: flex_attention's
    mask_mod. Padding sees itself alone."""
    starts, real = columns.starts, columns.real

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = joined(row, query, key)
        if starts is not None:
            visible = visible & (starts[row, query] == starts[row, key])
        if real is not None:
            visible = (visible & real[row, key].bool()) | (query == key)
        return visible

    return mask_mod


def fits_flex(columns: Columns) -> bool:
    """True if flex_attention takes these columns: on a GPU, whole rows, without dropout."""
    return columns.positions.is_cuda and not columns.decoding and not columns.drops


def block_mask(see: Sees, columns: Columns, block: int = FLEX_BLOCK) -> BlockMask:
    """Return who sees whom as flex_attention takes it, of whole rows (no cache).

    Which blocks of 128 by 128 pairs are empty, full or partly visible is computed a row of blocks
    at a time, so that nothing of L by L is held; inside a compiled graph the compiler sees to that.
    """
    positions, length = columns.positions, columns.length
    rows = len(positions) if positions.dim() == 2 else 1
    if torch.compiler.is_compiling():
        return create_block_mask(see, rows, 1, length, length, positions.device, block)
    device, N = positions.device, -(-length // block)
    row_R11 = torch.arange(rows, device=device).view(-1, 1, 1)
    keys = torch.arange(N * block, device=device)
    some, every = [], []
    for first in range(0, length, block):
        query_C1 = torch.arange(first, min(first + block, length), device=device)[:, None]
        visible = see(row_R11, row_R11, query_C1, keys.clamp(max=length - 1)) & (keys < length)
        visible = visible.view(-1, len(query_C1), N, block)
        some.append(visible.any(-1).any(1))
        every.append(visible.all(-1).all(1))
    full_RNN = torch.stack(every, 1)

    def listed(blocks_RNN: Tensor) -> tuple[Tensor, Tensor]:
        """How many blocks each row has, (R, 1, N), and their numbers first, (R, 1, N, N)."""
        order = blocks_RNN.int().argsort(dim=-1, descending=True, stable=True)
        return blocks_RNN.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]

    partial_lists, full_lists = listed(torch.stack(some, 1) & ~full_RNN), listed(full_RNN)
    return BlockMask.from_kv_blocks(
        *partial_lists, *full_lists, block, see, seq_lengths=(length, length)
    )


def flex(
    q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, mask: BlockMask | Sloped, scale: float | None
) -> Tensor:
    """Return (B, L, H, K) by flex_attention, compiled on CUDA: uncompiled it scores all pairs."""
    kernel: Any = _compiled(flex_attention) if q_BLHK.is_cuda else flex_attention
    score, blocks = (mask.score, mask.blocks) if isinstance(mask, Sloped) else (None, mask)
    q_BHLK, k_BGLK, v_BGLK = (x.transpose(1, 2) for x in (q_BLHK, k_BLGK, v_BLGK))
    gqa = q_BLHK.shape[2] != k_BLGK.shape[2]
    y_BHLK = kernel(q_BHLK, k_BGLK, v_BGLK, score, blocks, scale, enable_gqa=gqa)
    return y_BHLK.transpose(1, 2)
