"""Attention that reads keys in blocks, so that nothing of L by L is made (patterns.py: which keys).

A view says what the queries of a forward pass read and see. It is made once for all layers of a
mixer, like a dense mask, and holds L by `Layout.reads` values. Invariant: `sees` alone decides who
sees whom; views only skip what it hides. On CUDA the view is a BlockMask for torch's flex_attention
(Dong et al. 2024, arXiv 2412.05496), whose kernels skip blocks that nobody sees. That path is
tested on a CPU, in the eager form of flex_attention; it has not run on a GPU.
"""

from collections.abc import Callable
from dataclasses import astuple
from functools import cache
from operator import index
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from forescale.models.mixers.context import Columns
from forescale.models.mixers.masks import additive_mask
from forescale.models.mixers.patterns import Layout, Sparse, Stretch

Sees = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # row, head, query, key -> bool
_F = TypeVar("_F", bound=Callable[..., Any])
FLEX_BLOCK = 128  # queries and keys of a block of flex_attention's kernels


class Blocks(NamedTuple):
    """The view of the plain form; N blocks of C queries, R rows (1 if all are alike).

    mask (R, N, 1, C, E + left + C): added to the scores of the extra keys and the others. extra
    (R, N, E): columns of the extra keys, with E > 0. slots (R, F): where a cache finds the first
    keys of a row among the new ones: index of the new column, -1 for none.
    """

    layout: Layout
    mask: Tensor
    extra: Tensor | None = None
    slots: Tensor | None = None


