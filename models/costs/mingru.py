"""The costs of a gated linear recurrence; its module is models/mixers/mingru.py."""

from typing import TYPE_CHECKING

from forescale.models.costs.record import Part, Shapes, linear, matrix_flops

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

_STATE = 4  # bytes per value of a state, in fp32


def _shapes(config: "ModelConfig") -> Shapes:
    width = config.sizes.width
    found: Shapes = {"log_memory": (width,)}
    for name in ("gate", "value", "output"):
        found |= linear(name, width, width, config.bias)
    return found


def _flops(config: "ModelConfig", sequence_length: int, causal: bool) -> int:
    """Return the FLOPs of the three matrices: those of the scan are in no matrix product."""
    return matrix_flops(_shapes(config))


def _activation_bytes(config: "ModelConfig", bytes_per_value: int, norm_bytes: int) -> int:
    """Return the bytes of logits, values and states, and of the output matrix's input where the
    states are not of its dtype."""
    rounded = bytes_per_value if bytes_per_value < _STATE else 0
    return config.sizes.width * (2 * bytes_per_value + _STATE + rounded)


def _cache_bytes(config: "ModelConfig", length: int, bytes_per_value: int) -> int:
    """Return the bytes of one state, whatever the length."""
    return _STATE * config.sizes.width


MINGRU = Part(
    module="forescale.models.mixers.mingru.MinGRU",
    shapes=_shapes,
    flops=_flops,
    activation_bytes=_activation_bytes,
    cache_bytes=_cache_bytes,
    writes=("output",),
    takes_mask=False,
)
