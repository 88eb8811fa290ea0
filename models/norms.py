"""RMSNorm and LayerNorm. Both compute in fp32 for every dtype of input and weight."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.choices import Layer
from forescale.models.config import ModelConfig


class RMSNorm(nn.Module):
    """(..., D) -> (..., D), divided by the root mean square (Zhang & Sennrich 2019, 1910.07467)."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class LayerNorm(nn.Module):
    """(..., D) -> (..., D), normalised by mean and variance (Ba et al. 2016, arXiv 1607.06450)."""

    def __init__(self, width: int, eps: float, bias: bool, gain: bool = True):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if gain else None
        self.bias = nn.Parameter(torch.zeros(width)) if bias and gain else None
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        gain, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), x.shape[-1:], gain, bias, self.eps).to(x.dtype)


def make_norm(config: ModelConfig) -> nn.Module:
    """Return the norm of the residual stream, (..., D) -> (..., D)."""
    if isinstance(config.norm, Layer):
        return LayerNorm(config.sizes.width, config.norm.eps, config.bias, config.norm.gain)
    return RMSNorm(config.sizes.width, config.norm.eps)
