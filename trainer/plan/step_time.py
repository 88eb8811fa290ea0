"""Predict the time of a step: computation from FLOPs, waiting from bytes.

The speed of computation comes from the best of three sources. From the least to the most reliable:
the work of a micro-batch (work.py) at the speeds of the machine; the MFU of the whole step in
`plan.mfu`; the logged rows of a run on the same devices (`plan.from_run`). The last two already
include the waiting.
Invariant: imports no torch; without a known peak, times are None and not guessed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from operator import truediv
from statistics import median

from forescale.config.sections.lora import LoraConfig
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.models.config import ModelConfig
from forescale.monitor.status import Status
from forescale.plan.bytes.memory import holders
from forescale.plan.bytes.parameters import Inventory, Parameter
from forescale.plan.bytes.pipeline import bubble, of_stage, parts_of
from forescale.plan.bytes.zero import BYTES
from forescale.plan.config import MachineConfig, PlanJob
from forescale.plan.links import Collective, exposed
from forescale.plan.work import Work, work_of
from forescale.run.directory import Run

SAME_SPEED = 1.01  # the times are estimates: a percent says nothing
_UPDATE = 14  # bytes per parameter: fp32 weight, read and written; gradient; rounded weight
_MOMENT = 8  # bytes per moment of a parameter, read and written
# Of train.invariant, see engine/invariant.py: how often an element of a micro-batch's gradient is
# read or written until it is rounded, and the bytes per element until its square is added.
_ROUNDED, _SQUARED = 9, 116


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs of one token, forward and backward, counted in different ways."""

    full: float  # attention over the whole square, as MFU counts
    causal: float  # attention exactly causal
    six_n: float  # 6N, without attention
    forward: float  # of an evaluation, attention as in full
    recomputed: float = 0.0  # repeated in the backward pass; not in the others


def token_flops(
    config: ModelConfig, lora: LoraConfig, length: int, six_n: float, ranks: int = 1
) -> TokenFlops:
    """Return the FLOPs of a token in a sequence of `length` tokens that `ranks` divide. lora: the
    adapters that are trained alone, if its rank is not 0."""
    return TokenFlops(
        full=lora.flops_per_token(config, length),
        causal=lora.flops_per_token(config, length, causal=True),
        six_n=six_n,
        forward=lora.flops_forward(config, length),
        recomputed=lora.flops_recomputed(config, length, ranks),
    )


@dataclass(frozen=True)
class MeasuredSpeed:
    """The speed of a run, from its logged rows.

    seconds: median of its steps. rate: FLOP/s of one device, with full attention and recomputation;
    the time includes waiting. steps: number of steps in the median.
    """

    run: str
    job: TrainJob
    flops: TokenFlops
    world: int
    seconds: float
    rate: float
    steps: int


@dataclass(frozen=True)
class StepTime:
    """The predicted time of an optimizer step, in seconds. parts: of the computation by what takes
    it, where the speed is that of work.py."""

    computing: float | None  # None: no speed is known
    links: float  # communication, if nothing else ran
    waiting: float  # the part of the communication that computation does not hide
    tokens: int
    flops: float  # of the step, as MFU counts
    peak: float | None  # of all devices, FLOP/s
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def seconds(self) -> float | None:
        """Seconds of the whole step; None without a known speed."""
        return None if self.computing is None else self.computing + self.waiting

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of all ranks; None without a known speed."""
        return self.tokens / self.seconds if self.seconds else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs utilization; None without a known speed or peak."""
        return self.flops / self.seconds / self.peak if self.seconds and self.peak else None


def peak_of(job: TrainJob, machine: MachineConfig) -> float | None:
    """Return the peak FLOP/s of one device in the precision of the job; None if not known."""
    peak = machine.peak_fp32 if job.precision.kind == "fp32" else machine.peak_bf16
    return job.logging.peak_flops or peak


