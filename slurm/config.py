"""The keys of `forescale submit`: which nodes, for how long, and how they are set up.

Invariant: no key here changes what is trained. Where sbatch has the option, the key has its name
and its format (64G for memory).
"""

import re
import shlex
import sys
from dataclasses import dataclass, fields
from typing import ClassVar, Literal, NotRequired

from forescale.config.duration import Duration
from forescale.config.job import Problems
from forescale.config.schema import key, section
from forescale.config.sizes import SizeRange, Sizes
from forescale.plan.config import PlanJob

_NAME = re.compile(r"[^\W\d]\w*")
_SECRET = re.compile(r"token$|secret|passw|credential|api_?key|access_?key", re.IGNORECASE)
_SIZE = re.compile(r"([0-9]+)([KMGT]?)", re.IGNORECASE)
_UNITS = {"K": 2**10, "": 2**20, "M": 2**20, "G": 2**30, "T": 2**40}
# An entry of --gres: name[[:type]:count], one if it has no count.
_GPUS = re.compile(r"(?:gres[:/])?gpu(?::(?![0-9]+(?:$|:))[^:]+)?(?::(?P<count>[0-9]+))?")
_LATE = 10.0  # seconds until a signal has reached all ranks and the last rank has ended
MANY_NODES = 16  # more of them would wait for the imports of all from shared storage
# Threads of a rank on a GPU: kernels, backward pass, the next batch, a save. A guess.
_FEW_CPUS = 4


