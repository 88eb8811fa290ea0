"""The costs of Gated DeltaNet; its module is models/mixers/gated_deltanet.py.

The FLOPs are those of the chunked form (models/mixers/delta_rule.py). K is the width of a query or
key head, V that of a value head, C the tokens of a chunk.
"""

from typing import TYPE_CHECKING

from forescale.models.costs.record import Part, Problem, Shapes, below_1, linear, matrix_flops

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

CHUNK = 64  # the most tokens of a chunk: as in the authors' kernels (flash-linear-attention)
_STATE = 4  # bytes per value of states, decays and writing strengths, in fp32


def chunks(length: int) -> tuple[int, int]:
    """Return the number of chunks of a sequence and their size: equal, so that few are padded."""
    num = -(-length // CHUNK)
    return num, -(-length // num)


def widths(config: "ModelConfig") -> tuple[int, int, int]:
    """Return the number of heads, K and V."""
    s = config.sizes
    return s.num_heads, s.head_dim, config.delta_value_dim or s.head_dim


def _convolved(config: "ModelConfig") -> int:
    """Return the width of queries, keys and values together, which the convolution takes."""
    heads, K, V = widths(config)
    return heads * (2 * K + V)


def _shapes(config: "ModelConfig") -> Shapes:
    width, (heads, K, V) = config.sizes.width, widths(config)
    found: Shapes = {"log_rate": (heads,), "decay_bias": (heads,)}
    outputs = {"query": heads * K, "key": heads * K, "value": heads * V, "gate": heads * V}
    for name, size in outputs.items():
        found |= linear(name, width, size, config.bias)
    found |= linear("decay", width, heads, bias=False) | linear("beta", width, heads, config.bias)
    found["convolution.weight"] = (_convolved(config), 1, config.delta_conv)
    found["output_norm.weight"] = (V,)
    return found | linear("output", heads * V, width, config.bias)


def _flops(config: "ModelConfig", sequence_length: int, causal: bool) -> int:
    """Return the FLOPs of the matrices and of the chunks' products, rounded up to whole ones.

    A chunk makes scores of keys with keys and of queries with keys, applies the inverse of a
    triangular matrix to keys and values, and the scores to the values; and three products with the
    state. causal: without the zeros of triangular matrices, without the state before the first
    chunk and the one after the last. Finding the inverse is no matrix product for torch's counter;
    nor is the convolution.
    """
    heads, K, V = widths(config)
    num, C = chunks(sequence_length)
    if causal:
        below, lower = C * (C - 1), C * (C + 1)  # two FLOPs for each entry of a half
        of_chunks = num * (below * K + lower * (2 * K + 2 * V)) + (num - 1) * C * 6 * K * V
    else:
        of_chunks = num * C * (2 * C * (3 * K + 2 * V) + 6 * K * V)
    return matrix_flops(_shapes(config)) - (-heads * of_chunks // sequence_length)


def _made_again(config: "ModelConfig", sequence_length: int) -> int:
    """Return the FLOPs of the chunks' products."""
    return _flops(config, sequence_length, False) - matrix_flops(_shapes(config))


def _recomputed(config: "ModelConfig", sequence_length: int) -> int:
    """Return the FLOPs that the backward pass makes again: all of a chunk's products that come
    before its outputs, less one that it saves because keys' scores with keys are symmetric."""
    heads, K, V = widths(config)
    num, C = chunks(sequence_length)
    again = num * C * (2 * C * (2 * K + V) + 2 * K * V)
    return -(-heads * again // sequence_length)


def _activation_bytes(config: "ModelConfig", bytes_per_value: int, norm_bytes: int) -> int:
    """Return the bytes of what enters and leaves the convolution, of the decays and writing
    strengths, of the states between chunks, and of the gated norm (its input, its output, the gate
    before and after silu, and their product)."""
    heads, K, V = widths(config)
    num, _ = chunks(config.sizes.max_sequence_length)
    states = -(-num * K * V // config.sizes.max_sequence_length)
    gated = heads * V * (norm_bytes + 4 * bytes_per_value)
    return 2 * bytes_per_value * _convolved(config) + heads * _STATE * (4 + states) + gated


def _cache_bytes(config: "ModelConfig", length: int, bytes_per_value: int) -> int:
    """Return the bytes of one state a head, and of the last inputs of the convolution."""
    heads, K, V = widths(config)
    last = min(length, config.delta_conv - 1)
    return _STATE * heads * K * V + bytes_per_value * last * _convolved(config)


def _problems(c: "ModelConfig", full: "ModelConfig", longest: int | None) -> list[Problem]:
    found = below_1(c, *_KEYS)
    if longest and c.delta_conv > max(longest, type(c).delta_conv):
        problem = f"{c.delta_conv} tokens are more than the context's {longest}"
        found.append(("delta_conv", problem, "give fewer"))
    return found


_KEYS = ("delta_value_dim", "delta_conv")
GATED_DELTANET = Part(
    module="forescale.models.mixers.gated_deltanet.GatedDeltaNet",
    shapes=_shapes,
    flops=_flops,
    recomputed=_recomputed,
    made_again=_made_again,
    activation_bytes=_activation_bytes,
    cache_bytes=_cache_bytes,
    writes=("output",),
    gates=("decay", "beta"),
    per_head=("output_norm",),
    keys=_KEYS,
    reads=("num_heads", "head_dim"),
    problems=_problems,
    takes_mask=False,
)
