"""The keys of `plan` beside those of a training job: how many GPUs, of which kind, at what price.

Invariant: no key here changes what is trained. All speeds are one way, in bytes per second; sizes
are in bytes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from forescale.config.duration import Duration
from forescale.config.hardware import Exactness, exactness
from forescale.config.job import Problems
from forescale.config.schema import key, section
from forescale.config.sizes import SizeRange, Sizes
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError


@dataclass
class MachineConfig:
    """A kind of device and its node; conf/machine/ has ready ones."""

    name: str = ""  # name of the device in the table
    # usable memory of a GPU; null: the memory of this computer, shared by its ranks
    memory_bytes: float | None = key(None, gt=0)
    # memory that the driver, NCCL and the libraries take before training starts
    reserved_bytes: float = key(2e9, ge=0)
    # dense FLOP/s of a GPU in bf16 and fp16; null: unknown
    peak_bf16: float | None = key(None, gt=0)
    peak_fp32: float | None = key(None, gt=0)  # dense FLOP/s of a GPU in fp32; null: unknown
    # fraction of the peak that matrix products reach, without all that is between them
    efficiency: float = key(0.7, gt=0, le=1)
    # fraction of the peak that attention to a long causal sequence reaches; null: that of matrix
    # products
    attention_efficiency: float | None = key(None, gt=0, le=1)
    fp8: bool = False  # a GPU multiplies fp8: CUDA capability 8.9 or more
    # bytes/s between a GPU and its memory; null: not counted beside the products
    memory_bandwidth: float | None = key(None, gt=0)
    gpus_per_node: int | None = key(None, ge=1)  # GPUs of a node; null: all GPUs are in one node
    intra_node: float = key(1e10, gt=0)  # bytes/s from one GPU to the others of its node
    inter_node: float = key(1e10, gt=0)  # bytes/s from one node to the others, all cards
    # fraction of a link's speed that collectives reach (nccl-tests: 0.75 to 0.95)
    link_efficiency: float = key(0.8, gt=0, le=1)
    # seconds that a collective takes for each step from GPU to GPU in a node
    intra_latency: float = key(1.9e-6, ge=0)
    # seconds that a collective takes for each step from node to node
    inter_latency: float = key(4e-6, ge=0)
    launch: float = key(0.0, ge=0)  # seconds in which a host launches a kernel, at least
    overlap: bool = True  # communication can overlap with computation; false on a CPU
    fused_norms: bool = True  # RMSNorm is one kernel; false on a CPU, which keeps more
    to_host: float = key(2e10, gt=0)  # bytes/s from a GPU to the memory of its host
    node_write: float = key(1e9, gt=0)  # bytes/s that one node writes to the runs' storage
    total_write: float = key(2e10, gt=0)  # bytes/s that all nodes together write there
    watts: float | None = key(None, gt=0)  # power of a GPU with its share of the node, under load


@dataclass
class PlanConfig:
    # GPUs, one rank each; null: those of plan.nodes, or one
    gpus: int | None = key(None, ge=1, common=True)
    # number of nodes, or the smallest and the largest, as 2-8; null: as many as plan.gpus need
    nodes: Sizes | None = None
    # MFU of the whole step; null: from the speeds of the machine
    mfu: float | None = key(None, gt=0, le=1)
    # a run on the same kind of device (name or directory) whose measured speed is used
    from_run: str | None = None
    # price of one GPU for one hour, in any currency
    gpu_hour: float | None = key(None, ge=0, common=True)
    kilowatt_hour: float | None = key(None, ge=0)  # price of a kilowatt-hour
    # fraction of a GPU's memory left free for fragmentation and temporaries
    margin: float = key(0.08, ge=0, lt=1)
    # failures that end a job, per 1,000 node-days; 3.8: Llama 3 (419 unexpected in 54 days of 2,048
    # nodes; arXiv 2407.21783, section 3.3.4), 6.5: Meta's RSC-1 (Kokolis et al. 2024, arXiv
    # 2410.21680)
    failures: float = key(3.8, ge=0)
    # time until a lost rank is noticed; null: heartbeat.patience
    detect: Duration | None = key(None, wall_time=True)
    # time from there until it trains again: queue, start, load, compile
    restart: Duration = key(Duration(600, "seconds"), wall_time=True)
    # number of the best divisions among the GPUs that are searched and shown; 0: none
    divisions: int = key(5, ge=0)
    deepspeed: bool = False  # show the DeepSpeed JSON that is derived from the config
    to: str | None = None  # an HTML file to which the plan is written too

    def problems(self) -> Problems:
        problems: Problems = []
        if self.mfu is not None and self.from_run is not None:
            todo = "take one of them out: plan.mfu=null"
            problems.append(("mfu", "is given beside plan.from_run", todo))
        return problems


@dataclass
class PlanJob(TrainJob):
    VERB: ClassVar[str] = "plan"
    PRINTS: ClassVar = {"problems": list[dict[str, str]], "notes": list[str], "config": dict}
    LINES: ClassVar[str] = ""
    RESUMES: ClassVar[bool] = False  # a plan is for another machine; it knows a run by its name

    machine: MachineConfig = section(MachineConfig, kind="free")  # what it runs on
    plan: PlanConfig = section(PlanConfig, kind="free")  # what is planned with

    @property
    def native_precision(self) -> Literal["bf16", "fp32"]:
        """What precision.kind=auto means on the planned machine; for a CPU, on this one."""
        return "bf16" if self.on_gpu else super().native_precision

    @property
    def exactness(self) -> Exactness:
        """What the run promises of its bits on the planned machine."""
        return exactness(self.train.deterministic, self.on_gpu, self.train.invariant)

    @property
    def on_gpu(self) -> bool:
        """Whether the planned machine has GPUs."""
        return self.machine.memory_bytes is not None

    @property
    def elastic(self) -> SizeRange | None:
        nodes, each = self.plan.nodes, self.machine.gpus_per_node or 1
        if nodes is None:
            return None if self.plan.gpus else super().elastic
        is_range = nodes.is_range and not self.plan.gpus
        return SizeRange("plan.nodes", nodes, each) if is_range else None

    @property
    def world_size(self) -> int:
        if self.plan.gpus:
            return self.plan.gpus
        if self.plan.nodes:
            return self.plan.nodes.most * (self.machine.gpus_per_node or 1)
        return self.launch.processes.most if self.launch.processes else 1

    @property
    def nodes(self) -> int:
        return -(-self.world_size // self.per_node)

    def notes(self) -> list[str]:
        notes, mesh = super().notes(), self.mesh(1)
        groups = {"tensor": mesh.tensor, "sequence": mesh.sequence, "expert": mesh.experts}
        for axis, size in groups.items():
            ranks = size * mesh.tensor if axis == "sequence" else size
            if size > 1 and self.per_node % ranks:
                notes.append(
                    f"engine.{axis}_parallel={size}: {ranks} ranks don't divide the "
                    f"{self.per_node} of a node: some groups cross nodes, and every layer waits "
                    "for the links between them."
                )
        ranks = mesh.shard * mesh.tensor
        if ranks and self.per_node % ranks and ranks % self.per_node:
            notes.append(
                f"engine.shard_group={mesh.shard}: the {ranks} ranks with a copy of the states are "
                f"neither a part of a node of {self.per_node} GPUs nor whole nodes: groups share "
                "the links between nodes."
            )
        return notes

    @property
    def gpus(self) -> dict[str, Any]:
        """What a rehearsal pretends, by its keys."""
        return {
            "plan.gpus": self.world_size,
            "machine.name": self.machine.name,
            "machine.memory_bytes": self.machine.memory_bytes,
            "machine.gpus_per_node": self.per_node,
        }

    @property
    def per_node(self) -> int:
        """Ranks of a full node."""
        return min(self.machine.gpus_per_node or self.world_size, self.world_size)

    def problems(self, world_size: int | None = None) -> Problems:
        problems = super().problems(world_size or (None if self.elastic else self.world_size))
        plan, each = self.plan, self.machine.gpus_per_node
        if self.precision.fp8 != "none" and not self.machine.fp8:
            problem = f"{self.machine.name} does not multiply fp8 (machine.fp8=false)"
            todo = "choose another machine, such as machine=h100-sxm, or leave it out"
            problems.append(("precision.fp8", problem, todo))
        if plan.gpus and plan.nodes and each and plan.gpus > plan.nodes.most * each:
            problem = f"{plan.gpus} GPUs don't fit {plan.nodes} nodes of {each}"
            problems.append(("plan.nodes", problem, f"write plan.nodes={-(-plan.gpus // each)}"))
        if not self.elastic and each and self.world_size > each and self.world_size % each:
            whole = -(-self.world_size // each) * each
            problem = f"{self.world_size} GPUs don't fill nodes of {each}"
            problems.append(("plan.gpus", problem, f"write plan.gpus={whole}"))
        return problems


def page_path(job: PlanJob) -> Path | None:
    """Return the file that plan.to names; None without one. Raises UserError if it is no page."""
    if job.plan.to is None:
        return None
    if Path(job.plan.to).suffix != ".html":
        todo = "name a file, such as plan.to=plan.html"
        raise UserError("plan.to", f"{job.plan.to!r} is no page", todo)
    return Path(job.plan.to).expanduser()
