"""Positions: the keys of each kind, and those of the scaling of rotary ones. Imports no torch."""

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from forescale.models.part import Part, Problem, below_1, part_of, prefixed, registry

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig


@dataclass(frozen=True)
class Scaling(Part):
    """The scaling of rotary positions for a longer context (positions/rope_scaling.py)."""

    factor: float = 1.0  # new length / original length

    def problems(self) -> list[Problem]:
        """Return the problem of a factor that doesn't lengthen the context."""
        if 1 < self.factor < math.inf:
            return []
        problem = f"{self.factor} does not lengthen the context"
        return [("factor", problem, "give new length / original length, above 1")]


@dataclass(frozen=True)
class Unscaled(Part):
    """Rotary positions as they are."""

    kind = "none"


@dataclass(frozen=True)
class Linear(Scaling):
    """All frequencies are divided."""

    kind = "linear"


@dataclass(frozen=True)
class Ntk(Scaling):
    """A larger base."""

    kind = "ntk"


@dataclass(frozen=True)
class FromLength(Scaling):
    """A scaling that depends on the original length."""

    original_length: int | None = None  # None: max_sequence_length / factor

    def problems(self) -> list[Problem]:
        return super().problems() + below_1(self, "original_length")

    def original(self, config: "ModelConfig") -> float:
        """Return the sequence length before scaling. Raises ValueError like config.resolved()."""
        return self.original_length or config.sizes.max_sequence_length / self.factor


@dataclass(frozen=True)
class Yarn(FromLength):
    """Slow frequencies are divided, scores grow."""

    kind = "yarn"


@dataclass(frozen=True)
class Llama3(FromLength):
    """Slow frequencies are divided."""

    kind = "llama3"


SCALINGS = registry(Unscaled, Linear, Ntk, Yarn, Llama3)


@dataclass(frozen=True)
class Rotary(Part):
    """Queries and keys rotate."""

    theta: float = 10_000.0  # Su et al. 2021, arXiv 2104.09864
    # The part of each head that rotates; the rest has no position. None: all, with mixer=latent
    # half.
    fraction: float | None = None
    # Stretches the positions over a longer context than the model was trained for.
    scaling: Part = field(default_factory=Unscaled, metadata={"kinds": SCALINGS})

    kind = "rotary"

    def __post_init__(self) -> None:
        object.__setattr__(self, "scaling", part_of(SCALINGS, self.scaling))

    def problems(self) -> list[Problem]:
        problems: list[Problem] = []
        if not self.theta > 0:
            problems.append(("theta", "must be above 0", "give a positive number"))
        elif self.scaling.kind == "yarn" and self.theta <= 1:
            problems.append(("theta", "yarn needs more than 1", "give more, such as 10000"))
        if self.fraction is not None and not 0 < self.fraction <= 1:
            problems.append(("fraction", "is not a part of a head", "give above 0 to 1"))
        return problems + prefixed("scaling", self.scaling.problems())

    def sized(self, sized: "ModelConfig") -> "Rotary":
        """Return the part with the fraction of each head that rotates."""
        turning = min(mixer.turning for mixer in sized.mixers_used)
        return replace(self, fraction=self.fraction or turning)


@dataclass(frozen=True)
class Alibi(Part):
    """Biases of scores that grow with the distance."""

    kind = "alibi"


@dataclass(frozen=True)
class Relative(Part):
    """T5's learned biases of scores, by distance."""

    buckets: int = 32  # entries of a head's table of distances (T5: 32)
    distance: int = 128  # from here on all distances share an entry (T5: 128)

    kind = "relative"

    def problems_in(self, sized: "ModelConfig", longest: int | None) -> list[Problem]:
        """Return the problem of a table that can't be split into near and far."""
        sees_all = sized.has_encoder or not sized.causal
        count, least = self.buckets, 4 if sees_all else 2
        if count < least or count % least:
            problem = f"{count} entries can't be halved into near and far"
            problem += ", before and behind" if sees_all else ""
            return [("buckets", problem, f"give a multiple of {least}")]
        if self.distance <= count // 2:
            problem = f"{self.distance} leaves no far distances for half of {count} entries"
            return [("distance", problem, f"give more than {count // 2}")]
        return []


@dataclass(frozen=True)
class Learned(Part):
    """A learned vector for each position."""

    kind = "learned"


@dataclass(frozen=True)
class Sinusoidal(Part):
    """Fixed sines and cosines, added to the embedding."""

    kind = "sinusoidal"


@dataclass(frozen=True)
class NoPosition(Part):
    """No position but the order that a causal mask shows."""

    kind = "none"


POSITIONS = registry(Rotary, Alibi, Relative, Learned, Sinusoidal, NoPosition)
