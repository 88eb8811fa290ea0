"""Gated DeltaNet as a mixer; its module is in gated_deltanet_module.py.

The FLOPs are those of the chunked form (delta_rule.py). K is the width of a query or key head, V
that of a value head, C the tokens of a chunk.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from forescale.models.part import Mixer, Problem, Shapes, below_1, linear, matrix_flops

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

CHUNK = 64  # the most tokens of a chunk: as in the authors' kernels (flash-linear-attention)
_STATE = 4  # bytes per value of states, decays and writing strengths, in fp32


def chunks(length: int) -> tuple[int, int]:
    """Return the number of chunks of a sequence and their size: equal, so that few are padded."""
    num = -(-length // CHUNK)
    return num, -(-length // num)


@dataclass(frozen=True)
class GatedDeltaNet(Mixer):
    """Linear attention by the gated delta rule."""

    value_dim: int | None = None  # width of a value head; None: that of a head
    conv: int = 4  # tokens that the short convolution reads

    kind = "gated_deltanet"
    module = "forescale.models.mixers.gated_deltanet_module.GatedDeltaNet"
    writes = ("output",)
    gates = ("decay", "beta")
    per_head = ("output_norm",)
    reads = ("num_heads", "head_dim")
    takes_mask = False
    passes_state = True

    def problems(self) -> list[Problem]:
        return below_1(self, "value_dim", "conv")

    def problems_in(self, sized: "ModelConfig", longest: int | None) -> list[Problem]:
        """Return the problem of a convolution that is longer than the context."""
        if longest is None or self.conv <= max(longest, GatedDeltaNet.conv):
            return []
        problem = f"{self.conv} tokens are more than the context's {longest}"
        return [("conv", problem, "give fewer")]

    def widths(self, config: "ModelConfig") -> tuple[int, int, int]:
        """Return the number of heads, K and V."""
        s = config.sizes
        return s.num_heads, s.head_dim, self.value_dim or s.head_dim

    def convolved(self, config: "ModelConfig") -> int:
        """Return the width of queries, keys and values together, which the convolution takes."""
        heads, K, V = self.widths(config)
        return heads * (2 * K + V)

    def shapes(self, config: "ModelConfig") -> Shapes:
        width, (heads, K, V) = config.sizes.width, self.widths(config)
        shapes: Shapes = {"log_rate": (heads,), "decay_bias": (heads,)}
        outputs = {"query": heads * K, "key": heads * K, "value": heads * V, "gate": heads * V}
        for name, size in outputs.items():
            shapes |= linear(name, width, size, config.bias)
        shapes |= linear("decay", width, heads, bias=False)
        shapes |= linear("beta", width, heads, config.bias)
        shapes["convolution.weight"] = (self.convolved(config), 1, self.conv)
        shapes["output_norm.weight"] = (V,)
        return shapes | linear("output", heads * V, width, config.bias)

    def flops(self, config: "ModelConfig", sequence_length: int, causal: bool) -> int:
        """Return the FLOPs of the matrices and of the chunks' products, rounded up to whole ones.

        A chunk makes scores of keys with keys and of queries with keys, applies the inverse of a
        triangular matrix to keys and values, and the scores to the values; and three products with
        the state. causal: without the zeros of triangular matrices, without the state before the
        first chunk and the one after the last. Finding the inverse is no matrix product for torch's
        counter; nor is the convolution.
        """
        heads, K, V = self.widths(config)
        num, C = chunks(sequence_length)
        if causal:
            below, lower = C * (C - 1), C * (C + 1)  # two FLOPs for each entry of a half
            of_chunks = num * (below * K + lower * (2 * K + 2 * V)) + (num - 1) * C * 6 * K * V
        else:
            of_chunks = num * C * (2 * C * (3 * K + 2 * V) + 6 * K * V)
        return matrix_flops(self.shapes(config)) - (-heads * of_chunks // sequence_length)

    def selective_flops(self, config: "ModelConfig", sequence_length: int) -> int:
        """Return the FLOPs of the chunks' products."""
        return self.flops(config, sequence_length, False) - matrix_flops(self.shapes(config))

    def recomputed(self, config: "ModelConfig", sequence_length: int) -> int:
        """Return the FLOPs of all of a chunk's products that come before its outputs, less one that
        the backward pass saves because keys' scores with keys are symmetric."""
        heads, K, V = self.widths(config)
        num, C = chunks(sequence_length)
        again = num * C * (2 * C * (2 * K + V) + 2 * K * V)
        return -(-heads * again // sequence_length)

    def activation_bytes(self, config: "ModelConfig", bytes_per_value: int, norm_bytes: int) -> int:
        """Return the bytes of what enters and leaves the convolution, of the decays and writing
        strengths, of the states between chunks, and of the gated norm (its input, its output, the
        gate before and after silu, and their product)."""
        heads, K, V = self.widths(config)
        num, _ = chunks(config.sizes.max_sequence_length)
        states = -(-num * K * V // config.sizes.max_sequence_length)
        gated = heads * V * (norm_bytes + 4 * bytes_per_value)
        return 2 * bytes_per_value * self.convolved(config) + heads * _STATE * (4 + states) + gated

    def cache_bytes(self, config: "ModelConfig", length: int, bytes_per_value: int) -> int:
        """Return the bytes of one state a head, and of the last inputs of the convolution."""
        heads, K, V = self.widths(config)
        last = min(length, self.conv - 1)
        return _STATE * heads * K * V + bytes_per_value * last * self.convolved(config)
