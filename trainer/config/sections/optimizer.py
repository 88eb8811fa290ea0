"""The optimizers: the keys of each, and what the rest of the project must know of it.

To add an optimizer, write its class here with a line in OPTIMIZERS, its `build` function in
engine/optimizers/, and its defaults in conf/optimizer/NAME.yaml. Parameter groups, memory,
communication, FLOPs and checkpoint sizes follow from the class. Invariant: imports no torch,
because plans run on login nodes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from forescale.config.schema import TargetConfig, key

_NEWTON_SCHULZ = 5  # iterations of Muon
_TABLE_RATE, _TABLE_WIDTH = 0.04, 128  # see MuonConfig.for_width
_ANY_RATE = 0.004  # of a model of any width
OTHER_RATES = ("adam_learning_rate", "table_learning_rate", "scalar_learning_rate")


def _orthogonalisation(shape: Sequence[int]) -> float:
    """Return the FLOPs of five iterations of X X^T, its square, and a product with X.

    Source: Jordan et al. 2024, kellerjordan.github.io/posts/muon.
    """
    matrices = shape[0] if len(shape) == 3 else 1  # one for each expert
    rows, columns = shape[len(shape) == 3], 1
    for size in shape[1 + (len(shape) == 3) :]:
        columns *= size
    m, n = min(rows, columns), max(rows, columns)
    return matrices * _NEWTON_SCHULZ * (4 * m * m * n + 2 * m**3)


@dataclass(frozen=True)
class Update:
    """How one group of parameters is updated.

    moments: number of fp32 tensors of a parameter's size in the state. has_counter: whether the
        state has 4 more bytes for each tensor that is updated.
    is_by_matrix: whether an update needs whole matrices, which DeepSpeed does for its Muon alone;
        otherwise each element is updated independently, so ZeRO may cut a parameter anywhere. At
        stages 1 to 3 DeepSpeed keeps the momentum of matrices in the precision of the weights.
    scratch: number of fp32 tensors of a parameter's size that exist during its update alone.
    flops: maps a shape to the FLOPs of one update, without elementwise operations.
    """

    moments: int
    has_counter: bool = False
    is_by_matrix: bool = False
    scratch: int = 0
    flops: Callable[[Sequence[int]], float] = lambda shape: 0.0


ADAM = Update(moments=2, has_counter=True)


@dataclass
class OptimizerConfig:
    """The keys of every optimizer.

    kind: its word. build: the dotted name of a function (config, groups) -> torch.optim.Optimizer;
        groups: dicts in torch's format.
    update: of all parameters except those of `matrices`; the default is that of AdamW.
    matrices: of the hidden matrices, if they are a separate group.
    """

    kind: ClassVar[str]
    build: ClassVar[str]
    update: ClassVar[Update] = ADAM
    matrices: ClassVar[Update | None] = None

    learning_rate: float = key(3e-4, gt=0, common=True)  # peak learning rate
    weight_decay: float = key(0.1, ge=0)  # decoupled weight decay, of matrices only
    # weight decay at the end, as a fraction of weight_decay, which changes linearly from the first
    # step on; 1: it stays
    final_weight_decay: float = key(1.0, ge=0)
    # a weight decays only where its update moves it towards zero; costs a copy of the weights that
    # are updated at once
    cautious_decay: bool = False
    clip: float | None = key(1.0, gt=0)  # maximum norm of the gradient; null: no clipping
    # peak learning rate of embeddings, head and other tables; null: learning_rate, with Muon
    # adam_learning_rate
    table_learning_rate: float | None = key(None, gt=0)
    # peak learning rate of norms, biases and all else of fewer than two dimensions; null: as above
    scalar_learning_rate: float | None = key(None, gt=0)

    @property
    def rate_of_the_rest(self) -> float:
        """The peak learning rate of all parameters that have none of their own."""
        return self.learning_rate

    def scaled(self, factor: float) -> Self:
        """Return it with its peak learning rates times a factor, to three digits."""
        rates = {"learning_rate": self.learning_rate, **self.other_rates}
        scaled: dict[str, Any] = {name: _rounded(rate * factor) for name, rate in rates.items()}
        return replace(self, **scaled)

    @property
    def other_rates(self) -> dict[str, float]:
        """The peak learning rates beside learning_rate that are given, by key."""
        rates = {name: getattr(self, name, None) for name in OTHER_RATES}
        return {name: rate for name, rate in rates.items() if rate is not None}

    def for_width(self, width: int | None) -> Self:
        """Return it with the rates that follow from a model's width; None: it isn't known."""
        return self


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")


@dataclass
class AdamWConfig(OptimizerConfig):
    kind = "adamw"
    build = "forescale.engine.optimizers.adamw.build"

    beta1: float = key(0.9, ge=0, lt=1)  # decay of the mean of the gradients
    beta2: float = key(0.95, ge=0, lt=1)  # decay of the mean of squared gradients
    eps: float = key(1e-8, gt=0)  # added to the root of the mean square


@dataclass
class LionConfig(OptimizerConfig):
    kind = "lion"
    build = "forescale.engine.optimizers.lion.build"
    update = Update(moments=1, scratch=1)

    beta1: float = key(0.9, ge=0, lt=1)  # share of the momentum in an update
    beta2: float = key(0.99, ge=0, lt=1)  # decay of the momentum


@dataclass
class MuonConfig(AdamWConfig):
    """Muon for the hidden matrices, AdamW for all other parameters."""

    kind = "muon"
    build = "forescale.engine.optimizers.muon.build"
    matrices = Update(1, is_by_matrix=True, flops=_orthogonalisation)

    learning_rate: float = key(0.02, gt=0, common=True)  # peak learning rate of the hidden matrices
    momentum: float = key(0.95, ge=0, lt=1)  # decay of the momentum of the hidden matrices
    # peak learning rate of the parameters that AdamW updates, those of tables, head and norms;
    # null: by the model's width, 0.04 up to 128, from there on 5.12 / width
    adam_learning_rate: float | None = key(None, gt=0)

    @property
    def rate_of_the_rest(self) -> float:
        return self.adam_learning_rate or self.learning_rate

    def for_width(self, width: int | None) -> Self:
        """Return it with the adam_learning_rate that follows from the model's width, if it is null.

        Sweeps at widths of 48 to 128 have their optimum at 0.04 to 0.06 (models/RESULTS.md). The
        steps of a head's output grow with the width, so that its rate must fall as 1 / width (Yang
        et al. 2022, arXiv 2203.03466, table 8); at 768 that is 0.0067, and nanochat's head has
        0.004. Doubt: an embedding could learn faster there, and nanochat's does, at 0.2; at 256 a
        short run (0.5M tokens) loses 0.4 % by 0.02 instead of 0.08, within its error.
        """
        if self.adam_learning_rate is not None:
            return self
        rate = _TABLE_RATE * min(1.0, _TABLE_WIDTH / width) if width else _ANY_RATE
        return replace(self, adam_learning_rate=_rounded(rate))


@dataclass
class OwnOptimizerConfig(TargetConfig, OptimizerConfig):
    """A class of the user's own (engine/optimizers/own.py). A plan assumes the state of AdamW."""

    kind = "own"
    build = "forescale.engine.optimizers.own.build"


OPTIMIZERS: dict[str, type[OptimizerConfig]] = {
    cls.kind: cls for cls in (AdamWConfig, MuonConfig, LionConfig, OwnOptimizerConfig)
}