def predict_step_time(
    job: TrainJob,
    trained: Inventory,
    per_token: TokenFlops,
    traffic: Sequence[Collective],
    machine: MachineConfig,
    world: int,
    per_node: int,
    mfu: float | None = None,
    measured: MeasuredSpeed | None = None,
    work: Work | None = None,
) -> StepTime:
    """Return the StepTime of a job on `world` ranks, `per_node` of them on each node.

    work: of a rank in a micro-batch, if it is known. traffic: the collectives of a step. `measured`
    has precedence over `mfu`, and `mfu` over the speeds of the machine.
    """
    tokens = job.tokens_per_step
    links = sum(c.seconds(machine, per_node) for c in traffic)
    peak = peak_of(job, machine)
    all_peaks = peak * world if peak else None
    flops, recomputed = per_token.full * tokens, per_token.recomputed * tokens
    if measured is not None:
        seconds = (flops + recomputed) / world / measured.rate
        return StepTime(seconds, links, 0.0, tokens, flops, all_peaks)
    if peak is None:
        return StepTime(None, links, 0.0, tokens, flops, None)
    if mfu is not None:
        return StepTime(flops / (mfu * peak * world), links, 0.0, tokens, flops, all_peaks)
    mesh, parts = job.mesh(world), dict[str, float]()
    stages, rounds = parts_of(job, world), job.accumulation(world)
    slowest = max(stages, key=lambda part: part.share)
    of_rank = trained.of_rank(mesh)
    if (work := work or work_of(job, of_rank.numel, mesh)) is not None:
        times = rounds * slowest.share
        parts = {name: times * s for name, s in work.parts(machine, peak).items()}
        computing = sum(parts.values())
    else:
        computing = (flops + recomputed) / world / (peak * machine.efficiency)
    of_rank = of_stage(trained, job, slowest.stage).of_rank(mesh)
    waiting = exposed(traffic, machine, per_node, computing)
    divides = mesh.shards * mesh.tensor if job.engine.stage else None
    after = {"update": update_seconds(of_rank, machine, peak, divides)}
    if mesh.pipeline > 1:
        inner = [c for c in traffic if c.is_inner]
        passing = computing + exposed(inner, machine, per_node, computing)
        after["bubble"] = bubble(job, stages) * passing / rounds / slowest.share
    if job.train.invariant:
        after["invariant sums"] = _invariant_seconds(job, of_rank, machine, rounds, divides or 1)
    parts = parts and {**parts, **after}
    return StepTime(
        computing + sum(after.values()), links, waiting, tokens, flops, all_peaks, parts
    )


def computing_seconds(job: PlanJob, machine: MachineConfig) -> float:
    """Return the least seconds of the forward and backward passes of a step of one of our models,
    at a known peak: without communication, and without the reading of weights."""
    world, peak = job.world_size, peak_of(job, machine)
    work = work_of(job, 0, job.mesh(world))
    assert work is not None, "of our own model"
    assert peak is not None, "a speed is known"
    times = job.accumulation(world) * max(part.share for part in parts_of(job, world))
    return times * work.seconds(machine, peak)


def update_seconds(
    trained: Inventory, machine: MachineConfig, peak: float, world: int | None = None
) -> float:
    """Return the seconds of the update of all parameters on one GPU; with `world`, of its share of
    the parameters that ranks divide."""
    total = 0.0
    for group in trained.groups:
        ranks = holders(group, world) if world else 1
        # Each matrix is orthogonalised on one rank, also of those that have parts of it; with an
        # offloaded optimizer on each.
        parts = [group.parts if p.name in trained.cut else 1 for p in group.params]
        flops = [
            group.update.flops(_whole(p, trained.cut, of))
            for p, of in zip(group.params, parts, strict=True)
        ]
        mean = sum(map(truediv, flops, parts)) / ranks
        seconds = max(mean, max(flops)) / (peak * machine.efficiency)
        if machine.memory_bandwidth is not None:
            size = sum(p.numel for p in group.params) * (_UPDATE + _MOMENT * group.update.moments)
            seconds += size / machine.memory_bandwidth / ranks
        total += seconds
    return total


def _whole(p: Parameter, cut: Mapping[str, int], parts: int) -> tuple[int, ...]:
    """Return the shape of the matrix that a parameter is one of so many parts of."""
    return tuple(n * (parts if i == cut.get(p.name) else 1) for i, n in enumerate(p.shape))


def _invariant_seconds(
    job: TrainJob, trained: Inventory, machine: MachineConfig, rounds: int, world: int
) -> float:
    """Return the seconds in which a rank rounds its gradients, and adds the squares of its part."""
    if machine.memory_bandwidth is None:
        return 0.0
    rounded = rounds * _ROUNDED * BYTES[job.precision.kind]
    total = 0.0
    for group in trained.groups:
        ranks = holders(group, world) if job.engine.stage else 1
        total += sum(p.numel for p in group.params) * (rounded + _SQUARED / ranks)
    return total / machine.memory_bandwidth


def measure(target: str, root: str) -> MeasuredSpeed:
    """Return the speed of a run: the median of its steps without the first tenth.

    Raises UserError if the run has too few rows, no checkpoint (which records the number of ranks),
    or a model of the user's own class.
    """
    status = Status(Run.existing(target, root))
    where = f"plan.from_run={target}"
    job, rows = status.job, status.train
    if not isinstance(job.model, ModelConfig):
        problem = "its model is a class of your own or of transformers, whose FLOPs are not known"
        raise UserError(where, problem, "set plan.mfu instead")
    if len(rows) < 5 or not status.checkpoints:
        problem = f"it has {len(rows)} rows and {len(status.checkpoints)} checkpoints"
        todo = "let it train for a few dozen steps and save a checkpoint, then plan again"
        raise UserError(where, problem, todo)
    rows = rows[max(1, len(rows) // 10) :]
    seconds = median(r["seconds"].get("compute", 0.0) + r["seconds"].get("data", 0.0) for r in rows)
    world = int(status.checkpoints[-1].state["world_size"])
    ranks = job.engine.sequence_parallel
    per_token = token_flops(job.model, job.lora, job.train.sequence_length, 0.0, ranks)
    flops = (per_token.full + per_token.recomputed) * job.tokens_per_step
    rate = flops / world / seconds
    return MeasuredSpeed(status.run.name, job, per_token, world, seconds, rate, len(rows))
