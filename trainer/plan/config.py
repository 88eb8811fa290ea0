"""What `plan` is told beside a training job: how many GPUs, of which kind, at what price.

Invariant: nothing here changes what is trained; the job in a PlanJob is the one that `train` takes.
All speeds are one way, in bytes a second; all sizes are bytes.
"""

# ruff: noqa: RUF009 (key and section make fields, as dataclasses.field does)

from dataclasses import dataclass
from typing import ClassVar

from forescale.config.duration import Duration
from forescale.config.job import Problems
from forescale.config.schema import key, section
from forescale.config.train import TrainJob


@dataclass
class MachineConfig:
    """A kind of device and the node that it stands in; recipes are conf/machine/."""

    name: str = key("", "what the table calls it")
    memory_bytes: float | None = key(None, "of a GPU, usable; null: this computer's, shared", gt=0)
    reserved_bytes: float = key(
        2e9, "of it, taken by the driver, NCCL and the libraries before anything is trained", ge=0
    )
    peak_bf16: float | None = key(None, "dense FLOP/s of a GPU in bf16 and fp16; null: not known")
    peak_fp32: float | None = key(None, "dense FLOP/s of a GPU in fp32; null: not known")
    efficiency: float = key(
        0.45, "share of the peak that a GPU reaches while it computes, recomputing counted too",
        gt=0, le=1,
    )  # fmt: skip
    gpus_per_node: int | None = key(None, "GPUs in a node; null: all are in one", ge=1)
    intra_node: float = key(1e10, "bytes/s that a GPU sends to others of its node", gt=0)
    inter_node: float = key(1e10, "bytes/s that a node sends to others, over all its cards", gt=0)
    link_efficiency: float = key(
        0.8, "share of a link's speed that collectives reach (nccl-tests: 0.75 to 0.95)", gt=0, le=1
    )
    overlap: bool = key(True, "communication can run beside computing; false on a CPU")
    fused_norms: bool = key(True, "RMSNorm is one kernel; false on a CPU, which keeps more")
    to_host: float = key(2e10, "bytes/s from a GPU to its host's memory", gt=0)
    node_write: float = key(1e9, "bytes/s that a node writes to where the runs are", gt=0)
    total_write: float = key(2e10, "bytes/s that all nodes write there together", gt=0)
    watts: float | None = key(None, "of a GPU with its share of the node, under load", gt=0)


@dataclass
class PlanConfig:
    gpus: int | None = key(None, "ranks, one a GPU; null: plan.nodes full, or one", ge=1)
    nodes: int | None = key(None, "nodes; null: as many as the GPUs need", ge=1)
    mfu: float | None = key(
        None, "MFU of the whole step; null: from machine.efficiency and the links", gt=0, le=1
    )
    from_run: str | None = key(
        None, "a run on the same kind of device whose measured speed counts, a name or a directory"
    )
    gpu_hour: float | None = key(None, "price of a GPU for an hour, in any currency", ge=0)
    kilowatt_hour: float | None = key(None, "price of a kilowatt-hour", ge=0)
    margin: float = key(
        0.08, "share of a GPU's memory that is left to fragmentation and temporaries", ge=0, lt=1
    )
    failures: float = key(
        6.5,
        "failures that end a job, in 1,000 days of a node; 6.5: Meta's RSC-1 (Kokolis et al. 2024, "
        "arXiv 2410.21680), 3.8: Llama 3 (419 unexpected in 54 days of 2,048 nodes; arXiv "
        "2407.21783, section 3.3.4)",
        ge=0,
    )
    detect: Duration | None = key(None, "to notice that a rank is gone; null: pulse.patience")
    restart: Duration = key(
        Duration(600, "seconds"), "from there until it trains again: queue, start, load, compile"
    )
    others: list[int] = key([1_024, 4_096, 16_384], "GPUs for which failures are shown too")
    deepspeed: bool = key(False, "show the derived DeepSpeed configuration")
    json: bool = key(False, "print the plan as JSON, for programs; --json does the same")

    def problems(self) -> Problems:
        found: Problems = []
        for name in ("detect", "restart"):
            length = getattr(self, name)
            if length is not None and length.unit != "seconds":
                found.append((name, "must be a wall time", f"write plan.{name}='10 min'"))
        if any(n < 1 for n in self.others):
            found.append(("others", "are numbers of GPUs", "write plan.others=[1024,16384]"))
        if self.mfu is not None and self.from_run is not None:
            todo = "take one of them out: plan.mfu=null"
            found.append(("mfu", "is given beside plan.from_run", todo))
        return found


@dataclass
class PlanJob(TrainJob):
    VERB: ClassVar[str] = "plan"

    machine: MachineConfig = section(MachineConfig, "what it runs on", "free")
    plan: PlanConfig = section(PlanConfig, "what is planned with", "free")

    @property
    def world_size(self) -> int:
        if self.plan.gpus:
            return self.plan.gpus
        if self.plan.nodes:
            return self.plan.nodes * (self.machine.gpus_per_node or 1)
        return self.launch.processes or 1

    @property
    def nodes(self) -> int:
        return -(-self.world_size // self.per_node)

    @property
    def per_node(self) -> int:
        """Ranks in a node that is full."""
        return min(self.machine.gpus_per_node or self.world_size, self.world_size)

    def problems(self, world_size: int | None = None) -> Problems:
        found = super().problems(world_size or self.world_size)
        plan, each = self.plan, self.machine.gpus_per_node
        if plan.gpus and plan.nodes and each and plan.gpus > plan.nodes * each:
            what = f"{plan.gpus} GPUs don't fit {plan.nodes} nodes of {each}"
            found.append(("plan.nodes", what, f"write plan.nodes={-(-plan.gpus // each)}"))
        if each and self.world_size > each and self.world_size % each:
            whole = -(-self.world_size // each) * each
            what = f"{self.world_size} GPUs don't fill nodes of {each}"
            found.append(("plan.gpus", what, f"write plan.gpus={whole}"))
        near = self.engine.hierarchical_partition
        if near > 1 and self.world_size % near:
            what = f"{near} ranks don't divide {self.world_size}"
            found.append(("engine.hierarchical_partition", what, f"choose {self.per_node}"))
        return found
