"""The ranks of a job as a grid: which ranks share a micro-batch, and which share a matrix.

Invariant: the batch is divided by the number of groups that read different windows (`data`), the
states of a parameter (ZeRO) by the number of ranks with the same parameters (`states`). `world`
counts processes.
"""

from dataclasses import dataclass
from math import gcd, lcm
from typing import TYPE_CHECKING

from forescale.config.job import ProblemIterator
from forescale.config.sections.optimizer import OwnOptimizerConfig
from forescale.models.config import ModelConfig
from forescale.models.parallel.division import of_columns, of_matrices, pieces

if TYPE_CHECKING:
    from forescale.config.train import TrainJob


@dataclass(frozen=True)
class Mesh:
    """`world` ranks. They are in `pipeline` stages of consecutive ranks, each with other blocks of
    the model; a rank stands for the same windows and parts as those at its place in other stages.

    A stage has groups of `near` = context * sequence * tensor consecutive ranks. The size of a
    group divides the ranks of a stage; a group lies inside a node if its size divides the node's
    ranks. All ranks of a group read the same windows; each group of a stage reads other windows.
    In a group, each set of `tensor` consecutive ranks holds the same columns of the windows, and
    each of them a part of the matrices; the other ranks hold different columns: `sequence` sets
    exchange heads, and `context` sets of these pass keys and values around.

    Each set of `experts` consecutive ranks divides the experts of a layer; `experts` divides the
    ranks of a stage. The tokens of these ranks may come from the same windows or from others.

    The states of parameters are divided among `shard` ranks that have the same parameters (0: among
    all); each such group has a copy of the states.
    """

    world: int
    sequence: int = 1
    tensor: int = 1
    experts: int = 1
    context: int = 1
    pipeline: int = 1
    shard: int = 0

    @property
    def near(self) -> int:
        """The number of ranks of a stage that are fed the same windows."""
        return self.context * self.sequence * self.tensor

    @property
    def together(self) -> int:
        """The number of ranks that are fed the same windows, in all stages."""
        return self.pipeline * self.near

    @property
    def columns(self) -> int:
        """The number of ranks that divide the columns of a window."""
        return self.context * self.sequence

    @property
    def pieces(self) -> int:
        """The number of equal parts of successive columns that a window must have."""
        return pieces(self.sequence, self.context)

    @property
    def exchanges(self) -> bool:
        """True if ranks exchange something inside of a stage of the model."""
        return max(self.near, self.experts) > 1

    @property
    def in_stage(self) -> int:
        """The number of ranks of a stage of the pipeline."""
        return self.world // self.pipeline

    @property
    def data(self) -> int:
        """The number of groups that are fed different windows."""
        return self.in_stage // self.near

    @property
    def states(self) -> int:
        """The number of ranks that have the same parameters."""
        return self.in_stage // self.tensor

    @property
    def shards(self) -> int:
        """The number of ranks that the states of a parameter are divided among."""
        return self.shard or self.states

    def stage_of(self, rank: int) -> int:
        """Return the stage of the pipeline that a rank is in."""
        return rank // self.in_stage

    def _stage(self, rank: int, first: int, step: int) -> list[int]:
        """Return each step-th rank of a rank's stage, from its first-th on."""
        start = self.stage_of(rank) * self.in_stage
        return [*range(start + first, start + self.in_stage, step)]

    def pipeline_peers(self, rank: int) -> list[int]:
        """Return the ranks at the place of a rank in each stage, in the order of the stages."""
        return [*range(rank % self.in_stage, self.world, self.in_stage)]

    def sequence_peers(self, rank: int) -> list[int]:
        """Return the ranks that exchange heads of the windows of a rank, itself included, in the
        order of the columns."""
        size = self.sequence * self.tensor
        first = rank - rank % size + rank % self.tensor
        return [*range(first, first + size, self.tensor)]

    def columns_peers(self, rank: int) -> list[int]:
        """Return the ranks that divide the columns of the windows of a rank, itself included, in
        the order of their places."""
        first = rank - rank % self.near + rank % self.tensor
        return [*range(first, first + self.near, self.tensor)]

    def context_peers(self, rank: int) -> list[int]:
        """Return the ranks that pass the keys and values of a rank around, itself included, in the
        order of the columns."""
        first = rank - rank % self.near + rank % (self.sequence * self.tensor)
        return [*range(first, first + self.near, self.sequence * self.tensor)]

    def tensor_peers(self, rank: int) -> list[int]:
        """Return the ranks that divide the matrices with a rank, itself included, in the order of
        the parts."""
        first = rank - rank % self.tensor
        return [*range(first, first + self.tensor)]

    def data_peers(self, rank: int) -> list[int]:
        """Return the ranks of a stage that hold the same columns of other windows, and the same
        parts of the matrices, itself included."""
        return self._stage(rank, rank % self.near, self.near)

    def state_peers(self, rank: int) -> list[int]:
        """Return the ranks that have the same parts of the same matrices, itself included."""
        return self._stage(rank, rank % self.tensor, self.tensor)

    def shard_peers(self, rank: int) -> list[int]:
        """Return the ranks that have one copy of the states between them, a rank among them."""
        peers = self.state_peers(rank)
        first = peers.index(rank) // self.shards * self.shards
        return peers[first : first + self.shards]

    def replica_peers(self, rank: int) -> list[int]:
        """Return the ranks that have the same part of the states, one of each copy, a rank among
        them."""
        peers = self.state_peers(rank)
        return peers[peers.index(rank) % self.shards :: self.shards]

    def expert_peers(self, rank: int) -> list[int]:
        """Return the ranks that have a layer's experts between them, a rank among them, in the
        order of the experts."""
        first = rank - rank % self.experts
        return [*range(first, first + self.experts)]

    def expert_data_peers(self, rank: int) -> list[int]:
        """Return the ranks that have one copy of the states of a rank's experts between them, a
        rank among them; without copies all that have the same experts."""
        size = self.shards * self.tensor  # consecutive ranks
        first = rank - rank % size
        return [*range(first + rank % self.experts, first + size, self.experts)]


