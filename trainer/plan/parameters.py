"""The trained parameters of a job without their values: names, shapes, optimizer groups.

Invariant: `parameters` have the order of the forward pass, the parameters of `groups` the order of
the engine's memory layout. Imports no torch.
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
        """Number of dimensions."""
        return len(self.shape)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Inventory:
    """The trained parameters of a job.

    parameters: in the order of the forward pass. groups: of the optimizer, each with its parameters
    in the order of the memory layout.
    """

    parameters: list[Parameter]
    groups: list[Group]

    @property
    def numel(self) -> int:
        """Number of elements of all parameters."""
        return sum(p.numel for p in self.parameters)


def inventory(
    job: TrainJob,
    parameters: Sequence[Parameter] | None = None,
    muon: Collection[str] | None = None,
) -> Inventory:
    """Return the Inventory of a job whose model sizes are known.

    For a class of the user's own, give its `parameters`, and in `muon` the names of those that Muon
    updates, if the class defines them.
    """
    by_name: dict[str, Factors] = {}
    if isinstance(job.model, ModelConfig):
        by_name = factors(job.model)
        parameters = [Parameter(name, shape) for name, shape in shapes(job.model).items()]
        muon = matrices(job.model)
    assert parameters is not None
    groups = parameter_groups([(p.name, p) for p in parameters], job.optimizer, muon, by_name)
    for group in groups:
        if group.update.is_by_matrix:  # DeepSpeed's Muon class sorts them like this
            group.params.sort(key=lambda p: p.shape, reverse=True)
    return Inventory(list(parameters), groups)
