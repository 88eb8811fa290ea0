"""Products of few rows with large matrices, for decoding on a CPU: the matrices in another layout.

The cost of a step of decoding there is reading the matrices. MKL, with which torch multiplies in
fp32, reads a matrix with more rows than columns about twice as fast by columns where there is one
row of inputs, and oneDNN's packed form is 1.5 to 3 times as fast for several (AMD EPYC, one
thread; tests/benchmarks/bench_generate.py measures the whole).

With int8 both sides of a large product are rounded to 8 bits, the weights for each output and the
inputs for each row: a quarter of the bytes are read, and an AVX-512 or AMX unit multiplies four
times as many numbers at once. Each row has a scale of its own, so it doesn't depend on the others
of its batch.

Invariant: outputs are those of torch.nn.functional.linear but for rounding: of fp32, or of 8 bits.
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
_LEAST_INT8 = 1 << 18  # numbers of a matrix; with smaller ones rounding the inputs costs more
_MOST_INT8, _ZERO = 127.0, 128  # the largest rounded number; what stands for 0 of the inputs


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


class Int8Product:
    """The same product with weights and inputs of 8 bits."""

    def __init__(self, weight: Tensor):
        weight = weight.detach().float()
        self._scale_O = (weight.abs().amax(1) / _MOST_INT8).clamp(min=torch.finfo().tiny)
        rounded = (weight / self._scale_O[:, None]).round().to(torch.int8)
        self._packed = torch.ops.onednn.qlinear_prepack(rounded, None)
        self._zeros_O = torch.zeros(len(weight), dtype=torch.int64)

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the product; `weight` isn't read."""
        largest = x.abs().amax(-1, keepdim=True).clamp(min=torch.finfo().tiny)
        # Without AMX oneDNN multiplies signed inputs by its reference loop, 200 times as slow.
        rounded = ((x / largest * _MOST_INT8).round() + _ZERO).to(torch.uint8)
        scale, weights = 1 / _MOST_INT8, (self._packed, self._scale_O, self._zeros_O, None)
        out: tuple[Any, ...] = (1.0, 0, torch.float32, "none", [], "")
        y: Tensor = torch.ops.onednn.qlinear_pointwise(rounded, scale, _ZERO, *weights, *out)
        return y * largest


def has_int8() -> bool:
    """True if this build of torch multiplies 8 bits on a CPU."""
    return hasattr(torch.ops.onednn, "qlinear_pointwise") and torch.backends.mkldnn.is_available()


@torch.no_grad()
def prepare(model: nn.Module, int8: bool = False) -> nn.Module:
    """Return the model, prepared for decoding alone: large matrices on a CPU get another layout and
    a packed copy, which doubles their memory; with `int8` one of 8 bits, a quarter more. Nothing
    else changes."""
    can_pack = all(hasattr(torch.ops.mkldnn, name) for name in (_PACK, _TIMES))
    can_pack = can_pack and torch.backends.mkldnn.is_available()
    # Not subclasses: they multiply in ways of their own. A table that only embeds isn't multiplied.
    layers: list[Any] = [m for m in model.modules() if type(m) in (Linear, Vocabulary)]
    for layer in (m for m in layers if getattr(m, "makes_logits", True) and m.product is None):
        weight = layer.weight
        is_large = weight.numel() >= _LEAST
        if not is_large or weight.device.type != "cpu" or weight.dtype != torch.float32:
            continue
        if int8 and weight.numel() >= _LEAST_INT8:
            layer.product = Int8Product(weight)
            continue
        if can_pack:
            layer.product = PackedProduct(weight)
        if weight.shape[0] > weight.shape[1]:
            weight.data = weight.t().contiguous().t()
    return model
