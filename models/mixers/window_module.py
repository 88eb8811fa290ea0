"""Attention to the last tokens, in blocks: nothing of L by L is held.

A view says what the queries of a forward pass read and see. It is made once for all layers of
equal mixers, and holds L by `Layout.reads` values. Invariant: `sees` alone decides who sees whom;
views only skip what it hides. On CUDA the view is a BlockMask (masks.py). That path is tested on a
CPU, in the eager form of flex_attention; it has not run on a GPU.

Parameters are those of full attention, and so is the result where every earlier key is seen.
"""

from operator import index
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from forescale.models.config import ModelConfig
from forescale.models.decoding.cache import Memory
from forescale.models.mixers.attention_module import Attention, attend
from forescale.models.mixers.context import Columns, Context
from forescale.models.mixers.masks import (
    Sees,
    additive_mask,
    block_mask,
    fits_flex,
    flex,
    sees,
)
from forescale.models.mixers.window import Layout, Window


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


def _sees(window: Window, columns: Columns) -> Sees:
    return sees(columns, True, window.width, window.global_tokens)


def view_of(window: Window, columns: Columns) -> Blocks | BlockMask:
    """Return what the queries of these columns read and see."""
    if fits_flex(columns):
        return block_mask(_sees(window, columns), columns)
    return plain_view(window, columns)


def plain_view(window: Window, columns: Columns) -> Blocks:
    """Return the view of the plain form."""
    # Whole numbers, not the compiler's symbols: each length has its own layout.
    positions, length = columns.positions, index(columns.length)
    total, device = index(positions.shape[-1]), positions.device
    places_RS = positions if positions.dim() == 2 else positions[None]
    layout, see = window.layout(length, total), _sees(window, columns)
    first_N = total - length + torch.arange(layout.num_blocks, device=device) * layout.size
    query_NC1 = (first_N[:, None] + torch.arange(layout.size, device=device))[..., None]
    query_NC1 = query_NC1.clamp(max=total - 1)  # queries after the last are dropped again
    span_N1S = first_N[:, None] + torch.arange(-layout.left, layout.size, device=device)
    span_N1S = span_N1S[:, None]
    row_R111 = torch.arange(len(places_RS), device=device).view(-1, 1, 1, 1)
    inside = (span_N1S >= 0) & (span_N1S < total)
    visible = see(row_R111, row_R111, query_NC1, span_N1S.clamp(0, total - 1)) & inside
    visible_RNCS, extra_RNE = visible.view(-1, *visible.shape[-3:]), None
    if layout.extra:
        begin_RN = first_N - places_RS[:, first_N]  # where the document of a first query begins
        extra_RNE = begin_RN[..., None] + torch.arange(layout.extra, device=device)
        is_far = extra_RNE < span_N1S[:, 0, :1]
        extra_RNE = extra_RNE.clamp(0, total - 1)
        visible = see(row_R111, row_R111, query_NC1, extra_RNE[:, :, None]) & is_far[:, :, None]
        visible_RNCS = torch.cat([visible.expand(len(visible_RNCS), -1, -1, -1), visible_RNCS], -1)
    slots_RF = None
    if columns.decoding and window.global_tokens:
        numbers_F1 = torch.arange(window.global_tokens, device=device)[:, None]
        hit_RFL = places_RS[:, None, -length:] == numbers_F1
        if columns.real is not None:
            hit_RFL = hit_RFL & columns.real[:, None, -length:].bool()
        slots_RF = torch.where(hit_RFL.any(-1), hit_RFL.long().argmax(-1), -1)
    mask = additive_mask(visible_RNCS[:, :, None], columns.dtype)
    return Blocks(layout, mask, extra_RNE, slots_RF)


class WindowAttention(Attention):
    """(B, L, D) -> (B, L, D): a query sees the last `window` tokens, itself included, and the first
    `global_tokens` of its document, by context.view, a Blocks or a BlockMask.

    A cache keeps these keys alone.
    """

    def __init__(self, config: ModelConfig, part: Window):
        super().__init__(config, part)
        self.window, self.global_tokens = part.width, part.global_tokens

    def _attend(self, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, context: Context) -> Tensor:
        view, (B, L, H, K) = context.view, q_BLHK.shape
        if not isinstance(view, Blocks):
            return flex(q_BLHK, k_BLGK, v_BLGK, view, self.scale)
        k_BNGSK = self._read("key", k_BLGK, view, context.memory)
        v_BNGSK = self._read("value", v_BLGK, view, context.memory)
        N, C = view.layout.num_blocks, view.layout.size
        if N * C > L:
            q_BLHK = F.pad(q_BLHK, (0, 0, 0, 0, 0, N * C - L))
        q_BNHCK = q_BLHK.view(B, N, C, H, K).transpose(2, 3)
        if N == 1:
            return self._scored(
                q_BNHCK[:, 0], k_BNGSK[:, 0], v_BNGSK[:, 0], view.mask[:, 0]
            ).transpose(1, 2)
        # A row at a time: kernels take four dimensions, and stretches that overlap can't be joined
        # over rows without copying each key as often as it is read.
        masks = view.mask.expand(B, -1, -1, -1, -1)
        rows = zip(q_BNHCK, k_BNGSK, v_BNGSK, masks, strict=True)
        y_BNHCK = torch.stack([self._scored(*row) for row in rows])
        return y_BNHCK.transpose(2, 3).reshape(B, N * C, H, K)[:, :L]

    def _scored(self, q_BHLK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask: Tensor) -> Tensor:
        """Return (B, H, L, K); mask: added to the scores."""
        q_BLHK, k_BSGK, v_BSGK = (x.transpose(1, 2) for x in (q_BHLK, k_BGSK, v_BGSK))
        dropout = self.dropout if self.training else 0.0
        options = self.scale, False, dropout, self.dividing
        return attend(q_BLHK, k_BSGK, v_BSGK, mask, *options).transpose(1, 2)

    def _read(self, name: str, new_BLGK: Tensor, view: Blocks, memory: Memory | None) -> Tensor:
        """Return the keys or values that each block reads, (B, N, G, reads, K)."""
        layout, held, first_BFGK = view.layout, new_BLGK, None
        row_B1 = torch.arange(len(new_BLGK), device=new_BLGK.device)[:, None]
        if memory is not None:
            held = memory.keep_last(name, new_BLGK, self.window - 1)
            if view.slots is not None:  # those of the first keys that are new, and those known
                first_BFGK = new_BLGK[row_B1, view.slots.clamp(min=0)]
                if (before := memory.get(f"first_{name}")) is not None:
                    first_BFGK = torch.where(view.slots[..., None, None] < 0, before, first_BFGK)
                memory[f"first_{name}"] = first_BFGK
        # Zeros around the columns: what blocks read overlaps, and is a view without a copy.
        front = layout.left - (held.shape[1] - new_BLGK.shape[1])
        back = layout.num_blocks * layout.size - new_BLGK.shape[1]
        padded = held
        if front or back:
            padded = F.pad(held, (0, 0, 0, 0, front, back))  # a negative front cuts columns off
        span_BNGSK = padded.unfold(1, layout.left + layout.size, layout.size).transpose(3, 4)
        if view.extra is None:
            return span_BNGSK
        if first_BFGK is None:
            extra_BNGEK = held[row_B1[..., None], view.extra].transpose(2, 3)
        else:
            extra_BNGEK = first_BFGK.transpose(1, 2)[:, None]
            extra_BNGEK = extra_BNGEK.expand(-1, layout.num_blocks, -1, -1, -1)
        return torch.cat([extra_BNGEK, span_BNGSK], 3)
