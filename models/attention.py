"""Causal self-attention: multi-head and grouped-query, over the whole row or within its documents,
with padding masks and QK-norm.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.config import ModelConfig
from forescale.models.init import Linear
from forescale.models.norm import RMSNorm
from forescale.models.parametrization import scales
from forescale.models.position import Rotation, rotate


def visible_keys(padding_mask_BL: Tensor | None, starts_BL: Tensor | None) -> Tensor:
    """(B, 1, L, L), True where the query (row) sees the key (column): no later one, no padding, and
    none from before its document.

    Args, at least one of them: padding_mask (B, L), True for a real token; starts (B, L), see
    position.document_starts. A padding token still sees itself: some kernels answer a softmax over
    nothing with NaN, which would reach the gradients of real tokens.
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
    """What is added to the scores: 0 where a key is seen, else -inf, in the dtype of the queries.

    Costs B * L^2 values (L = 2,048 in bf16: 8 MiB a row; 8,192: 128 MiB), once a forward, until its
    backward pass is through. Attention would make the same of a boolean mask itself, but anew in
    every layer, and autograd would keep each. Any mask rules out the kernels that skip what is not
    seen (flash): every layer scores the whole square, the future and other documents too.
    """
    return torch.zeros_like(seen_B1LL, dtype=dtype).masked_fill(~seen_B1LL, -torch.inf)


class Attention(nn.Module):
    """(B, L, D) -> (B, L, D); H query heads share G key and value heads (Ainslie et al. 2023,
    arXiv 2305.13245). Query, key and value are matrices of their own: Muon orthogonalises each.
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

    def forward(
        self, x_BLD: Tensor, rotation: Rotation | None = None, mask_B1LL: Tensor | None = None
    ) -> Tensor:
        """Without a mask a token sees all before it; see additive_mask."""
        B, L, _ = x_BLD.shape
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
            attn_mask=mask_B1LL,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask_B1LL is None,
            scale=self.scale,
            enable_gqa=self.num_kv_heads != self.num_heads,
        )
        return self.output(y_BHLK.transpose(1, 2).reshape(B, L, -1))
