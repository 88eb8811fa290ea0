"""Norms, heads and parametrisations: the keys of each kind. Imports no torch."""

import math
from dataclasses import dataclass
from typing import Literal

from forescale.models.part import Part, Problem, below_1, registry


@dataclass(frozen=True)
class Norm(Part):
    """The norms of the residual stream, of queries and of keys."""

    eps: float = 1e-6  # added to the variance
    # Before each part of a block, after it (OLMo 2), or both; residual: after its sum with the
    # residual stream (Vaswani et al. 2017, BERT), without a norm at the end; parallel: before both
    # parts, which read the same stream (GPT-NeoX); shared: these read the same norm (Phi).
    placement: Literal["pre", "post", "sandwich", "residual", "parallel", "shared"] = "pre"
    embedding: bool = False  # a norm after the embedding and its positions, as BERT

    def problems(self) -> list[Problem]:
        return [] if self.eps > 0 else [("eps", "must be above 0", "give a positive number")]


@dataclass(frozen=True)
class RMS(Norm):
    """Divides by the root mean square."""

    kind = "rmsnorm"


@dataclass(frozen=True)
class Layer(Norm):
    """Normalises by mean and variance."""

    gain: bool = True  # a learned gain of each channel (with bias=true, a bias too); OLMo 1: false

    kind = "layernorm"


@dataclass(frozen=True)
class Head(Part):
    """What makes the logits."""

    softcap: float = 0.0  # logits = cap * tanh(logits / cap), as Gemma 2 (30); 0: off
    bias: bool = False  # a bias of each logit, as Phi; dense always has it

    @property
    def has_bias(self) -> bool:
        """True if logits have a bias."""
        return self.bias or self.kind == "dense"

    def problems(self) -> list[Problem]:
        if 0 <= self.softcap < math.inf:
            return []
        return [("softcap", "must be a number, not negative", "give 0 to switch it off")]


@dataclass(frozen=True)
class LinearHead(Head):
    """One matrix."""

    kind = "linear"


@dataclass(frozen=True)
class DenseHead(Head):
    """BERT's: a dense layer, GELU and a norm before the matrix, and a bias of each logit."""

    kind = "dense"


@dataclass(frozen=True)
class Standard(Part):
    """No rule for other widths and depths."""

    kind = "standard"


@dataclass(frozen=True)
class Mup(Part):
    """One learning rate for all widths."""

    base_width: int = 256  # width for which optimizer.learning_rate was tuned

    kind = "mup"

    def problems(self) -> list[Problem]:
        return below_1(self, "base_width")


@dataclass(frozen=True)
class CompleteP(Mup):
    """One learning rate for all widths and depths."""

    base_depth: int = 4  # num_layers for which optimizer.learning_rate was tuned

    kind = "completep"

    def problems(self) -> list[Problem]:
        return super().problems() + below_1(self, "base_depth")


NORMS = registry(RMS, Layer)
HEADS = registry(LinearHead, DenseHead)
PARAMETRIZATIONS = registry(Standard, Mup, CompleteP)
