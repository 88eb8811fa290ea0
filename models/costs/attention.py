"""The costs of softmax attention; its module is models/mixers/attention.py."""

from typing import TYPE_CHECKING

from forescale.models.costs.heads import copies
from forescale.models.costs.record import Part, Shapes, by_output, linear, matrix_flops

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig


def _shapes(config: "ModelConfig") -> Shapes:
    s, found = config.sizes, Shapes()
    for name, outputs in (("query", s.heads_width), ("key", s.kv_width), ("value", s.kv_width)):
        found |= linear(name, s.width, outputs, config.bias or config.qkv_bias)
    found |= linear("output", s.heads_width, s.width, config.bias)
    if config.token_shift:
        found["query_shift.weight"] = (s.heads_width,)
        found |= {f"{name}_shift.weight": (s.kv_width,) for name in ("key", "value")}
    if config.attention_gate != "none":
        found |= linear("gate", s.width, gates(config), config.bias)
    if config.qk_norm:
        over_layer = config.qk_norm_over == "layer"
        widths = (s.heads_width, s.kv_width) if over_layer else (s.head_dim, s.head_dim)
        names = ("query_norm.weight", "key_norm.weight")
        found |= {name: (width,) for name, width in zip(names, widths, strict=True)}
    return found


def gates(config: "ModelConfig") -> int:
    """Return the number of gates of a token: of its heads, or of their channels."""
    return config.sizes.num_heads if config.attention_gate == "head" else config.sizes.heads_width


def scores_flops(config: "ModelConfig", sequence_length: int, causal: bool) -> int:
    """Return the FLOPs of one token's scores, and of their product with the values.

    Each takes 2 * heads_width FLOPs per key. A token attends to L keys, or in a causal model to
    exactly (L + 1) / 2 on average.
    """
    is_half = causal and config.causal
    doubled_keys = sequence_length + 1 if is_half else 2 * sequence_length
    return 2 * config.sizes.heads_width * doubled_keys


def _flops(config: "ModelConfig", sequence_length: int, causal: bool) -> int:
    """Return the FLOPs of the matrices, the scores, and their product with the values."""
    return matrix_flops(_shapes(config)) + scores_flops(config, sequence_length, causal)


def _activation_bytes(config: "ModelConfig", bytes_per_value: int, norm_bytes: int) -> int:
    """Return the bytes of queries and keys (kernel inputs, and inputs of QK-norm), values, output.

    Also the normaliser of the output in fp32, one per head, and what a gate multiplies. Flash
    attention keeps no scores.
    """
    s = config.sizes
    heads = s.heads_width + s.kv_width
    kernel = bytes_per_value * (heads + s.kv_width + s.heads_width) + 4 * s.num_heads
    if config.attention_gate != "none":
        kernel += bytes_per_value * (
            s.heads_width + gates(config)
        )  # the gated output, and the gates
    if config.token_shift:
        kernel += bytes_per_value * (heads + s.kv_width)  # those of the token before
    return kernel + (norm_bytes * heads if config.qk_norm else 0)


def kernel_bytes(config: "ModelConfig", bytes_per_value: int) -> int:
    """Return the bytes of the output and its normaliser; none with dropout, where attention is made
    again (models/block.py, kept_operations)."""
    s = config.sizes
    return 0 if config.dropout else bytes_per_value * s.heads_width + 4 * s.num_heads


def _made_again(config: "ModelConfig", sequence_length: int) -> int:
    return scores_flops(config, sequence_length, False) if config.dropout else 0


def _cache_bytes(config: "ModelConfig", length: int, bytes_per_value: int) -> int:
    """Return the bytes of the keys and values of all tokens, and of a shift's last token."""
    kept = 2 * config.sizes.kv_width * length + shift_values(config)
    return kept * bytes_per_value


def shift_values(config: "ModelConfig") -> int:
    """Return the values of the last token that a cache keeps for a shift of tokens."""
    s = config.sizes
    return s.heads_width + 2 * s.kv_width if config.token_shift else 0


def _divided(config: "ModelConfig") -> dict[str, int]:
    """Return the matrices of the heads. A norm over all heads can't be divided."""
    if config.qk_norm and config.qk_norm_over == "layer":
        return {}
    reading = ("query", "key", "value")
    shifts = (f"{name}_shift" for name in reading)
    return by_output(_shapes(config), (*reading, *shifts, "gate"), "output")


def _exchanged(config: "ModelConfig", ranks: int) -> int:
    """Return the values of queries, keys and values, as often as they are sent, and output."""
    s = config.sizes
    return 2 * s.heads_width + 2 * s.kv_width * copies(s.num_heads, s.num_kv_heads, ranks)


def _folds(config: "ModelConfig", scores: float) -> dict[str, float]:
    """Return the factor of the module that the scores are linear in.

    It is the gain of the queries' norm; without a norm, the queries' matrix and bias. A rotation
    does not change this.
    """
    return {"query_norm" if config.qk_norm else "query": scores}


def plain_bytes(
    config: "ModelConfig", micro_batch: int, length: int, bytes_per_value: int, masked: bool
) -> tuple[int, int]:
    """Return what a layer keeps where scores have biases with a gradient, which no flash kernel of
    a CPU takes: fp32 weights, queries, keys and values of all heads in place of a kernel's."""
    s = config.sizes
    if config.position != "relative":
        return 0, 0
    kernel = bytes_per_value * (s.heads_width + 2 * s.kv_width) + 4 * s.num_heads
    return micro_batch * length * (4 * (3 * s.heads_width + s.num_heads * length) - kernel), 0


ROTATION = (
    "position",
    "rope_theta",
    "rope_scaling",
    "rope_factor",
    "rope_original_length",
    "rope_fraction",
)
_HEADS = ("num_heads", "num_kv_heads", "head_dim", "qk_norm", "qkv_bias")
KEYS = ("qk_norm_over", "attention_gate", "value_residual", "value_embedding", "token_shift")
ATTENTION = Part(
    module="forescale.models.mixers.attention.Attention",
    shapes=_shapes,
    flops=_flops,
    activation_bytes=_activation_bytes,
    kernel_bytes=kernel_bytes,
    made_again=_made_again,
    cache_bytes=_cache_bytes,
    writes=("output",),
    gates=("gate",),
    per_head=("query_norm", "key_norm"),
    folds=_folds,
    divided=_divided,
    heads=("num_heads", "num_kv_heads"),
    keys=KEYS,
    reads=(*_HEADS, *ROTATION),
    plain_bytes=plain_bytes,
    takes_future=True,
    takes_biases=True,
    takes_values=True,
    exchanged=_exchanged,
)
