"""How long a step takes, before it was ever made: computing by FLOPs, waiting by bytes.

Three sources for the computing, from the weakest to the strongest word: the device's peak and the
share of it that `machine.efficiency` says; the MFU of the whole step that `plan.mfu` says; the rows
of a run on such devices (`plan.from_run`). The last two know the waiting already.
Invariant: imports no torch; nothing is guessed where no peak is known, times are then None.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from forescale.config.train import TrainJob
from forescale.errors import UserError
from forescale.models.config import ModelConfig
from forescale.models.flops import flops_per_token, flops_recomputed
from forescale.monitor.status import Status
from forescale.plan.communication import Collective, exposed
from forescale.plan.config import MachineConfig
from forescale.plan.parameters import Inventory
from forescale.run.directory import Run

_NEWTON_SCHULZ = 5  # iterations of Muon's


@dataclass(frozen=True)
class Price:
    """FLOPs of one token, forward and backward: full attention (what MFU counts), exactly causal,
    6N, and what is computed twice besides."""

    full: float
    causal: float
    six_n: float
    again: float = 0.0


def price_of(config: ModelConfig, length: int, six_n: float) -> Price:
    return Price(
        full=flops_per_token(config, length),
        causal=flops_per_token(config, length, causal=True),
        six_n=six_n,
        again=flops_recomputed(config, length),
    )


@dataclass(frozen=True)
class Measured:
    """What a run's rows tell. seconds: median of its steps; rate: FLOP/s of a device, full
    attention and recomputation counted, waits included; steps: how many were looked at."""

    run: str
    job: TrainJob
    price: Price
    world: int
    seconds: float
    rate: float
    steps: int


@dataclass(frozen=True)
class Step:
    """Seconds of an optimizer step, None where no speed is known. links: of its communication if
    nothing else ran; computing; waiting: the part of it that isn't hidden."""

    computing: float | None
    links: float
    waiting: float
    tokens: int
    flops: float  # of the step, as MFU counts
    peak: float | None  # of all devices, FLOP/s

    @property
    def seconds(self) -> float | None:
        return None if self.computing is None else self.computing + self.waiting

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.seconds if self.seconds else None

    @property
    def mfu(self) -> float | None:
        return self.flops / self.seconds / self.peak if self.seconds and self.peak else None


def peak_of(job: TrainJob, machine: MachineConfig) -> float | None:
    """FLOP/s of one device."""
    own = machine.peak_fp32 if job.precision.kind == "fp32" else machine.peak_bf16
    return job.logging.peak_flops or own


def step_of(
    job: TrainJob,
    held: Inventory,
    price: Price,
    found: Sequence[Collective],
    machine: MachineConfig,
    world: int,
    per_node: int,
    mfu: float | None = None,
    measured: Measured | None = None,
) -> Step:
    tokens = job.tokens_per_step
    links = sum(c.seconds(machine, per_node) for c in found)
    peak = peak_of(job, machine)
    all_peaks = peak * world if peak else None
    flops, again = price.full * tokens, price.again * tokens
    if measured is not None:
        seconds = (flops + again) / world / measured.rate
        return Step(seconds, links, 0.0, tokens, flops, all_peaks)
    if peak is None:
        return Step(None, links, 0.0, tokens, flops, None)
    if mfu is not None:
        return Step(flops / (mfu * peak * world), links, 0.0, tokens, flops, all_peaks)
    orthogonal = muon_flops(held) / (world if job.engine.stage else 1)
    computing = ((flops + again) / world + orthogonal) / (peak * machine.efficiency)
    waiting = exposed(found, machine, per_node, computing)
    return Step(computing, links, waiting, tokens, flops, all_peaks)


def muon_flops(held: Inventory) -> float:
    """FLOPs of orthogonalising every matrix of Muon's once (Jordan et al. 2024,
    kellerjordan.github.io/posts/muon): five iterations of X X^T, its square, and a product with X;
    by all ranks together where they share the work."""
    total = 0.0
    for group in held.groups:
        for p in group.params if group.use_muon else ():
            m, n = min(p.shape[0], p.numel // p.shape[0]), max(p.shape[0], p.numel // p.shape[0])
            total += _NEWTON_SCHULZ * (4 * m * m * n + 2 * m**3)
    return total


def measure(target: str, root: str) -> Measured:
    """The speed of a run, by the median of its steps without the first tenth. Raises UserError
    where it has no rows, no checkpoint (which says how many ranks it had), or no model of ours."""
    status = Status(Run.existing(target, root))
    where = f"plan.from_run={target}"
    job, rows = status.job, status.train
    if not isinstance(job.model, ModelConfig):
        raise UserError(where, "its model isn't ours", "give plan.mfu instead")
    if len(rows) < 5 or not status.checkpoints:
        what = f"it has {len(rows)} rows and {len(status.checkpoints)} checkpoints"
        raise UserError(where, what, "let it train for a few dozen steps and save, then plan")
    rows = rows[max(1, len(rows) // 10) :]
    seconds = median(r["seconds"].get("compute", 0.0) + r["seconds"].get("data", 0.0) for r in rows)
    world = int(status.checkpoints[-1].state["world_size"])
    price = price_of(job.model, job.train.sequence_length, 0.0)
    flops = (price.full + price.again) * job.tokens_per_step
    rate = flops / world / seconds
    return Measured(status.run.name, job, price, world, seconds, rate, len(rows))
