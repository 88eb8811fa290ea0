"""The keys of `rehearse` beside those of `plan` and `train`."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar, Literal, NotRequired

from forescale.config.job import Problems
from forescale.config.schema import key, section
from forescale.plan.config import PlanJob
from forescale.plan.gpu import KINDS, gpu_of


def has_triton() -> bool:
    """True if the package triton is installed."""
    return find_spec("triton") is not None


@dataclass
class RehearseConfig:
    # the ranks whose steps are rehearsed, one at a time; []: those at the edges of the mesh, which
    # are the first, the last that divides a model with it, and the last of all
    ranks: list[int] = key([0], common=True)
    # auto: of a deep model on many ranks two shallow depths, from which those of all layers follow
    layers: Literal["auto", "all"] = "auto"
    # micro-batches of a step at most, of a pipeline two a stage; what follows is the same again
    micro_batches: int = key(2, ge=1)
    # kernels of compiled parts, by triton, assembled for the GPU; auto: where triton is installed
    kernels: Literal["auto", "on", "off"] = key("auto", common=True)

    @property
    def has_kernels(self) -> bool:
        return self.kernels == "on" or (self.kernels == "auto" and has_triton())


@dataclass
class RehearseJob(PlanJob):
    VERB: ClassVar[str] = "rehearse"
    PRINTS: ClassVar = {"problems": list[dict[str, str]], "ranks": NotRequired[list[dict]]}

    rehearse: RehearseConfig = section(RehearseConfig, kind="free")  # what is rehearsed

    @property
    def rehearsed_ranks(self) -> list[int]:
        mesh = self.mesh(self.world_size)
        divided = max(mesh.near, mesh.experts, mesh.shard * mesh.tensor)
        edges = {0, divided - 1, mesh.world - 1}
        if mesh.pipeline > 2:  # a stage between the first and the last
            edges.add(mesh.world // 2)
        return self.rehearse.ranks or sorted(edges)

    def problems(self, world_size: int | None = None) -> Problems:
        problems, machine = super().problems(world_size), self.machine
        if gpu_of(machine.name, machine.memory_bytes or 0, self.per_node) is None:
            names = ", ".join(KINDS)
            problem = f"{machine.name or 'this machine'!r} is no GPU that can be pretended"
            todo = f"choose a machine with {names}, such as machine=h100-sxm"
            problems.append(("machine", problem, todo))
        for rank in self.rehearse.ranks:
            if not 0 <= rank < self.world_size:
                problem = f"there is no rank {rank} among {self.world_size}"
                todo = f"choose from 0 to {self.world_size - 1}, or plan.gpus"
                problems.append(("rehearse.ranks", problem, todo))
        if self.rehearse.kernels == "on" and not has_triton():
            problem = "needs the package triton, which isn't installed"
            todo = "pip install 'forescale[rehearsal]', or write rehearse.kernels=off"
            problems.append(("rehearse.kernels", problem, todo))
        return problems
