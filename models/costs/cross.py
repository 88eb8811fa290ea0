"""The costs of attention to the encoder's output; its module is models/mixers/cross.py."""

from typing import TYPE_CHECKING

from forescale.models.costs.attention import ATTENTION, gates, scores_flops
from forescale.models.costs.record import Part, Shapes, matrix_flops, outputs

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

_OF_SOURCE = ("key.", "value.", "key_norm.")  # parameters that act on source tokens


def _split(config: "ModelConfig") -> tuple[Shapes, Shapes]:
    """Return the parameters that act on the decoder's tokens, and those on the source's."""
    every = ATTENTION.shapes(config)
    source = {name: shape for name, shape in every.items() if name.startswith(_OF_SOURCE)}
    return {name: shape for name, shape in every.items() if name not in source}, source


def _flops(config: "ModelConfig", source_length: int, causal: bool) -> int:
    """Return the FLOPs of a decoder's token, which attends to all tokens of the source."""
    return matrix_flops(_split(config)[0]) + scores_flops(config, source_length, False)


def _source_flops(config: "ModelConfig") -> int:
    return matrix_flops(_split(config)[1])


def _activation_bytes(config: "ModelConfig", bytes_per_value: int, norm_bytes: int) -> int:
    """Return the bytes of a decoder's token: the queries (and the input of their norm), the output
    and its normaliser."""
    s = config.sizes
    found = 2 * bytes_per_value * s.heads_width + 4 * s.num_heads
    if config.attention_gate != "none":
        found += bytes_per_value * (s.heads_width + gates(config))
    return found + (norm_bytes * s.heads_width if config.qk_norm else 0)


def _source_bytes(config: "ModelConfig", bytes_per_value: int, norm_bytes: int) -> int:
    """Return the bytes of a source's token: keys (and the input of their norm), values."""
    norm = norm_bytes if config.qk_norm else 0
    return config.sizes.kv_width * (2 * bytes_per_value + norm)


def _selected_bytes(config: "ModelConfig", bytes_per_value: int) -> int:
    results = bytes_per_value * outputs(_split(config)[0])
    return results + ATTENTION.kernel_bytes(config, bytes_per_value)


def _selected_source(config: "ModelConfig", bytes_per_value: int) -> int:
    return bytes_per_value * outputs(_split(config)[1])


def _made_again(config: "ModelConfig", source_length: int) -> int:
    return scores_flops(config, source_length, False) if config.dropout else 0


CROSS = Part(
    module="forescale.models.mixers.cross.CrossAttention",
    shapes=ATTENTION.shapes,
    flops=_flops,
    activation_bytes=_activation_bytes,
    source_flops=_source_flops,
    source_bytes=_source_bytes,
    selected_bytes=_selected_bytes,
    selected_source=_selected_source,
    made_again=_made_again,
    cache_bytes=ATTENTION.cache_bytes,
    writes=ATTENTION.writes,
    gates=("gate",),
    per_head=ATTENTION.per_head,
    folds=ATTENTION.folds,
    divided=ATTENTION.divided,
    heads=ATTENTION.heads,
    keys=ATTENTION.keys,
    reads=ATTENTION.reads,
)
