"""What `submit` is told beside a planned job: which part of a cluster, for how long, set up how.

Invariant: nothing here changes what is trained. Names are those of sbatch, where it has one; sizes
of memory are in its own words (64G).
"""

# ruff: noqa: RUF009 (key and section make fields, as dataclasses.field does)

import re
from dataclasses import dataclass, fields
from typing import ClassVar

from forescale.config.duration import Duration
from forescale.config.schema import key, section
from forescale.config.train import Problems, TrainJob
from forescale.plan.config import PlanJob

_NAME = re.compile(r"[^\W\d]\w*")
_SIZE = re.compile(r"([0-9]+)([KMGT]?)", re.IGNORECASE)
_UNITS = {"K": 2**10, "": 2**20, "M": 2**20, "G": 2**30, "T": 2**40}
_LATE = 10.0  # seconds: a signal's way to the ranks, and the last of them to leave


@dataclass
class SlurmConfig:
    partition: str | None = key(None, "null: the cluster's default")
    account: str | None = key(None, "whom the hours are charged to")
    qos: str | None = key(None, "quality of service")
    constraint: str | None = key(None, "features that nodes must have")
    reservation: str | None = key(None, "nodes that are set aside")
    nodes: int = key(1, "nodes", ge=1)
    gpus_per_node: int = key(0, "GPUs of a node, one rank each; 0: ranks on CPUs", ge=0)
    gres: str | None = key(None, "the GPUs as a generic resource, such as gpu:a100:4, where needed")
    tasks_per_node: int | None = key(None, "ranks of a node; null: one a GPU, or one", ge=1)
    cpus_per_task: int | None = key(None, "CPUs of a rank; null: the cluster's default", ge=1)
    mem: str | None = key(None, "memory of a node, such as 64G; 0: all; null: the default")
    time: Duration | None = key(None, "limit of one job, such as 24 h; a run takes many jobs")
    exclusive: bool = key(False, "share the nodes with nobody")
    exclude: list[str] = key([], "nodes not to use")
    after: list[str] = key([], "job ids that must have ended well before it starts")
    options: list[str] = key([], "further options of sbatch, such as --mail-type=END")
    srun: list[str] = key([], "further options of srun, such as --cpu-bind=cores")
    requeue: bool = key(True, "go on by itself after a time limit, a preemption, a dead node")
    lead: Duration | None = key(
        None, "how long before the time limit it saves; null: from the time that a save takes"
    )
    modules: list[str] = key([], "modules to load")
    setup: list[str] = key([], "lines of shell before all else, on the first node")
    exports: dict[str, str] = key({}, "variables of the environment of all ranks")
    python: str | None = key(None, "the Python of the nodes; null: the one that submits")
    container: str | None = key(None, "an image for the ranks, run by Pyxis")
    mounts: list[str] = key([], "of the container, HOST:INSIDE; the run and its data are there")
    scratch: str = key("/tmp", "a directory on each node's own disk, for code and caches")
    pack: bool = key(False, "copy the Python environment to scratch, so that ranks import from it")
    offline: bool = key(True, "nodes have no network: Hugging Face and wandb are told so")
    interface: str | None = key(None, "network interface of the ranks; null: found by the route")
    preflight: bool = key(True, "look at every node before ranks start")
    allreduce: bool = key(True, "measure the network in the preflight")
    runs: str | None = key(None, "a file: a line a run, key=value words over these; one array")
    at_once: int | None = key(None, "of an array, so many at once", ge=1)

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus_per_node)

    @property
    def has_gpus(self) -> bool:
        return bool(self.gpus_per_node or self.gres)

    @property
    def memory_bytes(self) -> int | None:
        """Of a node; None where the cluster decides, or all is asked for."""
        match = _SIZE.fullmatch(self.mem or "")
        size = int(match[1]) * _UNITS[match[2].upper()] if match else 0
        return size or None

    def problems(self) -> Problems:
        found: Problems = []
        if self.mem is not None and not _SIZE.fullmatch(self.mem):
            found.append(("mem", f"{self.mem!r} is no size", "write it like slurm.mem=64G"))
        for name in ("time", "lead"):
            length = getattr(self, name)
            if length is not None and (length.unit != "seconds" or not length.amount):
                found.append((name, "must be a wall time", f"write slurm.{name}='24 h'"))
        for name in self.exports:
            if not _NAME.fullmatch(name):
                found.append(("exports", f"{name!r} can't name a variable", "use letters and _"))
        for job in self.after:
            if not re.fullmatch(r"[0-9]+(_[0-9]+)?", job):
                found.append(("after", f"{job!r} is no job id", "see forescale status"))
        if self.at_once is not None and self.runs is None:
            found.append(("at_once", "is given without slurm.runs", "name the file of the runs"))
        if self.mounts and self.container is None:
            found.append(("mounts", "is given without a container", "name slurm.container"))
        return found + self._paths() + self._gpus()

    def _paths(self) -> Problems:
        """A value that stands in a line of the script must be one line."""
        found: Problems = []
        if not self.scratch.startswith("/"):
            found.append(
                ("scratch", f"{self.scratch} is no absolute path", "write slurm.scratch=/tmp")
            )
        for f in fields(self):
            value = getattr(self, f.name)
            texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
            if f.name != "setup" and any("\n" in text for text in texts):
                found.append((f.name, "is more than a line", "write it in one"))
        return found

    def _gpus(self) -> Problems:
        if self.gpus_per_node and self.ranks_per_node > self.gpus_per_node:
            what = f"{self.tasks_per_node} ranks don't have a GPU each of {self.gpus_per_node}"
            return [("tasks_per_node", what, f"write slurm.tasks_per_node={self.gpus_per_node}")]
        return []


@dataclass
class SubmitConfig:
    dry_run: bool = key(False, "print the script and submit nothing; --dry-run does the same")


@dataclass
class SubmitJob(PlanJob):
    VERB: ClassVar[str] = "submit"

    slurm: SlurmConfig = section(SlurmConfig, "where it runs", "free")
    submit: SubmitConfig = section(SubmitConfig, "what becomes of it", "free")

    @property
    def world_size(self) -> int:
        return self.slurm.nodes * self.slurm.ranks_per_node

    @property
    def nodes(self) -> int:
        return self.slurm.nodes

    @property
    def per_node(self) -> int:
        return self.slurm.ranks_per_node

    @property
    def training(self) -> TrainJob:
        """What the ranks will be given."""
        return TrainJob(**{f.name: getattr(self, f.name) for f in fields(TrainJob)})

    def lead(self, save_seconds: float) -> int:
        """Whole seconds before the time limit at which the ranks are told to save: as long as they
        may take, or twice what a step and a save are measured or planned to take."""
        if self.slurm.lead is not None:
            return int(self.slurm.lead.seconds or 0)
        return round(max(self.launch.grace.seconds or 0.0, 2 * save_seconds) + _LATE)

    def problems(self, world_size: int | None = None) -> Problems:
        found = super().problems(self.world_size)
        limit = self.slurm.time.seconds if self.slurm.time else None
        if limit and limit <= self.lead(0.0):
            what = f"{self.slurm.time} leave nothing beside the {self.lead(0.0)} s of saving"
            todo = "ask for longer, or lower launch.grace or slurm.lead"
            found.append(("slurm.time", what, todo))
        wants_gpus = self.machine.memory_bytes is not None
        if wants_gpus and not self.slurm.has_gpus:
            what = f"no GPU is asked for, and machine is {self.machine.name}"
            found.append(("slurm.gpus_per_node", what, "ask for some, or choose machine=cpu"))
        return found
