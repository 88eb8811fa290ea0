"""What a job trains, without a value of it: names, shapes, and the optimizer's groups.

Invariant: the order is the engine's: that of the forward in `parameters`, that of the layout in
`groups`. Imports no torch.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from math import prod

from forescale.config.train import TrainJob
from forescale.engine.optim import Group, parameter_groups
from forescale.models.config import ModelConfig
from forescale.models.flops import matrices, shapes
from forescale.models.parametrization import Factors, factors


@dataclass(frozen=True)
class Parameter:
    """A parameter without its values."""

    name: str
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def numel(self) -> int:
        return prod(self.shape)


@dataclass(frozen=True)
class Inventory:
    """What a job trains. parameters: in the order of the forward; groups: the optimizer's, their
    parameters in the order in which they are laid out."""

    parameters: list[Parameter]
    groups: list[Group]

    @property
    def numel(self) -> int:
        return sum(p.numel for p in self.parameters)


def inventory(
    job: TrainJob,
    parameters: Sequence[Parameter] | None = None,
    muon: Collection[str] | None = None,
) -> Inventory:
    """Of a settled job of ours; or of `parameters` of another model and the names of those that
    Muon takes, where it says them."""
    by_name: dict[str, Factors] = {}
    if isinstance(job.model, ModelConfig):
        by_name = factors(job.model)
        parameters = [Parameter(name, shape) for name, shape in shapes(job.model).items()]
        muon = matrices(job.model)
    assert parameters is not None
    groups = parameter_groups([(p.name, p) for p in parameters], job.optimizer, muon, by_name)
    for group in groups:
        if group.use_muon:  # as the Muon class sorts them
            group.params.sort(key=lambda p: p.shape, reverse=True)
    return Inventory(list(parameters), groups)
