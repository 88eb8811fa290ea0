"""The module of the feed-forward MLPs (dense.py)."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from forescale.models.config import ModelConfig
from forescale.models.init import Linear
from forescale.models.mlps.dense import Dense
from forescale.models.parametrization import scales


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


_gelu_tanh = partial(F.gelu, approximate="tanh")
# Of the gate, or of the only inner matrix.
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": _gelu_tanh,
    "gelu": _gelu_tanh,
    "gelu_exact": F.gelu,
    "relu": F.relu,
    "relu2": _relu2,
}


class DenseMLP(nn.Module):
    """(..., D) -> (..., D) through mlp_width, or `width` if it is given: shared experts.

    With part.chunk so many columns of (B, L, D) are computed at a time; not of shared experts.
    """

    def __init__(self, config: ModelConfig, part: Dense, width: int | None = None):
        super().__init__()
        s, scale = config.sizes, scales(config)
        self.activation, inner = _ACTIVATIONS[part.kind], width or s.mlp_width
        self.gate = None
        if part.is_gated:
            self.gate = Linear(s.width, inner, config.bias, scale.hidden_std)
        self.chunk = part.chunk if width is None else None
        self.up = Linear(s.width, inner, config.bias, scale.hidden_std)
        self.down = Linear(inner, s.width, config.bias, scale.writing_std)

    def forward(self, x_BLD: Tensor) -> Tensor:
        if self.chunk is None or x_BLD.shape[1] <= self.chunk:
            return self._computed(x_BLD)
        # Of all columns only inputs and outputs are kept: what is inside, the widest of a block, is
        # computed again, a chunk at a time (ALST: Bekman et al. 2025, arXiv 2506.13996, 3.1.1).
        parts = (
            checkpoint(self._computed, part, use_reentrant=False, preserve_rng_state=False)
            for part in x_BLD.split(self.chunk, 1)
        )
        return torch.cat([*parts], 1)

    def _computed(self, x_BLD: Tensor) -> Tensor:
        up_BLF = self.up(x_BLD)
        if self.gate is None:
            return self.down(self.activation(up_BLF))
        return self.down(self.activation(self.gate(x_BLD)) * up_BLF)
