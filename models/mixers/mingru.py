"""A gated linear recurrence as a mixer; its module is in mingru_module.py."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from forescale.models.part import Mixer, Shapes, linear

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

_STATE = 4  # bytes per value of a state, in fp32


@dataclass(frozen=True)
class MinGRU(Mixer):
    """A gated linear recurrence, whose FLOPs are its matrices': the scan has no matrix product."""

    kind = "mingru"
    module = "forescale.models.mixers.mingru_module.MinGRU"
    writes = ("output",)
    takes_mask = False
    passes_state = True

    def shapes(self, config: "ModelConfig") -> Shapes:
        width = config.sizes.width
        shapes: Shapes = {"log_memory": (width,)}
        for name in ("gate", "value", "output"):
            shapes |= linear(name, width, width, config.bias)
        return shapes

    def activation_bytes(self, config: "ModelConfig", bytes_per_value: int, norm_bytes: int) -> int:
        """Return the bytes of logits, values and states, and of the output matrix's input where the
        states are not of its dtype."""
        rounded = bytes_per_value if bytes_per_value < _STATE else 0
        return config.sizes.width * (2 * bytes_per_value + _STATE + rounded)

    def cache_bytes(self, config: "ModelConfig", length: int, bytes_per_value: int) -> int:
        """Return the bytes of one state, whatever the length."""
        return _STATE * config.sizes.width
