"""The trained parameters of a job without their values: names, shapes, optimizer groups.

Invariant: `parameters` have the order of the forward pass, the parameters of `groups` the order of
the engine's memory layout. Imports no torch.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from math import prod

from forescale.config.train import TrainJob
from forescale.engine.optim import Group, divided_groups, parameter_groups
from forescale.models.config import ModelConfig
from forescale.models.flops import matrices, shapes, stacked
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
    in the order of the memory layout. experts: names of those that have a matrix for each expert.
    """

    parameters: list[Parameter]
    groups: list[Group]
    experts: frozenset[str] = frozenset()

    @property
    def numel(self) -> int:
        """Number of elements of all parameters."""
        return sum(p.numel for p in self.parameters)

    def of_rank(self, parts: int) -> "Inventory":
        """Return what one of `parts` ranks has that divide the experts."""
        if parts == 1:
            return self

        def own(p: Parameter) -> Parameter:
            experts, *matrix = p.shape
            return Parameter(p.name, (experts // parts, *matrix)) if p.name in self.experts else p

        groups = [
            replace(group, params=[*map(own, group.params)])
            for group in divided_groups(self.groups, self.experts, parts)
        ]
        return Inventory([*map(own, self.parameters)], groups, self.experts)


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
    experts: set[str] = set()
    if isinstance(job.model, ModelConfig):
        by_name = factors(job.model)
        parameters = [Parameter(name, shape) for name, shape in shapes(job.model).items()]
        muon = matrices(job.model)
        experts = stacked(job.model)
    assert parameters is not None
    groups = parameter_groups([(p.name, p) for p in parameters], job.optimizer, muon, by_name)
    for group in groups:
        if group.update.is_by_matrix:  # DeepSpeed's Muon class sorts them like this
            group.params.sort(key=lambda p: p.shape, reverse=True)
            group.names = [p.name for p in group.params]
    return Inventory(list(parameters), groups, frozenset(experts))