def mesh_problems(job: "TrainJob", ranks: int | None) -> ProblemIterator:
    """Yield the broken rules of ranks that share windows; `ranks` of the job, None if unknown."""
    mesh = job.mesh(ranks or 1)
    if mesh.shard:
        yield from _shard_problems(job, mesh, ranks)
    sizes = {"context": mesh.context, "sequence": mesh.sequence, "tensor": mesh.tensor}
    names = [f"engine.{axis}_parallel" for axis, size in sizes.items() if size > 1]
    how = getattr(job.model, "activation_checkpointing", "none")
    if how == "selective" and mesh.experts > 1:
        problem = "selective doesn't keep the rows that ranks exchange for their experts"
        yield "model.activation_checkpointing", problem, "choose none or full"
        return
    if job.engine.tensor_chunks > 1:
        yield from _chunk_problems(job)
    if not names:
        return
    if ranks and ranks % (together := mesh.together):
        todo = f"start a multiple of {together} (launch.processes), or choose a smaller group"
        every = {"pipeline": mesh.pipeline, **sizes}.items()
        product = " x ".join(f"{name}={size}" for name, size in every if size > 1)
        group = f"{together}" if product.count("=") == 1 else f"{together} ({product})"
        yield names[0], f"the job's {ranks} ranks are not a multiple of {group}", todo
        return
    if not isinstance(job.model, ModelConfig):
        for name in names:
            todo = f"write {name}=1, or choose a built-in model, such as model=tiny"
            yield name, "a model of your own is not divided", todo
        return
    length = job.train.sequence_length
    if job.model.problems(sequence_length=length):
        return  # reported with the model's
    if mesh.columns > 1:
        name = f"engine.{'sequence' if mesh.sequence > 1 else 'context'}_parallel"
        divisions = mesh.sequence, mesh.context, mesh.tensor
        for problem, todo in of_columns(job.model, length, *divisions):
            yield name, problem, todo
    if mesh.tensor > 1:
        name, whole = "engine.tensor_parallel", "write engine.tensor_parallel=1"
        for problem, todo in of_matrices(job.model, mesh.tensor, length):
            yield name, problem, todo
        if isinstance(job.optimizer, OwnOptimizerConfig):
            problem = "an optimizer of your own may need whole matrices, of which a rank has a part"
            yield name, problem, f"{whole}, or optimizer=adamw"
        if job.engine.offload_optimizer or job.engine.offload_parameters:
            yield name, "offload is for whole matrices", f"{whole}, or leave offload out"
        if job.engine.hierarchical_partition > 1:
            problem = "a hierarchical partition is of whole matrices"
            yield name, problem, f"{whole}, or engine.hierarchical_partition=1"
        if job.model.mlp.is_routed and mesh.experts == 1:
            problem = "ranks that divide matrices don't have all experts each"
            yield name, problem, "divide them too, as by engine.expert_parallel=2"


