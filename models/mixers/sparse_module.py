"""Attention whose queries see few keys: a sliding window, or blocks of keys.

Parameters are those of full attention, and so is the result where every earlier key is seen.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from forescale.models.config import ModelConfig
from forescale.models.decoding.cache import Memory
from forescale.models.mixers.attention_module import Attention, attend
from forescale.models.mixers.blocks import Blocks, chosen, flex, spans_of, view_of
from forescale.models.mixers.context import Context, Viewer
from forescale.models.mixers.patterns import Stretch
from forescale.models.mixers.sparse import FewKeys


def viewer(config: ModelConfig, part: FewKeys, layer: int) -> Viewer:
    """Return the function that makes the views of this layer."""
    return partial(view_of, part.pattern_of(layer))


class BlockSparseAttention(Attention):
    """(B, L, D) -> (B, L, D): queries see the keys of context.view, a Blocks or a BlockMask.

    A cache keeps all keys, of which a query reads those of its view.
    """

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
        how = self.scale, False, dropout, self.dividing
        return attend(q_BLHK, k_BSGK, v_BSGK, mask, *how).transpose(1, 2)

    def _read(self, name: str, new_BLGK: Tensor, view: Blocks, memory: Memory | None) -> Tensor:
        """Return the keys or values that each block reads, (B, N, G, reads, K)."""
        held = new_BLGK if memory is None else memory.extend(name, new_BLGK)
        span_BNGSK = spans_of(held, view.layout, new_BLGK.shape[1])
        if view.extra is None:
            return span_BNGSK
        return torch.cat([chosen(held, view.extra), span_BNGSK], 3)


class WindowAttention(BlockSparseAttention):
    """(B, L, D) -> (B, L, D): a query sees the last `window` tokens, itself included, and the first
    `global_tokens` of its document.

    A cache keeps these keys alone.
    """

    def __init__(self, config: ModelConfig, part: FewKeys):
        super().__init__(config, part)
        pattern = part.pattern_of()
        assert isinstance(pattern, Stretch)
        self.pattern = pattern

    def _read(self, name: str, new_BLGK: Tensor, view: Blocks, memory: Memory | None) -> Tensor:
        if memory is None:
            return super()._read(name, new_BLGK, view, memory)
        held = memory.keep_last(name, new_BLGK, self.pattern.tokens - 1)
        span_BNGSK = spans_of(held, view.layout, new_BLGK.shape[1])
        if view.slots is None:
            return span_BNGSK
        first_BFGK = self._first(f"first_{name}", new_BLGK, view.slots, memory)
        if view.extra is None:
            return span_BNGSK
        extra = first_BFGK.transpose(1, 2)[:, None].expand(-1, view.layout.num_blocks, -1, -1, -1)
        return torch.cat([extra, span_BNGSK], 3)

    def _first(self, name: str, new_BLGK: Tensor, slots_RF: Tensor, memory: Memory) -> Tensor:
        """Put the first keys of each row where they are new; return those known, (B, F, G, K)."""
        row_B1 = torch.arange(len(new_BLGK), device=new_BLGK.device)[:, None]
        new_BFGK, before = new_BLGK[row_B1, slots_RF.clamp(min=0)], memory.get(name)
        if before is not None:
            new_BFGK = torch.where(slots_RF[..., None, None] < 0, before, new_BFGK)
        memory[name] = new_BFGK
        return new_BFGK
