"""The costs of an LSTM; its module is models/mixers/lstm.py."""

from typing import TYPE_CHECKING

from forescale.models.costs.record import Part, Shapes, linear, matrix_flops

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

_GATES = ("recurrence.weight_ih_l0", "recurrence.weight_hh_l0")  # four gates in each


def _shapes(config: "ModelConfig") -> Shapes:
    width = config.sizes.width
    found: Shapes = dict.fromkeys(_GATES, (4 * width, width))
    found |= {f"recurrence.bias_{kind}_l0": (4 * width,) for kind in ("ih", "hh")}
    return found | linear("output", width, width, config.bias)


def _flops(config: "ModelConfig", sequence_length: int, causal: bool) -> int:
    """Return the FLOPs of the gates' matrices and the output, for the first state (0) too."""
    return matrix_flops(_shapes(config))


def _activation_bytes(config: "ModelConfig", bytes_per_value: int, norm_bytes: int) -> int:
    """Return the bytes of four gates, cell state, its tanh, and the state, twice: as what the next
    token reads, and as the output matrix's input.

    That is the plain form's. On a CPU, rows without documents and padding are computed by oneDNN,
    which keeps more for itself: 16 values in fp32, 22 in bf16. cuDNN's are not measured.
    """
    return 8 * bytes_per_value * config.sizes.width


def _selected_bytes(config: "ModelConfig", bytes_per_value: int) -> int:
    """Return the bytes of the output: the gates are made again."""
    return bytes_per_value * config.sizes.width


def _made_again(config: "ModelConfig", sequence_length: int) -> int:
    """Return the FLOPs of the gates' matrices."""
    return matrix_flops({name: _shapes(config)[name] for name in _GATES})


def _cache_bytes(config: "ModelConfig", length: int, bytes_per_value: int) -> int:
    """Return the bytes of state and cell state, whatever the length."""
    return 2 * bytes_per_value * config.sizes.width


LSTM = Part(
    module="forescale.models.mixers.lstm.LSTM",
    shapes=_shapes,
    flops=_flops,
    activation_bytes=_activation_bytes,
    selected_bytes=_selected_bytes,
    made_again=_made_again,
    cache_bytes=_cache_bytes,
    writes=("output",),
    not_muon=_GATES,
    takes_mask=False,
)
