"""Causal self-attention, multi-head or grouped-query, with QK-norm, document and padding masks."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.config import ModelConfig
from forescale.models.init import Linear
from forescale.models.norm import RMSNorm
from forescale.models.parametrization import scales
from forescale.models.positions.position import rotate

if TYPE_CHECKING:
    from forescale.models.transformer import Context


def visible_keys(padding_mask_BL: Tensor | None, starts_BL: Tensor | None) -> Tensor:
    """Return (B, 1, L, L), True if the query (row) may attend to the key (column).

    A query attends to no later key, no padding, and no key from before its document.
    Args, at least one of them: padding_mask (B, L), True for a real token; starts (B, L), see
    position.document_starts. A padding token still attends to itself: some kernels return NaN for a
    softmax over no keys, and NaN would spread to the gradients of real tokens.
    """
    either = starts_BL if padding_mask_BL is None else padding_mask_BL
    assert either is not None
    length = either.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=either.device).tril()
    if starts_BL is not None:
        columns_L = torch.arange(length, device=either.device)
        seen = seen & (columns_L >= starts_BL[:, :, None])
    if padding_mask_BL is not None:
        own_LL = torch.eye(length, dtype=torch.bool, device=either.device)
        seen = (seen & padding_mask_BL.bool()[:, None, :]) | own_LL
    return seen[:, None]


def additive_mask(seen_B1LL: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask to add to the scores: 0 for a visible key, else -inf, in the queries' dtype.

    It needs B * L^2 values (L = 2,048 in bf16: 8 MiB per row; 8,192: 128 MiB), once per forward
    pass, until the backward pass ends. Attention would convert a boolean mask to the same, but in
    every layer, and autograd would keep each copy. With any mask, the kernels that skip invisible
    keys (flash) can't be used: every layer scores the whole square, including later tokens and
    other documents.
    """
    return torch.zeros_like(seen_B1LL, dtype=dtype).masked_fill(~seen_B1LL, -torch.inf)


class Attention(nn.Module):
    """(B, L, D) -> (B, L, D); H query heads share G key and value heads (Ainslie et al. 2023,
    arXiv 2305.13245). Query, key and value have separate matrices: Muon orthogonalises each.
    QK-norm (Henry et al. 2020, arXiv 2010.04245) comes before the rotation, one weight for all
    heads, as in Qwen3.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        s = config.sizes
        self.num_heads, self.num_kv_heads = s.num_heads, s.num_kv_heads
        self.dropout = config.dropout
        bias, scale = config.bias, scales(config)
        self.scale, std = scale.attention, scale.hidden_std
        self.query = Linear(s.width, s.width, bias, std)
        self.key = Linear(s.width, s.kv_width, bias, std)
        self.value = Linear(s.width, s.kv_width, bias, std)
        self.output = Linear(s.width, s.width, bias, scale.writing_std)
        self.query_norm = RMSNorm(s.head_dim, config.norm_eps) if config.qk_norm else None
        self.key_norm = RMSNorm(s.head_dim, config.norm_eps) if config.qk_norm else None

    def forward(self, x_BLD: Tensor, context: "Context") -> Tensor:
        B, L, _ = x_BLD.shape
        rotation, mask = context
        q_BLHK = self.query(x_BLD).view(B, L, self.num_heads, -1)
        k_BLGK = self.key(x_BLD).view(B, L, self.num_kv_heads, -1)
        v_BLGK = self.value(x_BLD).view(B, L, self.num_kv_heads, -1)
        if self.query_norm is not None and self.key_norm is not None:
            q_BLHK, k_BLGK = self.query_norm(q_BLHK), self.key_norm(k_BLGK)
        if rotation is not None:
            q_BLHK, k_BLGK = rotate(q_BLHK, rotation), rotate(k_BLGK, rotation)
        y_BHLK = F.scaled_dot_product_attention(
            q_BLHK.transpose(1, 2),
            k_BLGK.transpose(1, 2),
            v_BLGK.transpose(1, 2),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.output(y_BHLK.transpose(1, 2).reshape(B, L, -1))
