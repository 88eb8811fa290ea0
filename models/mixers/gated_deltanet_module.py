"""Linear attention by the gated delta rule as a mixer: Gated DeltaNet (Yang, Kautz and Hatamizadeh
2024, arXiv 2412.06464, figure 1; Qwen3-Next has it in three of four layers).

Queries, keys and values pass a short convolution and silu, the rule (delta_rule.py) makes outputs
of them, and a norm, a gate and a matrix follow. A head keeps one matrix of state, whatever the
length.

Invariant: convolution and state read nothing of another document or of padding.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.config import ModelConfig
from forescale.models.init import Linear
from forescale.models.mixers.context import Context, continued, earlier
from forescale.models.mixers.delta_rule import DeltaRule, delta_rule
from forescale.models.mixers.gated_deltanet import GatedDeltaNet as Part
from forescale.models.norms import RMSNorm
from forescale.models.parametrization import scales


class Convolved(torch.autograd.Function):
    """silu of a sum over the last tokens, each channel for itself.

    It keeps its input alone. Documents make a mask for each lag, which nn.Conv1d can't take, and
    autograd would keep a copy of the input for each.
    """

    @staticmethod
    def forward(ctx: Any, x_BLD: Tensor, weight_DW: Tensor, keep_BL1: Tensor) -> Tensor:
        """Return (B, L, D). weight: the last column is that of the token itself; keep (B or 1, L,
        1): 0 where the token before isn't visible."""
        ctx.save_for_backward(x_BLD, weight_DW, keep_BL1)
        return F.silu(_sum_of_lags(x_BLD, weight_DW, keep_BL1)).to(x_BLD.dtype)

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """Return the gradients of x and weight."""
        x_BLD, weight_DW, keep_BL1 = ctx.saved_tensors
        y_BLD = _sum_of_lags(x_BLD, weight_DW, keep_BL1)
        gate_BLD = torch.sigmoid(y_BLD)
        d_y = grad[0].to(y_BLD.dtype) * gate_BLD * (1 + y_BLD * (1 - gate_BLD))
        d_x, d_weight = torch.zeros_like(y_BLD), []
        for lag, seen_BL1 in enumerate(_visible(keep_BL1, weight_DW.shape[1], y_BLD.dtype)):
            masked = d_y * seen_BL1
            d_weight.append((masked * earlier(x_BLD, lag)).sum((0, 1)))
            onward = F.pad(masked, (0, 0, 0, lag))[:, lag:]
            d_x = d_x + weight_DW[:, -1 - lag].to(y_BLD.dtype) * onward
        d_weight_DW = torch.stack(d_weight[::-1], 1)
        return d_x.to(x_BLD.dtype), d_weight_DW.to(weight_DW.dtype), None


def _sum_of_lags(x_BLD: Tensor, weight_DW: Tensor, keep_BL1: Tensor) -> Tensor:
    """Return the sum before silu, in fp32 or more."""
    precise = torch.promote_types(x_BLD.dtype, torch.float32)
    y_BLD, weight_DW = torch.zeros_like(x_BLD, dtype=precise), weight_DW.to(precise)
    for lag, seen_BL1 in enumerate(_visible(keep_BL1, weight_DW.shape[1], precise)):
        y_BLD = y_BLD + weight_DW[:, -1 - lag] * (earlier(x_BLD, lag) * seen_BL1)
    return y_BLD


def _visible(keep_BL1: Tensor, count: int, dtype: torch.dtype) -> list[Tensor]:
    """Return, for lags from 0 to count - 1, if the token so much earlier is visible, (B, L, 1)."""
    visible = [torch.ones_like(keep_BL1, dtype=dtype)]
    for lag in range(1, count):
        visible.append(visible[-1] * earlier(keep_BL1, lag - 1))
    return visible


class ShortConvolution(nn.Module):
    """(B, L, D) -> (B, L, D): Convolved. Its weight has the shape and start of an nn.Conv1d's."""

    def __init__(self, width: int, lags: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width, 1, lags))
        nn.init.uniform_(self.weight, -(lags**-0.5), lags**-0.5)

    def forward(self, x_BLD: Tensor, keep_BL: Tensor) -> Tensor:
        return Convolved.apply(x_BLD, self.weight[:, 0], keep_BL[..., None])


class GatedDeltaNet(nn.Module):
    """(B, L, D) -> (B, L, D), with H heads, whose queries and keys are K wide and values V.

    The decay of a head at a token is exp(-rate * softplus(decay(x) + decay_bias)), with rate =
    exp(log_rate). At first, rates are uniform from 0 to 16 and softplus(decay_bias) log-uniform
    from 0.001 to 0.1, as in Mamba-2 and in the authors' code: heads remember from one token to
    thousands. The rates' lower end is 0.01, so that no logarithm is infinite. Positions and QK-norm
    play no part, and all heads have keys and values of their own.
    """

    def __init__(self, config: ModelConfig, part: Part):
        super().__init__()
        width, (H, K, V), scale = config.sizes.width, part.widths(config), scales(config)
        self.num_heads, self.lags = H, part.conv
        self.split = (H * K, H * K, H * V)
        bias, std = config.bias, scale.hidden_std
        self.log_rate = nn.Parameter(torch.empty(H).uniform_(0.01, 16).log())
        step = torch.empty(H).uniform_(math.log(0.001), math.log(0.1)).exp()
        self.decay_bias = nn.Parameter(step.expm1().log())  # softplus of it is the step
        self.query = Linear(width, H * K, bias, std)
        self.key = Linear(width, H * K, bias, std)
        self.value = Linear(width, H * V, bias, std)
        self.gate = Linear(width, H * V, bias, std)
        self.decay = Linear(width, H, False, std)
        self.beta = Linear(width, H, bias, std)
        self.convolution = ShortConvolution(sum(self.split), self.lags)
        self.output_norm = RMSNorm(V, config.norm.eps)
        self.output = Linear(H * V, width, bias, scale.writing_std)

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        B, L, _ = x_BLD.shape
        memory, group = context.memory, context.group
        mixed = torch.cat([self.query(x_BLD), self.key(x_BLD), self.value(x_BLD)], -1)
        if memory is not None and self.lags > 1:
            mixed = memory.keep_last("convolved", mixed, self.lags - 1)
        elif group is not None and self.lags > 1:
            mixed = torch.cat([group.beside(mixed, self.lags - 1)[:, 0], mixed], 1)
        keep = continued(mixed, context, mixed.shape[1] - L)
        mixed, keep = self.convolution(mixed, keep)[:, -L:], keep[:, -L:]
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in mixed.split(self.split, -1))
        step = F.softplus(self.decay(x_BLD).float() + self.decay_bias.float())
        inputs = (
            q,
            k,
            v,
            -self.log_rate.float().exp() * step,
            self.beta(x_BLD).float().sigmoid(),
            keep,
        )
        if memory is None:
            o_BLHV = DeltaRule.apply(*inputs, group)
        else:  # decoding has no gradients, and begins where the last call ended
            o_BLHV, _, memory["state"] = delta_rule(*inputs, memory.get("state"))
        gate = self.gate(x_BLD).view(B, L, self.num_heads, -1)
        return self.output((self.output_norm(o_BLHV) * F.silu(gate)).flatten(-2))