def _chunk_problems(job: "TrainJob") -> ProblemIterator:
    """Yield the broken rules of a sum over ranks that is made in parts."""
    name = "engine.tensor_chunks"
    if job.engine.tensor_parallel == 1:
        yield name, "is for ranks that divide matrices", "write 1, or engine.tensor_parallel=2"
    if job.precision.fp8 != "none":
        problem = "products in fp8 have one scale for all tokens"
        yield name, problem, "write 1, or precision.fp8=none"
    if job.engine.pipeline_schedule == "zero-bubble":
        problem = "zero-bubble has another product of matrices"
        yield name, problem, "write 1, or engine.pipeline_schedule=1f1b"


def _shard_problems(job: "TrainJob", mesh: Mesh, ranks: int | None) -> ProblemIterator:
    """Yield the broken rules of ranks that have a copy of the states between them."""
    name, engine, size = "engine.shard_group", job.engine, mesh.shard
    if engine.stage == 0:
        problem = "at ZeRO stage 0 each rank has all states"
        yield name, problem, "choose engine.stage=1, 2 or 3, or leave it out"
    elif size == 1:
        problem = "groups of one rank divide nothing"
        yield name, problem, "choose engine.stage=0 for it, or a group of 2 ranks or more"
    elif engine.hierarchical_partition > 1:
        problem = "a hierarchical partition is of states that all ranks divide"
        yield name, problem, "leave out one of the two"
    elif engine.offload_optimizer or engine.offload_parameters:
        problem = "gradients that are offloaded are not summed over groups of ranks"
        yield name, problem, "leave it out, or leave offload out"
    elif ranks and ranks % mesh.together == 0 and mesh.states % size:
        problem = f"groups of {size} don't divide the {mesh.states} ranks with the same parameters"
        yield name, problem, f"choose {gcd(mesh.states, size)}, or another number of ranks"
    elif size * mesh.tensor % mesh.experts:
        problem = f"{size * mesh.tensor} ranks with a copy of the states are no whole number of "
        problem += f"groups of {mesh.experts} that divide the experts"
        yield name, problem, f"choose a multiple of {lcm(mesh.experts, mesh.tensor) // mesh.tensor}"


def expert_problems(job: "TrainJob", ranks: int | None) -> ProblemIterator:
    """Yield the broken rules of ranks that divide experts; `ranks` of the job, None if unknown."""
    parallel, name = job.engine.expert_parallel, "engine.expert_parallel"
    if parallel == 1:
        return
    if not isinstance(job.model, ModelConfig):
        todo = f"write {name}=1, or choose a built-in model, such as model=tiny"
        yield name, "a model of your own is not divided", todo
    elif job.model.experts is None:
        yield name, "the model has no experts", "leave it out, or choose model.mlp=moe"
    else:
        if (experts := job.model.experts.experts) % parallel:
            problem = f"{parallel} ranks can't have {experts} experts in equal parts"
            yield name, problem, "give a divisor of model.mlp.experts"
        if ranks and (ranks := job.mesh(ranks).in_stage) % parallel:
            problem = f"{ranks} ranks are no whole number of groups of {parallel}"
            yield name, problem, "give a divisor of the number of ranks"