def sees(pattern: Stretch | Sparse, columns: Columns) -> Sees:
    """Return a function of row, head, query and key columns: True if the query sees the key.

    It takes index tensors that broadcast, or scalars, as flex_attention's mask_mod. A query sees no
    padding, no later key and none of another document; padding sees itself alone, see
    masks.visible_keys.
    """
    rule, positions = _rule(pattern, columns), columns.positions

    def position(row: Tensor, column: Tensor) -> Tensor:
        return positions[column] if positions.dim() == 1 else positions[row, column]

    def joined(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & rule(position(row, query), position(row, key))

    return _within_documents(joined, columns)


def sees_all(columns: Columns, causal: bool) -> Sees:
    """Return the same function for full attention: who sees whom in masks.visible_keys."""

    def joined(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query if causal else key >= 0

    return _within_documents(joined, columns)


def _within_documents(joined: Callable[[Tensor, Tensor, Tensor], Tensor], columns: Columns) -> Sees:
    """Return `joined`, of row, query and key, without padding and other documents."""
    starts, real = columns.starts, columns.real

    def mask_mod(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = joined(row, query, key)
        if starts is not None:
            visible = visible & (starts[row, query] == starts[row, key])
        if real is not None:
            visible = (visible & real[row, key].bool()) | (query == key)
        return visible

    return mask_mod


def _rule(pattern: Stretch | Sparse, columns: Columns) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a function of the positions of query and key: True if the pattern joins them."""
    if isinstance(pattern, Stretch):
        width, first = pattern.tokens, pattern.first
        return lambda query, key: (query - key < width) | (key < first)
    p, device = pattern, columns.positions.device
    rows = -(-index(columns.positions.shape[-1]) // p.size)
    drawn = torch.tensor(_drawn(p, rows) if p.random else [], device=device)

    def rule(query: Tensor, key: Tensor) -> Tensor:
        b, j = query // p.size, key // p.size
        if p.kind == "strided":
            return (b - j < p.local) | ((b - j) % p.local == 0)
        if p.kind == "fixed":
            return (b // p.local == j // p.local) | (j % p.local == p.local - 1)
        visible = (b - j < p.local) | (j < p.anchors)
        for i in range(p.random):
            visible = visible | (drawn[b, i] == j)
        return visible

    return rule


def _constant(function: _F) -> _F:
    """Mark a function as torch.compiler.assume_constant_result does, which imports the whole
    compiler to do it: a second of every process."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


# The compiler takes what these return as it is, and doesn't trace how they draw and count blocks.
@_constant
def _layout(
    pattern: Stretch | Sparse, length: int, total: int, aligned: bool
) -> tuple[int, int, int, int]:
    return astuple(pattern.layout(length, total, aligned))


@_constant
def _drawn(sparse: Sparse, rows: int) -> list[list[int]]:
    """Return the random blocks of each block, (rows, random), -1 for none."""
    return _padded([list(row) for row in sparse.random_table(rows)], sparse.random)


@_constant
def _far(sparse: Sparse, rows: int, spans: int) -> list[list[int]]:
    """Return Sparse.table in rows of the same length, -1 for none."""
    table = sparse.table(rows, spans)
    return _padded([list(row) for row in table], max(map(len, table)))


def _padded(rows: list[list[int]], width: int) -> list[list[int]]:
    return [row + [-1] * (width - len(row)) for row in rows]


def view_of(pattern: Stretch | Sparse, columns: Columns) -> Blocks | BlockMask:
    """Return what the queries of these columns read and see."""
    return flex_view(pattern, columns) if fits_flex(columns) else plain_view(pattern, columns)


def fits_flex(columns: Columns) -> bool:
    """True if flex_attention takes these columns: on a GPU, whole rows, without dropout."""
    return columns.positions.is_cuda and not columns.decoding and not columns.drops


def blocks_seen(columns: Columns, causal: bool) -> BlockMask | None:
    """Return who sees whom in full attention where documents or padding hide keys, for
    flex_attention; None where nothing is hidden, or another kernel must do."""
    hides = columns.starts is not None or columns.real is not None
    return block_mask(sees_all(columns, causal), columns) if hides and fits_flex(columns) else None


def plain_view(pattern: Stretch | Sparse, columns: Columns) -> Blocks:
    """Return the view of the plain form."""
    # Whole numbers, not the compiler's symbols: each length has its own layout.
    positions, length = columns.positions, index(columns.length)
    total, device = index(positions.shape[-1]), positions.device
    aligned = positions.dim() == 1
    layout = Layout(*_layout(pattern, length, total, aligned))
    see = sees(pattern, columns)
    first_N = total - length + torch.arange(layout.num_blocks, device=device) * layout.size
    own_NC1 = (first_N[:, None] + torch.arange(layout.size, device=device))[..., None]
    own_NC1 = own_NC1.clamp(max=total - 1)  # queries after the last are dropped again
    span_N1S = first_N[:, None] + torch.arange(-layout.left, layout.size, device=device)
    span_N1S, rows = span_N1S[:, None], len(positions) if positions.dim() == 2 else 1
    row_R111 = torch.arange(rows, device=device).view(-1, 1, 1, 1)
    inside = (span_N1S >= 0) & (span_N1S < total)
    visible = see(row_R111, row_R111, own_NC1, span_N1S.clamp(0, total - 1)) & inside
    seen_RNCS, extra_RNE = visible.view(-1, *visible.shape[-3:]), None
    if layout.extra:
        place_RN = (positions if positions.dim() == 2 else positions[None])[:, first_N]
        extra_RNE = _extra(pattern, place_RN, total, length, aligned)
        is_far = (extra_RNE >= 0) & (
            extra_RNE + (first_N - place_RN)[..., None] < span_N1S[:, 0, :1]
        )
        extra_RNE = (extra_RNE + (first_N - place_RN)[..., None]).clamp(0, total - 1)
        visible = see(row_R111, row_R111, own_NC1, extra_RNE[:, :, None]) & is_far[:, :, None]
        seen_RNCS = torch.cat([visible.expand(len(seen_RNCS), -1, -1, -1), seen_RNCS], -1)
    mask = additive_mask(seen_RNCS[:, :, None], columns.dtype)
    return Blocks(layout, mask, extra_RNE, _slots(pattern, columns) if columns.decoding else None)


def _extra(
    pattern: Stretch | Sparse, first_RN: Tensor, total: int, length: int, aligned: bool
) -> Tensor:
    """Return the positions of extra keys (R, N, E), negative for none; first: positions of the
    first query of each block."""
    device = first_RN.device
    if isinstance(pattern, Stretch):
        return torch.arange(pattern.first, device=device).expand(*first_RN.shape, -1)
    size, spans = pattern.size, pattern.spans(length, total, aligned)
    table = torch.tensor(_far(pattern, -(-total // size), spans), device=device)
    blocks_RNM1 = table[first_RN // size][..., None]
    positions = blocks_RNM1 * size + torch.arange(size, device=device)
    return positions.masked_fill(blocks_RNM1 < 0, -1).flatten(-2)


def _slots(pattern: Stretch | Sparse, columns: Columns) -> Tensor | None:
    """Return Blocks.slots."""
    if not isinstance(pattern, Stretch) or not pattern.first:
        return None
    positions, length = columns.positions, columns.length
    new_RL = (positions if positions.dim() == 2 else positions[None])[:, -length:]
    hit_RFL = new_RL[:, None] == torch.arange(pattern.first, device=new_RL.device)[:, None]
    if columns.real is not None:
        hit_RFL = hit_RFL & columns.real[:, None, -length:].bool()
    return torch.where(hit_RFL.any(-1), hit_RFL.long().argmax(-1), -1)


def flex_view(pattern: Stretch | Sparse, columns: Columns, block: int = FLEX_BLOCK) -> BlockMask:
    """Return the view for flex_attention, of whole rows (no cache)."""
    return block_mask(sees(pattern, columns), columns, block)


def block_mask(see: Sees, columns: Columns, block: int = FLEX_BLOCK) -> BlockMask:
    """Return who sees whom as flex_attention takes it.

    Which blocks of 128 by 128 pairs are empty, full or partly seen is found a row of blocks at a
    time, so that nothing of L by L is held; inside a compiled graph the compiler sees to that.
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
        own_C1 = torch.arange(first, min(first + block, length), device=device)[:, None]
        visible = see(row_R11, row_R11, own_C1, keys.clamp(max=length - 1)) & (keys < length)
        visible = visible.view(-1, len(own_C1), N, block)
        some.append(visible.any(-1).any(1))
        every.append(visible.all(-1).all(1))
    full_RNN = torch.stack(every, 1)
    partial_RNN = torch.stack(some, 1) & ~full_RNN
    counted = [_listed(blocks) for blocks in (partial_RNN, full_RNN)]
    return BlockMask.from_kv_blocks(
        *counted[0], *counted[1], block, see, seq_lengths=(length, length)
    )


def _listed(blocks_RNN: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many blocks each row has, (R, 1, N), and their numbers first, (R, 1, N, N)."""
    order = blocks_RNN.int().argsort(dim=-1, descending=True, stable=True)
    return blocks_RNN.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


@cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


def flex(
    q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, view: BlockMask, scale: float | None
) -> Tensor:
    """Return (B, L, H, K) by flex_attention, compiled on CUDA: uncompiled it scores all pairs."""
    kernel: Any = _compiled() if q_BLHK.is_cuda else flex_attention
    q_BHLK, k_BGLK, v_BGLK = (x.transpose(1, 2) for x in (q_BLHK, k_BLGK, v_BLGK))
    gqa = q_BLHK.shape[2] != k_BLGK.shape[2]
    y_BHLK = kernel(q_BHLK, k_BGLK, v_BGLK, block_mask=view, scale=scale, enable_gqa=gqa)
    return y_BHLK.transpose(1, 2)


def spans_of(x_BTGK: Tensor, layout: Layout, length: int) -> Tensor:
    """Return what each block reads in one stretch, (B, N, G, left + C, K); x: the columns that are
    held, of which the last `length` are the queries' own.

    A view of the columns with zeros around them: stretches overlap without being copied.
    """
    front = layout.left - (x_BTGK.shape[1] - length)
    back = layout.num_blocks * layout.size - length
    if front or back:
        x_BTGK = F.pad(x_BTGK, (0, 0, 0, 0, front, back))  # a negative front cuts columns off
    return x_BTGK.unfold(1, layout.left + layout.size, layout.size).transpose(3, 4)


def chosen(x_BTGK: Tensor, columns: Tensor) -> Tensor:
    """Return the columns (R, N, E) of x, (B, N, G, E, K)."""
    row_B11 = torch.arange(len(x_BTGK), device=x_BTGK.device).view(-1, 1, 1)
    return x_BTGK[row_B11, columns].transpose(2, 3)
