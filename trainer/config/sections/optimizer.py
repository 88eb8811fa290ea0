"""The specs of the optimizers, which the rest of the project reads, and the config section.

To add an optimizer, write a file in engine/optimizers/ with a `build` function, its spec in
OPTIMIZERS here, and its defaults in conf/optimizer/NAME.yaml. Parameter groups, memory,
communication, FLOPs and checkpoint sizes follow from the spec. Invariant: imports no torch, because
plans run on login nodes.
"""

# ruff: noqa: RUF009 (key makes fields, as dataclasses.field does)

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from forescale.config.job import Problems
from forescale.config.schema import TargetConfig, key
from forescale.config.suggest import nearest_first

_NEWTON_SCHULZ = 5  # iterations of Muon
_TABLE_RATE, _TABLE_WIDTH = 0.04, 128  # see OptimizerConfig.for_width
_ANY_RATE = 0.004  # of a model of any width


def _no_flops(shape: Sequence[int]) -> float:
    return 0.0


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
    flops: maps a shape to the FLOPs of one update, without elementwise operations.
    """

    moments: int
    has_counter: bool = False
    is_by_matrix: bool = False
    flops: Callable[[Sequence[int]], float] = _no_flops


@dataclass(frozen=True)
class OptimizerSpec:
    """What the rest of the project must know about an optimizer.

    build: the dotted name of a function (config, groups) -> torch.optim.Optimizer; groups: dicts
        in torch's format.
    update: of all parameters except those of `matrices`.
    matrices: of the hidden matrices, if they are a separate group.
    needs: required keys of the section, with a suggested value; other optimizers refuse these keys.
    reduce_scatter: whether ZeRO stage 3 may reduce-scatter its gradients.
    """

    build: str
    update: Update
    matrices: Update | None = None
    needs: tuple[tuple[str, float], ...] = ()
    reduce_scatter: bool = True


ADAM = Update(moments=2, has_counter=True)
OPTIMIZERS = {
    "adamw": OptimizerSpec("forescale.engine.optimizers.adamw.build", ADAM),
    "lion": OptimizerSpec("forescale.engine.optimizers.lion.build", Update(moments=1)),
    "muon": OptimizerSpec(
        "forescale.engine.optimizers.muon.build",
        ADAM,
        matrices=Update(1, is_by_matrix=True, flops=_orthogonalisation),
        needs=(("adam_learning_rate", _ANY_RATE), ("momentum", 0.95)),
        reduce_scatter=False,  # DeepSpeed refuses Muon with it
    ),
    # A plan assumes that a class of the user's own has the same state as AdamW.
    "own": OptimizerSpec("forescale.engine.optimizers.own.build", ADAM),
}


@dataclass
class OptimizerConfig:
    """The config section `optimizer`."""

    kind: str = key("adamw", f"the update rule: {', '.join(OPTIMIZERS)}")
    target: str | None = key(
        None,
        "own: your class, such as mypackage.MyOptimizer, a torch.optim.Optimizer that updates each "
        "element alone (see engine/optimizers/own.py)",
        name="_target_",
    )
    arguments: dict[str, Any] = key({}, "own: keyword arguments of your class")
    learning_rate: float = key(
        3e-4, "peak learning rate; muon: of the hidden matrices", gt=0, common=True
    )
    adam_learning_rate: float | None = key(
        None,
        "muon: peak learning rate of the parameters that AdamW updates, those of tables, head and "
        "norms; null: by the model's width, 0.04 up to 128, from there on 5.12 / width",
        gt=0,
    )
    beta1: float = key(0.9, "decay of the mean of the gradients (AdamW, Lion)", ge=0, lt=1)
    beta2: float = key(
        0.95,
        "AdamW: decay of the mean of squared gradients; Lion: decay of the momentum",
        ge=0,
        lt=1,
    )
    eps: float = key(1e-8, "AdamW: added to the root of the mean square", gt=0)
    weight_decay: float = key(0.1, "decoupled weight decay, of matrices only", ge=0)
    final_weight_decay: float = key(
        1.0,
        "weight decay at the end, as a fraction of weight_decay, which changes linearly from the "
        "first step on; 1: it stays",
        ge=0,
    )
    momentum: float | None = key(None, "muon: decay of the momentum", ge=0, lt=1)
    clip: float | None = key(1.0, "maximum norm of the gradient; null: no clipping", gt=0)

    def for_width(self, width: int | None) -> Self:
        """Return it with Muon's adam_learning_rate, if that is to follow from the model's width.
        width: None for a model whose width isn't known.

        Sweeps at widths of 48 to 128 have their optimum at 0.04 to 0.06 (models/README.md). The
        steps of a head's output grow with the width, so that its rate must fall as 1 / width (Yang
        et al. 2022, arXiv 2203.03466, table 8); at 768 that is 0.0067, and nanochat's head has
        0.004. Doubt: an embedding could learn faster there, and nanochat's does, at 0.2; at 256 a
        short run (0.5M tokens) loses 0.4 % by 0.02 instead of 0.08, within its error.
        """
        spec = OPTIMIZERS.get(self.kind)  # problems() reports one that doesn't exist
        if self.adam_learning_rate is not None or not (spec and spec.matrices):
            return self
        rate = _TABLE_RATE * min(1.0, _TABLE_WIDTH / width) if width else _ANY_RATE
        return replace(self, adam_learning_rate=float(f"{rate:.3g}"))

    @property
    def spec(self) -> OptimizerSpec:
        """The spec of the chosen optimizer."""
        return OPTIMIZERS[self.kind]

    def problems(self) -> Problems:
        """Return the broken rules as (key, what, todo)."""
        if self.kind not in OPTIMIZERS:
            near = ", ".join(nearest_first(self.kind, OPTIMIZERS))
            return [("kind", f"{self.kind!r} is not an optimizer", f"choose one of {near}")]
        if self.kind == "own":
            return TargetConfig(self.target or "").problems()
        found: Problems = []
        if self.target:
            todo = "choose optimizer=own, or remove the key"
            found.append(("_target_", f"{self.kind} has no such setting", todo))
        known = {name: like for spec in OPTIMIZERS.values() for name, like in spec.needs}
        needed = {name for name, _ in self.spec.needs}
        for name, like in known.items():
            is_given = getattr(self, name) is not None
            if name in needed and not is_given:
                todo = f"set optimizer.{name}, such as {like}"
                found.append((name, f"{self.kind} needs a value", todo))
            elif name not in needed and is_given:
                todo = "remove the key, or choose optimizer=muon"
                found.append((name, f"{self.kind} has no such setting", todo))
        return found
