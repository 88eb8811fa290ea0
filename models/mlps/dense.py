"""The feed-forward MLPs; their module is in dense_module.py."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from forescale.models.part import Mlp, Problem, Shapes, below_1, by_output, linear, matrix_flops

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig


@dataclass(frozen=True)
class Dense(Mlp):
    """Matrices `inner` to mlp_width, an activation function, and a matrix back.

    saved: the tensors as wide as mlp_width that autograd saves per token.
    compiled: of them what a compiled block saves: the products, and what the last matrix takes.
    """

    # Columns of a row that are computed at once, and again in the backward pass; None: all, and
    # nothing again.
    chunk: int | None = field(default=None, metadata={"kind": "numerics"})

    module = "forescale.models.mlps.dense_module.DenseMLP"
    inner: ClassVar[tuple[str, ...]] = ("up",)
    saved = compiled = 2  # before and after the activation function
    writes = ("down",)

    @property
    def columns(self) -> int | None:
        return self.chunk

    def problems(self) -> list[Problem]:
        return below_1(self, "chunk")

    def problems_in(self, sized: "ModelConfig", longest: int | None) -> list[Problem]:
        """Return the problem of chunks with selective checkpointing."""
        if self.chunk is None or sized.activation_checkpointing != "selective":
            return []
        problem = "a chunk computes its products again, which selective checkpointing saves"
        return [("chunk", problem, "leave it out, or give activation_checkpointing=full")]

    def shapes(self, config: "ModelConfig") -> Shapes:
        s, shapes = config.sizes, Shapes()
        for name in self.inner:
            shapes |= linear(name, s.width, s.mlp_width, config.bias)
        return shapes | linear("down", s.mlp_width, s.width, config.bias)

    def activation_bytes(self, config: "ModelConfig", bytes_per_value: int, norm_bytes: int) -> int:
        return 0 if self.chunk else self.saved * bytes_per_value * config.sizes.mlp_width

    def compiled_bytes(self, config: "ModelConfig", bytes_per_value: int) -> int:
        return 0 if self.chunk else self.compiled * bytes_per_value * config.sizes.mlp_width

    def chunk_bytes(self, config: "ModelConfig", bytes_per_value: int) -> int:
        return self.saved * bytes_per_value * config.sizes.mlp_width if self.chunk else 0

    def recomputed(self, config: "ModelConfig", sequence_length: int) -> int:
        return matrix_flops(self.shapes(config)) if self.chunk is not None else 0

    def divided(self, config: "ModelConfig") -> dict[str, int]:
        return by_output(self.shapes(config), self.inner, "down")


@dataclass(frozen=True)
class Gated(Dense):
    """A second matrix makes a gate, which the activation function is applied to."""

    inner = ("gate", "up")
    saved = 4  # gate, its activation, up, and the product of the last two
    compiled = 3
    is_gated = True


@dataclass(frozen=True)
class SwiGLU(Gated):
    """down(silu(gate(x)) * up(x)), Shazeer 2020 (arXiv 2002.05202)."""

    kind = "swiglu"


@dataclass(frozen=True)
class GEGLU(Gated):
    """down(gelu(gate(x)) * up(x)), the same paper; the tanh approximation, as Gemma."""

    kind = "geglu"


@dataclass(frozen=True)
class GELU(Dense):
    """down(gelu(up(x))) with the tanh approximation, as GPT-2 was trained."""

    kind = "gelu"


@dataclass(frozen=True)
class ExactGELU(Dense):
    """GELU with the normal distribution itself (Hendrycks & Gimpel 2016, arXiv 1606.08415), as
    BERT."""

    kind = "gelu_exact"


@dataclass(frozen=True)
class ReLU(Dense):
    """down(relu(up(x))), Vaswani et al. 2017, T5."""

    kind = "relu"
    saved = 1  # after the activation: the gradient needs nothing else

    def compiled_bytes(self, config: "ModelConfig", bytes_per_value: int) -> int:
        """Return the bytes of the result, and of a mask."""
        return (bytes_per_value + 1) * config.sizes.mlp_width


@dataclass(frozen=True)
class SquaredReLU(Dense):
    """down(relu(up(x))^2), So et al. 2021 (Primer, arXiv 2109.08668)."""

    kind = "relu2"
