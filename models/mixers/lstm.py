"""An LSTM as a mixer; its module is in lstm_module.py."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from forescale.models.part import Mixer, Shapes, linear, matrix_flops

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig

_GATES = ("recurrence.weight_ih_l0", "recurrence.weight_hh_l0")  # four gates in each


@dataclass(frozen=True)
class LSTM(Mixer):
    """A layer of torch.nn.LSTM."""

    kind = "lstm"
    module = "forescale.models.mixers.lstm_module.LSTM"
    writes = ("output",)
    not_muon = _GATES
    takes_mask = False
    passes_state = True

    def shapes(self, config: "ModelConfig") -> Shapes:
        width = config.sizes.width
        shapes: Shapes = dict.fromkeys(_GATES, (4 * width, width))
        shapes |= {f"recurrence.bias_{kind}_l0": (4 * width,) for kind in ("ih", "hh")}
        return shapes | linear("output", width, width, config.bias)

    def activation_bytes(self, config: "ModelConfig", bytes_per_value: int, norm_bytes: int) -> int:
        """Return the bytes of four gates, cell state, its tanh, and the state, twice: as what the
        next token reads, and as the output matrix's input.

        That is the plain form's. On a CPU, rows without documents and padding are computed by
        oneDNN, which saves more: 16 values in fp32, 22 in bf16. cuDNN's are not measured.
        """
        return 8 * bytes_per_value * config.sizes.width

    def selected_bytes(self, config: "ModelConfig", bytes_per_value: int) -> int:
        """Return the bytes of the output: the gates are computed again."""
        return bytes_per_value * config.sizes.width

    def selective_flops(self, config: "ModelConfig", sequence_length: int) -> int:
        """Return the FLOPs of the gates' matrices."""
        return matrix_flops({name: self.shapes(config)[name] for name in _GATES})

    def cache_bytes(self, config: "ModelConfig", length: int, bytes_per_value: int) -> int:
        """Return the bytes of state and cell state, whatever the length."""
        return 2 * bytes_per_value * config.sizes.width
