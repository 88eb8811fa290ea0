"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The keys and values of all heads are made of one narrow latent of each token, so decoding keeps the
latent alone. A rotation could not be moved past the matrix that makes keys, so a part of each head
(model.position.fraction) has a key of its own, which rotates and which all heads share.

Invariant: both forms give the same outputs: keys and values expanded, as in training; or the two
matrices absorbed into queries and outputs, where few tokens are decoded and all heads read the
latents themselves.
"""

import torch
from torch import Tensor, nn

from forescale.models.config import ModelConfig
from forescale.models.init import Linear
from forescale.models.mixers.attention_module import attend, attended
from forescale.models.mixers.context import Context
from forescale.models.mixers.latent import Latent
from forescale.models.norms import RMSNorm
from forescale.models.parallel.groups import TensorGroup
from forescale.models.parametrization import scales
from forescale.models.positions.position import rotate


class PerHead(Linear):
    """Keys or values of H heads from latents: (B, L, R) -> (B, L, H, K).

    It is used in three ways, all by a call, because only a module's own forward may read its
    weight.
    """

    def __init__(self, rank: int, num_heads: int, width: int, bias: bool, std: float):
        super().__init__(rank, num_heads * width, bias, std)
        self.num_heads = num_heads

    def forward(self, x: Tensor, form: str = "expand") -> Tensor:
        """Return (B, L, H, K) of latents x (B, L, R).

        form: `score` takes queries (B, L, H, K) and returns what has the same scores with latents
        as they have with keys, (B, L, H, R), but for a bias, which adds the same to all scores of a
        query. `each` takes a latent for each head, (B, L, H, R).
        """
        if form == "expand":
            return super().forward(x).unflatten(-1, (self.num_heads, -1))
        weight_HKR = self.weight.unflatten(0, (self.num_heads, -1))
        if form == "score":
            return torch.einsum("blhk,hkr->blhr", x, weight_HKR)
        y_BLHK = torch.einsum("blhr,hkr->blhk", x, weight_HKR)
        return y_BLHK if self.bias is None else y_BLHK + self.bias.unflatten(0, y_BLHK.shape[2:])


class LatentAttention(nn.Module):
    """(B, L, D) -> (B, L, D), with H heads as wide as attention's.

    head_dim is the width of a query and key head, the rotating part included (half of it, if
    model.position.fraction doesn't say otherwise), and of a value head, so that flash kernels take
    them; DeepSeek's heads have 128 + 64 and 128. Latents have an RMS norm; model.num_kv_heads
    plays no part. The matrices after a latent start with
    the standard deviation that makes keys, values and queries as large as attention's. Doubts: the
    rate of such a matrix (mup) should not fall with the width where the rank stays; yarn's factor
    of scores reaches the rotating part alone.
    """

    def __init__(self, config: ModelConfig, part: Latent):
        super().__init__()
        s, bias, scale = config.sizes, config.bias, scales(config)
        self.num_heads, self.head_dim = s.num_heads, s.head_dim
        self.turning = part.turning_width(config)
        self.still = s.head_dim - self.turning
        self.dropout, self.causal, self.scale = config.dropout, config.causal, scale.attention
        self.dividing: TensorGroup | None = None  # the ranks that divide the heads
        (rank, query_rank), std = part.ranks(config), scale.hidden_std
        self.query_latent = self.query_norm = self.rope_key = None
        if query_rank:
            self.query_latent = Linear(s.width, query_rank, bias, std)
            self.query_norm = RMSNorm(query_rank, config.norm.eps)
        before = query_rank or s.width
        self.query = Linear(before, s.heads_width, bias, std * (s.width / before) ** 0.5)
        self.latent = Linear(s.width, rank, bias, std)
        self.latent_norm = RMSNorm(rank, config.norm.eps)
        if self.turning:
            self.rope_key = Linear(s.width, self.turning, bias, std)
        std = std * (s.width / rank) ** 0.5
        self.key = PerHead(rank, s.num_heads, self.still, bias, std)
        self.value = PerHead(rank, s.num_heads, s.head_dim, bias, std)
        self.output = Linear(s.heads_width, s.width, bias, scale.writing_std)

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        memory, turn = context.memory, context.rotation
        read_BLD = x_BLD
        if self.query_latent is not None and self.query_norm is not None:
            read_BLD = self.query_norm(self.query_latent(x_BLD))
        q_BLHK = self.query(read_BLD).unflatten(-1, (self.num_heads, -1))
        q_BLHK = q_BLHK if turn is None else rotate(q_BLHK, turn)
        latent_BSR = self.latent_norm(self.latent(x_BLD))
        turned_BS1T = None
        if self.rope_key is not None:
            turned_BS1T = self.rope_key(x_BLD)[:, :, None]
            turned_BS1T = turned_BS1T if turn is None else rotate(turned_BS1T, turn)
        if memory is not None:
            latent_BSR = memory.extend("latent", latent_BSR)
            if turned_BS1T is not None:
                turned_BS1T = memory.extend("rope_key", turned_BS1T)
        # With ranks of some head_dim, expanding all keys is more expensive for fewer tokens.
        if memory is not None and x_BLD.shape[1] < self.head_dim:
            # Latents are keys and values of all heads; the two matrices are absorbed.
            turning_BLHT, still_BLHK = q_BLHK.split([self.turning, self.still], -1)
            q_BLHK = torch.cat([turning_BLHT, self.key(still_BLHK, "score")], -1)
            k_BS1K = latent_BS1R = latent_BSR[:, :, None]
            if turned_BS1T is not None:
                k_BS1K = torch.cat([turned_BS1T, latent_BS1R], -1)
            y_BLHK = self.value(self._attend(q_BLHK, k_BS1K, latent_BS1R, context), "each")
        else:
            k_BSHK = self.key(latent_BSR)
            if turned_BS1T is not None:
                k_BSHK = torch.cat([turned_BS1T.expand(-1, -1, self.num_heads, -1), k_BSHK], -1)
            y_BLHK = attended(self, q_BLHK, k_BSHK, self.value(latent_BSR), context)
        return self.output(y_BLHK.flatten(-2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return attend(q, k, v, context.mask, self.scale, self.causal, dropout, self.dividing)