@dataclass
class SlurmConfig:
    """Section `slurm`."""

    ALONE: ClassVar = ("time", "grow", "lead", "start_time", "check_time")  # see schema.check

    partition: str | None = key(None, common=True)  # partition; null: the cluster's default
    account: str | None = key(None, common=True)  # account to charge
    qos: str | None = None  # quality of service
    constraint: str | None = None  # features that nodes must have
    reservation: str | None = None  # reservation to use
    nodes: Sizes = key(Sizes(1, 1), common=True)  # number of nodes; 2-8: as many as are free
    # more nodes than the run needs, which replace lost or faulty ones inside the job
    spares: int = key(0, ge=0)
    # how often a run on fewer nodes than it may have looks for more, such as 30 min; null: never
    grow: Duration | None = key(None, gt=0, wall_time=True)
    # GPUs per node, one rank each; 0: those of slurm.gres, else ranks on CPUs
    gpus_per_node: int = key(0, ge=0, common=True)
    # generic resources per node, such as gpu:a100:4, if the cluster needs GPUs so
    gres: str | None = None
    # 1: ask for a GPU for each of slurm.tasks_per_node, if the cluster needs GPUs so
    gpus_per_task: int | None = key(None, ge=1, le=1)
    tasks_per_node: int | None = key(None, ge=1)  # ranks per node; null: one per GPU, or one
    # CPUs per rank; null: an equal share of those that the job gets
    cpus_per_task: int | None = key(None, ge=1)
    # --cpu-bind of srun for ranks; null: cores, if a rank has several CPUs
    cpu_bind: str | None = None
    mem: str | None = None  # memory per node, such as 64G; 0: all; null: the cluster's default
    mem_per_gpu: str | None = None  # memory per GPU, such as 120G, instead of slurm.mem
    # time limit of one job, such as 24 h; a run may take many jobs
    time: Duration | None = key(None, common=True, gt=0, wall_time=True)
    exclusive: bool = False  # do not share the nodes with other jobs
    exclude: list[str] = key([])  # names of nodes not to use
    # switches of the network that the nodes may be on, and how long to wait for that: 1@12:00:00
    switches: str | None = None
    network: str | None = None  # what the job needs of the network, such as job_vni on Slingshot
    licenses: str | None = None  # licences that the job needs, such as scratch:1
    nice: int | None = None  # by how much to lower the priority of the job
    after: list[str] = key([])  # ids of jobs that must have succeeded before this one starts
    options: list[str] = key([])  # more options of sbatch, such as --mail-type=END
    srun: list[str] = key([])  # more options of srun, such as --mpi=none
    # address that SLURM writes to when the job has ended (see FORESCALE_WEBHOOK, too)
    mail: str | None = None
    requeue: bool = True  # requeue the job after a time limit, a preemption or a node failure
    # requeues in a row without a new checkpoint; then the job ends with code 76
    max_requeues: int = key(5, ge=0)
    # how long before the time limit the run saves; null: from the duration of a save
    lead: Duration | None = key(None, gt=0, wall_time=True)
    modules: list[str] = key([])  # environment modules to load
    setup: list[str] = key([])  # shell commands to run first, on the first node
    exports: dict[str, str] = key({})  # environment variables of all ranks
    # command of Python on the nodes, of one or more words; null: the Python that submits, in a
    # container python3
    python: str | None = None
    container: str | None = None  # container image for the ranks
    # what runs the container; null: apptainer for an image *.sif, else pyxis
    runtime: Literal["pyxis", "apptainer", "singularity"] | None = None
    # mounts of the container, HOST:INSIDE, beside the run, its data and slurm.scratch
    mounts: list[str] = key([])
    scratch: str = "/tmp"  # directory on each node's local disk, for code and caches
    # copy the Python environment to slurm.scratch, and import from there; null: beyond 16 nodes
    pack: bool | None = None
    offline: bool = True  # set the offline modes of Hugging Face and wandb: nodes have no internet
    # network interface of the ranks; null: the one of the route to the first node
    interface: str | None = None
    preflight: bool = True  # check every node before ranks start
    allreduce: bool = True  # measure the network in these checks
    # how long a node may take to unpack, or to pull a container, before these checks
    start_time: Duration = key(Duration(600, "seconds"), gt=0, wall_time=True)
    # how long these checks may take, and then measuring the network
    check_time: Duration = key(Duration(120, "seconds"), gt=0, wall_time=True)
    # file with one run per line, as KEY=VALUE ...; all become one array job
    runs: str | None = None
    # of submit shards: number of tasks that share the build, each on slurm.nodes; null: one job
    array: int | None = key(None, ge=1)
    at_once: int | None = key(None, ge=1)  # largest number of tasks of the array at a time

    @property
    def outlives_nodes(self) -> bool:
        """True if a job goes on when one of its nodes goes down (--no-kill of sbatch). A run on one
        node is on the first, with the batch script: it could not go on."""
        return self.nodes.most > 1 and (self.spares > 0 or self.nodes.is_range)

    @property
    def packs(self) -> bool:
        """True if nodes import from a copy of this Python's environment on their own disks."""
        if self.pack is None and self.nodes.most > MANY_NODES:
            # What isn't this Python's, or no virtual environment, can't be packed.
            is_this = self.container is None and self.python is None
            return is_this and sys.prefix != sys.base_prefix
        return bool(self.pack)

    @property
    def ranks_per_node(self) -> int:
        return self.tasks_per_node or max(1, self.gpus)

    @property
    def gpus(self) -> int:
        """GPUs per node."""
        per_task = self.gpus_per_task and self.tasks_per_node
        return self.gpus_per_node or self.gpus_of_gres or per_task or 0

    @property
    def gpus_of_gres(self) -> int:
        """GPUs per node that slurm.gres requests."""
        matches = map(_GPUS.fullmatch, (self.gres or "").split(","))
        return sum(int(match["count"] or 1) for match in matches if match)

    @property
    def has_gpus(self) -> bool:
        return bool(self.gpus)

    @property
    def container_runtime(self) -> str:
        """What runs slurm.container."""
        is_sif = (self.container or "").endswith(".sif")
        return self.runtime or ("apptainer" if is_sif else "pyxis")

    @property
    def memory_bytes(self) -> int | None:
        """Bytes per node; None if the cluster decides, or all memory is requested."""
        match = _SIZE.fullmatch(self.mem or self.mem_per_gpu or "")
        size = int(match[1]) * _UNITS[match[2].upper()] if match else 0
        return size * (1 if self.mem else self.gpus) or None

    def problems(self) -> Problems:
        problems: Problems = []
        for name in ("mem", "mem_per_gpu"):
            size = getattr(self, name)
            if size is not None and not _SIZE.fullmatch(size):
                todo = f"write, for example, slurm.{name}=64G"
                problems.append((name, f"{size!r} is not a size", todo))
        if self.mem_per_gpu is not None and (self.mem is not None or not self.gpus):
            problem = "does not apply " + ("beside slurm.mem" if self.gpus else "without GPUs")
            problems.append(("mem_per_gpu", problem, "leave it out"))
        for name, command in (("options", "sbatch"), ("srun", "srun")):
            before = ""
            for option in getattr(self, name):
                # A word of srun may be the value of the option before it, as in -m cyclic.
                is_value = name == "srun" and re.fullmatch(r"--?[\w-]+", before)
                before = option
                if not is_value and not re.match(r"--?\w", option):
                    todo = f"quote an option with a comma: 'slurm.{name}=[\"--exclude=n1,n2\"]'"
                    problems.append((name, f"{option!r} is no option of {command}", todo))
        for name in self.exports:
            if not _NAME.fullmatch(name):
                problem = f"{name!r} is not a name of a variable"
                problems.append(("exports", problem, "use letters, digits and _"))
            elif _SECRET.search(name):
                todo = "export it in your shell before you submit: sbatch passes it on"
                problems.append(("exports", f"{name} would be stored in job.sbatch", todo))
        for job in self.after:
            if not re.fullmatch(r"[0-9]+(_[0-9]+)?", job):
                problems.append(("after", f"{job!r} is not a job id", "see squeue --me"))
        if self.grow is not None and not (self.nodes.is_range and self.requeue):
            problem, todo = "needs a range of nodes", "set, for example, slurm.nodes=2-8"
            if self.nodes.is_range:
                problem, todo = "requeues the job, but slurm.requeue=false", "leave one of them out"
            problems.append(("grow", problem, todo))
        if self.at_once is not None and self.runs is None and self.array is None:
            problems.append(("at_once", "needs slurm.runs", "set slurm.runs=FILE"))
        for name in ("mounts", "runtime"):
            if getattr(self, name) and self.container is None:
                problems.append((name, "needs a container", "set slurm.container"))
        if self.pack and self.container:
            problem = "is for nodes without containers: an image has its own Python"
            problems.append(("pack", problem, "leave out slurm.pack or slurm.container"))
        try:
            words = shlex.split(self.python) if self.python is not None else ["python"]
            problem = "" if words else "has no word"
        except ValueError as e:
            problem = f"{self.python!r} can't be read ({e})"
        if problem:
            todo = "write it as for a shell, such as 'conda run python'"
            problems.append(("python", problem, todo))
        if not self.scratch.startswith("/"):
            problem = f"{self.scratch} is not an absolute path"
            problems.append(("scratch", problem, "write slurm.scratch=/tmp"))
        for f in fields(self):  # each stands in one line of the batch script
            value = getattr(self, f.name)
            texts = [value] if isinstance(value, str) else value if isinstance(value, list) else []
            if f.name != "setup" and any(not text.isprintable() for text in texts):
                problem = "has a line break or another control character"
                problems.append((f.name, problem, "write it in one line"))
        return problems + self._gpus()

    def _gpus(self) -> Problems:
        for part in (self.gres or "").split(","):
            if re.match(r"(gres[:/])?gpu\b", part) and not _GPUS.fullmatch(part):
                problem = f"{part} has no number of GPUs that can be read"
                return [("gres", problem, "write it as gpu:8 or gpu:h100:8")]
        if self.gpus_per_task and (self.gpus_per_node or self.gpus_of_gres):
            problem = "does not apply beside slurm.gpus_per_node or slurm.gres"
            return [("gpus_per_task", problem, "leave it out")]
        if self.gpus_per_task and not self.tasks_per_node:
            problem = "needs the number of ranks per node"
            return [("gpus_per_task", problem, "write slurm.tasks_per_node=4")]
        count = self.gpus_of_gres
        if self.gpus_per_node and count not in (0, self.gpus_per_node):
            problem = f"{self.gpus_per_node} GPUs, but slurm.gres={self.gres} has {count}"
            return [("gpus_per_node", problem, f"write slurm.gpus_per_node={count}")]
        if self.gpus and self.ranks_per_node > self.gpus:
            problem = f"{self.tasks_per_node} ranks need one GPU each, but there are {self.gpus}"
            return [("tasks_per_node", problem, f"write slurm.tasks_per_node={self.gpus}")]
        return []

    def note_on_cpus(self, cpus: int) -> str | None:
        """Return a sentence on the CPUs of a rank, for nodes of at least so many; None if they have
        what the ranks want."""
        ranks, where = self.ranks_per_node, f"partition {self.partition or 'by default'}"
        most = cpus // ranks
        nodes = f"Nodes of {where} have {cpus} CPUs for {ranks} rank{'s' * (ranks > 1)}"
        if self.cpus_per_task and self.cpus_per_task > most:
            todo = f"set slurm.cpus_per_task={most}" if most else "ask for another partition"
            return f"{nodes}, which ask for {self.cpus_per_task} each: {todo}."
        has_own = self.exclusive or any(word.startswith("--cpus-per") for word in self.options)
        if not self.has_gpus or (has_own and most >= _FEW_CPUS):
            return None
        if most < _FEW_CPUS:
            less = f"a rank on a GPU has less than {_FEW_CPUS} for its kernels, its data and its"
            return f"{nodes}: {less} saves, and the GPU may wait for it."
        if (self.cpus_per_task or 1) < _FEW_CPUS:
            return f"{nodes}: set slurm.cpus_per_task={most}, or the GPU may wait for its rank."
        return None

    def notes(self) -> list[str]:
        """Return sentences about what follows from keys that aren't set."""
        notes = []
        if self.nodes.is_range:
            notes.append(
                f"slurm.nodes={self.nodes}: the job starts on what is free, and goes on with what "
                "is left when nodes fail."
            )
        if self.gpus and not self.gpus_per_node:
            ranks = "1 rank" if self.ranks_per_node == 1 else f"{self.ranks_per_node} ranks"
            notes.append(f"slurm.gres={self.gres} is {self.gpus} GPUs per node: {ranks} on each.")
        if self.spares:
            held = Sizes(self.nodes.least + self.spares, self.nodes.most + self.spares)
            notes.append(
                f"slurm.spares={self.spares}: the job holds {held} nodes and trains on "
                f"{self.nodes}; plans and prices leave out the others."
            )
        if self.cpus_per_task is None and self.exclusive:
            notes.append("slurm.cpus_per_task is not set: ranks share all CPUs of a node equally.")
        elif self.cpus_per_task is None:
            # sbatch's manual: "Without this option, the controller will just try to allocate one
            # processor per task." DefCpuPerGPU of a partition may change that. A guess from the
            # nodes' sizes could ask for more than the cluster gives, and the job would never start.
            notes.append(
                "slurm.cpus_per_task is not set: a rank gets 1 CPU, unless the partition gives "
                "more; set it, or slurm.exclusive=true for all CPUs of the nodes."
            )
        return notes


