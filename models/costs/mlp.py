"""The costs of the feed-forward parts; their module is models/mlp.py."""

from typing import TYPE_CHECKING

from forescale.models.costs.record import Part, Shapes, by_output, linear, matrix_flops

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig


def _part(inner: tuple[str, ...], kept: int) -> Part:
    """Return the record of an MLP with `inner` matrices to mlp_width and one matrix back.

    kept: number of tensors of size mlp_width that autograd keeps per token.
    """

    def shapes(config: "ModelConfig") -> Shapes:
        s, found = config.sizes, Shapes()
        for name in inner:
            found |= linear(name, s.width, s.mlp_width, config.bias)
        return found | linear("down", s.mlp_width, s.width, config.bias)

    def flops(config: "ModelConfig", sequence_length: int, causal: bool) -> int:
        return matrix_flops(shapes(config))

    def activation_bytes(config: "ModelConfig", bytes_per_value: int, norm_bytes: int) -> int:
        return 0 if config.mlp_chunk else kept * bytes_per_value * config.sizes.mlp_width

    def chunk_bytes(config: "ModelConfig", bytes_per_value: int) -> int:
        return kept * bytes_per_value * config.sizes.mlp_width if config.mlp_chunk else 0

    def recomputed(config: "ModelConfig", sequence_length: int) -> int:
        return flops(config, sequence_length, False) if config.mlp_chunk is not None else 0

    def divided(config: "ModelConfig") -> dict[str, int]:
        return by_output(shapes(config), inner, "down")

    return Part(
        module="forescale.models.mlp.MLP",
        shapes=shapes,
        flops=flops,
        activation_bytes=activation_bytes,
        chunk_bytes=chunk_bytes,
        recomputed=recomputed,
        writes=("down",),
        divided=divided,
        keys=("mlp_chunk",),
        is_gated="gate" in inner,
    )


SWIGLU = _part(("gate", "up"), kept=4)  # gate, silu(gate), up, and the product of the last two
GEGLU = _part(("gate", "up"), kept=4)
GELU = _part(("up",), kept=2)  # before and after the activation function
RELU = _part(("up",), kept=1)  # after it: the gradient needs no more
RELU2 = _part(("up",), kept=2)
