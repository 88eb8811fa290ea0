"""Self-attention, multi-head or grouped-query, with QK-norm, masks and a cache."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.config import ModelConfig
from forescale.models.init import Linear
from forescale.models.mixers.attention import Attention as Part
from forescale.models.mixers.context import Context, Mask, continued, earlier
from forescale.models.mixers.masks import flex
from forescale.models.mixers.ring import around
from forescale.models.norms import RMSNorm
from forescale.models.parallel.groups import TensorGroup
from forescale.models.parametrization import scales
from forescale.models.positions.position import rotate


def attend(
    q_BLHK: Tensor,
    k_BSGK: Tensor,
    v_BSGV: Tensor,
    mask: Mask | None,
    scale: float,
    causal: bool,
    dropout: float,
    dividing: TensorGroup | None,
) -> Tensor:
    """Return the weighted means of values, (B, L, H, V), by a flash kernel if one takes these.

    mask: see Context; without one, a query sees all keys or, if causal, those up to its own, and
    the last query all. G divides H. dividing: the ranks that have the other heads, whose weights
    are dropped by other draws; None: this rank has all.
    """
    if not isinstance(mask, Tensor | None):
        return flex(q_BLHK, k_BSGK, v_BSGV, mask, scale)
    times = q_BLHK.shape[2] // k_BSGK.shape[2]
    if times > 1 and q_BLHK.is_cuda and (mask is not None or q_BLHK.dtype == torch.float32):
        # No kernel of a GPU that takes masks, or fp32, has fewer heads of keys: torch would hold
        # all scores. It repeats the heads then, too.
        k_BSGK, v_BSGV = _repeated(k_BSGK, times), _repeated(v_BSGV, times)
    kernel: Callable[..., Tensor] = F.scaled_dot_product_attention
    if dropout and dividing is not None:
        kernel = partial(dividing.drawing_apart, kernel)
    y_BHLV = kernel(
        q_BLHK.transpose(1, 2),
        k_BSGK.transpose(1, 2),
        v_BSGV.transpose(1, 2),
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=causal and mask is None and q_BLHK.shape[1] > 1,
        scale=scale,
        enable_gqa=k_BSGK.shape[2] != q_BLHK.shape[2],
    )
    return y_BHLV.transpose(1, 2)


def _repeated(x_BSGK: Tensor, times: int) -> Tensor:
    """Return each head so many times, (B, S, G * times, K); of one head a view."""
    return x_BSGK[:, :, :, None].expand(-1, -1, -1, times, -1).flatten(2, 3)


def attended(
    mixer: Any,
    q_BLHK: Tensor,
    k_BLGK: Tensor,
    v_BLGK: Tensor,
    context: Context,
) -> Tensor:
    """Return what a mixer's _attend returns, (B, L, H, K). Where ranks exchange columns for heads,
    it is given the columns of all of them, of this rank's heads; where a ring of ranks has the
    other columns, they attend by that (ring.py)."""
    group = context.group
    if group is None:
        return mixer._attend(q_BLHK, k_BLGK, v_BLGK, context)

    def attend(q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor) -> Tensor:
        if group.ring.size == 1:
            return mixer._attend(q_BLHK, k_BLGK, v_BLGK, context)
        order = mixer.causal, getattr(mixer, "window", 0), getattr(mixer, "global_tokens", 0)
        return around(q_BLHK, k_BLGK, v_BLGK, context, mixer.scale, order)

    return group.attended(attend, q_BLHK, k_BLGK, v_BLGK)


class TokenShift(nn.Module):
    """(B, L, D) -> x + weight * (x of the previous token), (B, L, D); the weight (D,) begins at 0.

    The first token of a row or of a document has no previous one. name: of the state in a cache.

    With it one layer can find what followed an earlier occurrence of a token, which otherwise takes
    two layers: a token's key depends on the previous token (Olsson et al. 2022, arXiv 2209.11895,
    "smeared keys"). Primer found it useful for queries, keys and values (So et al. 2021, arXiv
    2109.08668, section 4, a depthwise convolution over 3 tokens). Doubt: here it reads 2.
    """

    def __init__(self, width: int, name: str):
        super().__init__()
        self.name = f"{name}_before"
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        memory, length = context.memory, x_BLD.shape[1]
        read_BLD = x_BLD if memory is None else memory.keep_last(self.name, x_BLD, 1)
        if context.group is None:
            before_BLD = earlier(read_BLD, 1)[:, -length:]
        else:
            before_BLD = context.group.earlier(x_BLD, 1)
        if context.starts is not None or context.real is not None:
            before_BLD = before_BLD * continued(x_BLD, context)[..., None]
        return torch.addcmul(x_BLD, self.weight, before_BLD)


def shifted(shift: nn.Module | None, x_BLD: Tensor, context: Context) -> Tensor:
    """Return shift(x, context), or x where there is no shift."""
    return x_BLD if shift is None else shift(x_BLD, context)


class Attention(nn.Module):
    """(B, L, D) -> (B, L, D); H query heads share G key and value heads (Ainslie et al. 2023,
    arXiv 2305.13245). Query, key and value have separate matrices: Muon orthogonalises each.
    QK-norm (Henry et al. 2020, arXiv 2010.04245) comes before the rotation, one weight for all
    heads, as in Qwen3; or one norm over all heads, as in OLMo 2 (2024, arXiv 2501.00656). The gate,
    a sigmoid of the layer's input for each head or channel, multiplies the heads' outputs (Qiu et
    al. 2025, arXiv 2505.06708). With token_shift queries, keys and values have a learned part of
    those of the previous token.

    With value_residual (Zhou et al. 2024, arXiv 2410.17897, section 3, with constant coefficients)
    the first layer returns its values too, (B, L, G, K), and a later one attends to the mean of its
    own values and those, with weights 1 - value_residual and value_residual. A cache keeps the
    mean. Doubt: the paper finds learned weights a little better. With value_embedding the values
    have what each token adds to them (tables.py) before that.
    """

    def __init__(self, config: ModelConfig, part: Part):
        super().__init__()
        s = config.sizes
        self.num_heads, self.num_kv_heads = s.num_heads, s.num_kv_heads
        self.dropout, self.causal = config.dropout, config.causal
        self.value_residual = part.value_residual
        self.dividing: TensorGroup | None = None  # the ranks that divide the heads
        bias, scale = config.bias, scales(config)
        self.scale, std = scale.attention, scale.hidden_std
        if part.score_dim is not None:
            self.scale *= (s.head_dim / part.score_dim) ** 0.5
        reading = bias or part.qkv_bias
        self.query = Linear(s.width, s.heads_width, reading, std)
        self.key = Linear(s.width, s.kv_width, reading, std)
        self.value = Linear(s.width, s.kv_width, reading, std)
        self.output = Linear(s.heads_width, s.width, bias, scale.writing_std)
        self.query_shift = self.key_shift = self.value_shift = None
        if part.token_shift:
            self.query_shift = TokenShift(s.heads_width, "query")
            self.key_shift = TokenShift(s.kv_width, "key")
            self.value_shift = TokenShift(s.kv_width, "value")
        self.gate = None
        if part.gate != "none":
            self.gate = Linear(s.width, part.num_gates(config), bias, std)
        self.query_norm = self.key_norm = None
        self.norms_layer = part.qk_norm == "layer"
        if part.qk_norm != "none":
            widths = (s.heads_width, s.kv_width) if self.norms_layer else (s.head_dim, s.head_dim)
            self.query_norm = RMSNorm(widths[0], config.norm.eps)
            self.key_norm = RMSNorm(widths[1], config.norm.eps)

    def forward(self, x_BLD: Tensor, context: Context) -> Any:
        """Return what each token takes from those that it sees; in the first layer of a value
        residual, with the values."""
        q_BLHK = self._queries(x_BLD, context)
        k_BLGK, v_BLGK = self._keys_and_values(x_BLD, context)
        if context.token_values is not None:
            v_BLGK = v_BLGK + context.token_values.unflatten(-1, (self.num_kv_heads, -1))
        if context.values is not None:
            v_BLGK = v_BLGK.lerp(context.values, self.value_residual)
        turn = context.rotation
        if turn is not None and context.memory is not None and q_BLHK.shape[1] == 1:
            # Of one token, calls cost more than what they compute.
            both = rotate(torch.cat((q_BLHK, k_BLGK), 2), turn)
            q_BLHK, k_BLGK = both.split((q_BLHK.shape[2], k_BLGK.shape[2]), 2)
        elif turn is not None:
            q_BLHK, k_BLGK = rotate(q_BLHK, turn), rotate(k_BLGK, turn)
        y_BLD = self._output(x_BLD, attended(self, q_BLHK, k_BLGK, v_BLGK, context))
        return (y_BLD, v_BLGK) if self.value_residual and context.values is None else y_BLD

    def _queries(self, x_BLD: Tensor, context: Context) -> Tensor:
        """Return the queries of tokens, (B, L, H, K), not rotated."""
        q_BLD = shifted(self.query_shift, self.query(x_BLD), context)
        return self._heads(q_BLD, self.query_norm, self.num_heads)

    def _keys_and_values(self, x_BSD: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Return the keys, not rotated, and the values of tokens, (B, S, G, K) each."""
        k_BSD = shifted(self.key_shift, self.key(x_BSD), context)
        v_BSD = shifted(self.value_shift, self.value(x_BSD), context)
        k_BSGK = self._heads(k_BSD, self.key_norm, self.num_kv_heads)
        return k_BSGK, self._heads(v_BSD, None, self.num_kv_heads)

    def _output(self, x_BLD: Tensor, y_BLHK: Tensor) -> Tensor:
        """Return the output of the layer, (B, L, D), from those of its heads: gated by its input
        x, and through the last matrix."""
        if self.gate is not None:
            y_BLHK = y_BLHK * self.gate(x_BLD).sigmoid().unflatten(-1, (self.num_heads, -1))
        return self.output(y_BLHK.flatten(-2))

    def _heads(self, x_BLD: Tensor, norm: RMSNorm | None, heads: int) -> Tensor:
        """Return (B, L, heads, K), normed over each head or before over all of them."""
        if norm is not None and self.norms_layer:
            return norm(x_BLD).unflatten(-1, (heads, -1))
        x_BLHK = x_BLD.unflatten(-1, (heads, -1))
        return x_BLHK if norm is None else norm(x_BLHK)

    def _attend(self, q_BLHK: Tensor, k_BLGK: Tensor, v_BLGK: Tensor, context: Context) -> Tensor:
        """Return the values, averaged by the scores of the keys that each query sees: (B, L, H, K).

        A subclass that lets a query see fewer keys replaces this method alone.
        """
        mask, memory = context.mask, context.memory
        if memory is not None:
            k_BLGK, v_BLGK = memory.extend("key", k_BLGK), memory.extend("value", v_BLGK)
        dropout = self.dropout if self.training else 0.0
        options = self.scale, self.causal, dropout, self.dividing
        return attend(q_BLHK, k_BLGK, v_BLGK, mask, *options)


class CrossAttention(Attention):
    """(B, T, D) -> (B, T, D): Attention whose keys and values are of context.source, (B, S, D), all
    of which every token sees (Vaswani et al. 2017, section 3.2.3). Keys and queries don't rotate:
    the source has its positions already. A cache keeps the keys and values of the source, which the
    first call makes.
    """

    def __init__(self, config: ModelConfig, part: Part):
        super().__init__(config, part)
        self.causal = False

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        memory = context.memory
        key = value = None
        if memory is not None:
            key, value = memory.get("source_key"), memory.get("source_value")
        if key is None or value is None:
            assert context.source is not None
            key, value = self._keys_and_values(context.source, context)
            if memory is not None:
                memory["source_key"], memory["source_value"] = key, value
        # The source is whole: no column of the decoder's adds to its keys.
        visible = Context(mask=context.source_mask)
        y_BLHK = self._attend(self._queries(x_BLD, context), key, value, visible)
        return self._output(x_BLD, y_BLHK)
