"""The parameters of a job without their values: names, shapes, optimizer groups.

Invariant: `parameters` have the order of the forward pass, the parameters of `groups` the order of
the engine's memory layout. Imports no torch.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

from forescale.config.mesh import Mesh
from forescale.config.train import TrainJob
from forescale.engine.optim import Group, divided_groups, parameter_groups
from forescale.models.adapters import is_adapter, with_adapters
from forescale.models.config import ModelConfig
from forescale.models.flops import divided, matrices, stacked
from forescale.models.parametrization import Factors, factors


@dataclass(frozen=True)
class Parameter:
    """A parameter without its values."""

    name: str
    shape: tuple[int, ...]
    requires_grad: bool = True  # False: it is frozen

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @cached_property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Inventory:
    """The parameters of a job, frozen ones included.

    parameters: in the order of the forward pass. groups: of the optimizer, each with its trained
    parameters in the order of the memory layout. experts: names of parameters with a matrix for
    each expert. cut: name -> dimension of parameters that ranks divide (engine.tensor_parallel).
    borrowed: tables that a stage of a pipeline reads and another one trains. parts: the inventories
    of some ranks, computed once.
    """

    parameters: list[Parameter]
    groups: list[Group]
    experts: frozenset[str] = frozenset()
    cut: Mapping[str, int] = field(default_factory=dict)
    borrowed: list[Parameter] = field(default_factory=list)
    parts: dict[Any, "Inventory"] = field(default_factory=dict, repr=False)

    @property
    def numel(self) -> int:
        """Number of elements of all parameters."""
        return sum(p.numel for p in self.parameters)

    @property
    def trained(self) -> list[Parameter]:
        """The parameters with a gradient."""
        return [p for p in self.parameters if p.requires_grad]

    @property
    def num_trained(self) -> int:
        """Number of elements of the trained parameters."""
        return sum(p.numel for p in self.trained)

    @property
    def num_frozen(self) -> int:
        """Number of elements of the frozen parameters."""
        return self.numel - self.num_trained

    def of_rank(self, mesh: Mesh) -> "Inventory":
        """Return the parameters of one rank where ranks divide experts or matrices. Group.parts is
        then the number of parts of the matrices, or of the experts."""
        if mesh.experts == mesh.tensor == 1:
            return self
        if (key := (mesh.tensor, mesh.experts)) not in self.parts:
            self.parts[key] = self._of_rank(mesh)
        return self.parts[key]

    def _of_rank(self, mesh: Mesh) -> "Inventory":
        dims = {**self.cut, **dict.fromkeys(self.experts, 0)}
        parts = {n: mesh.experts if n in self.experts else mesh.tensor for n in dims}

        def divided(p: Parameter) -> Parameter:
            if p.name not in dims:
                return p
            shape = [n // parts[p.name] if i == dims[p.name] else n for i, n in enumerate(p.shape)]
            return replace(p, shape=tuple(shape))

        groups = [
            replace(
                g, params=[*map(divided, g.params)], parts=g.parts if g.parts > 1 else mesh.tensor
            )
            for g in divided_groups(self.groups, self.experts, mesh.experts)
        ]
        places = {p.name: i for i, p in enumerate(self.parameters)}
        for group in groups:
            if group.update.is_by_matrix:  # in the order of the parts' shapes
                group.params.sort(key=lambda p: places[p.name])
                group.params.sort(key=lambda p: p.shape, reverse=True)
                group.names = [p.name for p in group.params]
        every = ([*map(divided, of)] for of in (self.parameters, self.borrowed))
        parameters, tables = every
        return Inventory(parameters, groups, self.experts, self.cut, tables)


def inventory(
    job: TrainJob,
    parameters: Sequence[Parameter] | None = None,
    muon: Collection[str] | None = None,
) -> Inventory:
    """Return the Inventory of a job. The model sizes are known.

    For a model class of the user, pass its `parameters`, and as `muon` the names of those that Muon
    updates, if the class defines them.
    """
    by_name: dict[str, Factors] = {}
    experts: set[str] = set()
    cut: dict[str, int] = {}
    if isinstance(job.model, ModelConfig):
        by_name = factors(job.model)
        rank = job.lora.rank
        every = with_adapters(job.model, rank, job.lora.targets).items()
        parameters = [Parameter(n, shape, not rank or is_adapter(n)) for n, shape in every]
        muon = matrices(job.model)
        experts = stacked(job.model)
        cut = divided(job.model, job.engine.tensor_parallel)
    assert parameters is not None
    groups = parameter_groups([(p.name, p) for p in parameters], job.optimizer, muon, by_name)
    for group in groups:
        if group.update.is_by_matrix:  # DeepSpeed's Muon class sorts them like this
            group.params.sort(key=lambda p: p.shape, reverse=True)
            group.names = [p.name for p in group.params]
    return Inventory(list(parameters), groups, frozenset(experts), cut)
