"""Products of few rows with large matrices, for decoding on a CPU: the matrices in another layout.

The cost of a step of decoding there is reading the matrices. MKL, with which torch multiplies in
fp32, reads a matrix with more rows than columns about twice as fast by columns where there is one
row of inputs, and oneDNN's packed form is 1.5 to 3 times as fast for several (AMD EPYC, one
thread; tests/benchmarks/bench_generate.py measures the whole).

Invariant: outputs are those of torch.nn.functional.linear but for rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.heads.vocabulary import Vocabulary
from forescale.models.init import Linear

_LEAST = 1 << 16  # numbers of a matrix; with smaller ones laid out, a step is no faster
# torch.compile freezes models with these two; torch has no public name for a packed matrix.
_PACK, _TIMES = "_reorder_linear_weight", "_linear_pointwise"


class PackedProduct:
    """x (..., in), weight (out, in) -> (..., out), without gradients. It holds a packed copy of the
    weight, with which it is called."""

    def __init__(self, weight: Tensor):
        self._packed = getattr(torch.ops.mkldnn, _PACK)(weight.detach(), None)
        self._times: Any = getattr(torch.ops.mkldnn, _TIMES)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the product."""
        if x.numel() == x.shape[-1]:  # of one row the plain form is as fast or faster
            return F.linear(x, weight)
        y: Tensor = self._times(x, self._packed, None, "none", [], "")
        return y


@torch.no_grad()
def prepare(model: nn.Module) -> nn.Module:
    """Return the model, prepared for decoding alone: large matrices on a CPU get another layout and
    a packed copy, which doubles their memory. Nothing else changes."""
    can_pack = all(hasattr(torch.ops.mkldnn, name) for name in (_PACK, _TIMES))
    can_pack = can_pack and torch.backends.mkldnn.is_available()
    # Not subclasses: they multiply in ways of their own. A table that only embeds isn't multiplied.
    layers: list[Any] = [m for m in model.modules() if type(m) in (Linear, Vocabulary)]
    for layer in (m for m in layers if getattr(m, "makes_logits", True) and m.product is None):
        weight = layer.weight
        is_large = weight.numel() >= _LEAST
        if not is_large or weight.device.type != "cpu" or weight.dtype != torch.float32:
            continue
        if can_pack:
            layer.product = PackedProduct(weight)
        if weight.shape[0] > weight.shape[1]:
            weight.data = weight.t().contiguous().t()
    return model