# What all kinds of `submit` print with --json; scripts: of --dry-run; complete: runs that are.
SUBMITTED = dict.fromkeys(("jobs", "scripts", "complete"), NotRequired[list])


@dataclass
class SubmitConfig:
    """Section `submit`."""

    dry_run: bool = False  # print the script and submit nothing; --dry-run does the same
    # make a rank's steps on pretended GPUs first, and submit nothing that would crash; auto: a new
    # run that takes 100 GPU-hours, without a rehearsal that holds (see forescale help rehearsal)
    rehearse: Literal["auto", "off", "always"] = "auto"


@dataclass
class SubmitJob(PlanJob):
    """A training job, and where to run it."""

    VERB: ClassVar[str] = "submit"
    FLAGS: ClassVar = {"--dry-run": "submit.dry_run"}
    PRINTS: ClassVar = SUBMITTED
    RESUMES: ClassVar[bool] = True

    slurm: SlurmConfig = section(SlurmConfig, kind="free")  # nodes of the cluster and their setup
    submit: SubmitConfig = section(SubmitConfig, kind="free")  # how to submit

    @property
    def elastic(self) -> SizeRange | None:
        nodes, each = self.slurm.nodes, self.slurm.ranks_per_node
        return SizeRange("slurm.nodes", nodes, each) if nodes.is_range else None

    @property
    def world_size(self) -> int:
        return self.nodes * self.slurm.ranks_per_node

    @property
    def nodes(self) -> int:
        return self.slurm.nodes.most

    @property
    def per_node(self) -> int:
        return self.slurm.ranks_per_node

    def lead(self, save_seconds: float) -> int:
        """Return how many seconds before the time limit the ranks get the signal to save:
        slurm.lead, else launch.grace or twice `save_seconds` (one step and one save), whichever is
        longer, and the time that the signal takes."""
        if self.slurm.lead is not None:
            return int(self.slurm.lead.seconds or 0)
        return round(max(self.launch.grace.seconds or 0.0, 2 * save_seconds) + _LATE)

    def notes(self) -> list[str]:
        return [*super().notes(), *self.slurm.notes()]

    def problems(self, world_size: int | None = None) -> Problems:
        problems = super().problems(None if self.elastic else self.world_size)
        limit, lead = self.slurm.time.seconds if self.slurm.time else None, self.lead(0.0)
        if limit and limit <= lead:
            problem = f"{self.slurm.time} is not longer than the {lead} s reserved for saving"
            todo = "set a longer time, or lower launch.grace or slurm.lead"
            problems.append(("slurm.time", problem, todo))
        if self.slurm.array is not None:
            problem = "is for submit shards, whose tasks share one build"
            problems.append(("slurm.array", problem, "set slurm.runs=FILE for an array of runs"))
        wants_gpus = self.machine.memory_bytes is not None
        if wants_gpus and not self.slurm.has_gpus:
            problem = f"no GPU is requested, but machine is {self.machine.name}"
            todo = "set the number of GPUs, or choose machine=cpu"
            problems.append(("slurm.gpus_per_node", problem, todo))
        return problems
