"""The ways to shard a job: memory, communication and time of each, and the smallest fix that fits.

Invariant: an option changes the ZeRO stage, the hierarchical partition, the micro-batch, activation
checkpointing or the number of GPUs. It never changes what the model learns.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, cast

from forescale.config.train import TrainJob
from forescale.models.config import CHECKPOINTINGS, Checkpointing, ModelConfig
from forescale.plan.bytes.memory import Memory, activations_of, memory
from forescale.plan.bytes.parameters import Inventory, inventory
from forescale.plan.communication import collectives
from forescale.plan.config import MachineConfig, PlanConfig, PlanJob
from forescale.plan.links import Collective
from forescale.plan.step_time import (
    SAME_SPEED,
    MeasuredSpeed,
    StepTime,
    TokenFlops,
    predict_step_time,
)
from forescale.plan.work import Work

J = TypeVar("J", bound=TrainJob)
_MOST_GPUS = 16_384
MOST_MICRO_BATCH = 2**16
_UNIT = 256  # columns: steps in which the longest window is looked for
_LONGEST = 2**26  # columns


@dataclass(frozen=True)
class ShardingOption:
    """The job with one way to shard it, and what that way needs."""

    name: str
    job: PlanJob
    memory: Memory
    other_activations: dict[str, int]  # bytes with the other choices of activation checkpointing
    largest_micro_batch: int | None  # that fits and divides the global batch; None: none does
    memory_micro_batch: int | None  # that fits with a larger global batch; None: not known
    longest_window: int | None  # that fits, one at a time; None: not known
    traffic: list[Collective]
    inside_seconds: float  # per step, of the links inside a node
    between_seconds: float  # per step, of the links between nodes
    latency_seconds: float  # per step, of all collectives, however few bytes they send
    step: StepTime

    def fits(self, available: float) -> bool:
        """Whether the memory of a rank fits in `available` bytes."""
        return self.memory.total <= available

    def is_as_fast_as(self, other: "ShardingOption") -> bool:
        """Whether a step takes at most a percent longer; False if a time isn't known."""
        mine, others = self.step.seconds, other.step.seconds
        return mine is not None and others is not None and mine <= SAME_SPEED * others

    @property
    def is_limited_by_batch(self) -> bool:
        """Whether a larger micro-batch would fit, if the global batch had more windows."""
        largest, room = self.largest_micro_batch, self.memory_micro_batch
        is_whole = largest == self.job.batch_ramp.first // _groups(self.job)
        return is_whole and room is not None and room > (largest or 0)


@dataclass(frozen=True)
class ShardingOptions:
    """Evaluates the ways to shard a job; the fields are the same for all of them.

    longest: the longest window that the config allows, model.max_sequence_length as given; None:
    any. A table of learned positions grows with the window.
    """

    trained: Inventory
    per_token: TokenFlops
    machine: MachineConfig
    plan: PlanConfig
    measured: MeasuredSpeed | None
    longest: int | None = None

    def all(self, job: PlanJob) -> list[ShardingOption]:
        """Return the stages 0 to 3 that the job allows; on several nodes also 3 with a hierarchical
        partition."""
        jobs = [staged(job, stage) for stage in range(4)]
        near = job.engine.hierarchical_partition
        # A hierarchical partition is of whole matrices.
        if (job.nodes > 1 and job.engine.tensor_parallel == 1) or near > 1:
            jobs.append(staged(job, 3, near if near > 1 else job.per_node))
        return [self.evaluate(j) for j in jobs if not is_refused(j)]

    def evaluate(self, job: PlanJob) -> ShardingOption:
        """Return memory, communication and time of `job` as it is configured."""
        per_node, machine = job.per_node, self.machine
        traffic = collectives(job, self.trained, job.world_size)
        other_activations: dict[str, int] = {}
        for how in [*less_checkpointing(job), *more_checkpointing(job)]:
            if each := self.memory(with_checkpointing(job, how)).activations:
                other_activations[how] = each.total - each.logits
        return ShardingOption(
            name=name_of(job),
            job=job,
            memory=self.memory(job),
            other_activations=other_activations,
            largest_micro_batch=self.largest_micro_batch(job),
            memory_micro_batch=self.memory_micro_batch(job),
            longest_window=self.longest_window(job),
            traffic=traffic,
            inside_seconds=sum(t.inside_seconds(machine, per_node) for t in traffic),
            between_seconds=sum(t.between_seconds(machine, per_node) for t in traffic),
            latency_seconds=sum(t.latency_seconds(machine, per_node) for t in traffic),
            step=self.step(job, traffic),
        )

    def step(
        self, job: PlanJob, traffic: Sequence[Collective], work: Work | None = None
    ) -> StepTime:
        """Return the time of a step of `job` with these collectives. work: if it is known."""
        return predict_step_time(
            job, self.trained, self.per_token, traffic, self.machine, job.world_size, job.per_node,
            self.plan.mfu, self.measured, work,
        )  # fmt: skip

    def run_seconds(self, option: ShardingOption) -> float | None:
        """Return the seconds of all steps of a run, with fewer windows while the batch grows; None
        without a known speed."""
        if option.step.seconds is None:
            return None
        job, ramp = option.job, option.job.batch_ramp
        seconds = option.step.seconds * (job.total_steps - ramp.steps)
        for windows, steps in ramp.stages():
            one = _trained(job, global_batch=windows, first_batch=None, batch_ramp=None)
            step = self.step(one, collectives(one, self.trained, one.world_size))
            seconds += steps * (step.seconds or 0.0)
        return seconds

    def memory(self, job: PlanJob) -> Memory:
        """Return the memory of a rank, including the reserved bytes and the margin."""
        rest = self.reserved(job)
        return memory(job, self.trained, job.world_size, self.machine.fused_norms, *rest)

    def reserved(self, job: PlanJob) -> tuple[int, int]:
        """Return the bytes that the driver and libraries take, and those of the margin."""
        return int(self.machine.reserved_bytes), int(self.plan.margin * self.available_to(job))

    def available_to(self, job: PlanJob) -> float:
        """Return the memory of a GPU in bytes, or a rank's share of this computer's memory."""
        if self.machine.memory_bytes is not None:
            return self.machine.memory_bytes
        import psutil

        return psutil.virtual_memory().total / job.per_node

    def fits(self, job: PlanJob) -> bool:
        """Whether the memory of a rank fits."""
        return self.memory(job).total <= self.available_to(job)

    def largest_micro_batch(self, job: PlanJob) -> int | None:
        """Return the largest micro-batch that divides the batch and fits; None if none does."""
        each = job.batch_ramp.first // _groups(job)
        for micro in range(min(each, MOST_MICRO_BATCH), 0, -1):
            if each % micro == 0 and self.fits(_trained(job, micro_batch=micro)):
                return micro
        return None

    def memory_micro_batch(self, job: PlanJob) -> int | None:
        """Return the largest micro-batch that fits if the global batch grows with it; None if none
        does, or if the memory of activations is not known."""
        groups = _groups(job)
        base = self.memory(_trained(job, micro_batch=1, global_batch=groups))
        if base.activations is None:
            return None

        def is_too_large(micro: int) -> bool:
            batched = _trained(job, micro_batch=micro, global_batch=micro * groups)
            return not self._fits_beside(base, batched)

        # The first that doesn't fit, by bisection, is one too large.
        return bisect_left(range(1, MOST_MICRO_BATCH), True, key=is_too_large) or None

    def longest_window(self, job: PlanJob) -> int | None:
        """Return the longest window that fits, one at a time: the longest that the config allows,
        or a multiple of _UNIT columns for each rank; None if none does, or if the memory of
        activations is not known."""
        base = self.memory(_trained(job, micro_batch=1))
        if base.activations is None:
            return None
        ranks, longest = job.engine.sequence_parallel, self.longest or _LONGEST
        longest -= longest % ranks
        has_table = any(p.name == "position.weight" for p in self.trained.parameters)
        grows = has_table and self.longest is None  # the table, and so the states, with the window

        def is_too_long(length: int) -> bool:
            long = _trained(job, sequence_length=length, micro_batch=1)
            if not grows:
                return not self._fits_beside(base, long)
            model = replace(cast(ModelConfig, job.model), max_sequence_length=length)
            long = replace(long, model=model)
            return not replace(self, trained=inventory(long)).fits(long)

        if not is_too_long(longest):
            return longest
        unit = _UNIT * ranks
        sizes = range(1, longest // unit + 1)
        return unit * bisect_left(sizes, True, key=lambda n: is_too_long(n * unit)) or None

    def _fits_beside(self, base: Memory, job: PlanJob) -> bool:
        """Whether the activations of `job` fit beside the states of `base`, which are also its
        own: a bisection asks some forty times, and the states take longest."""
        if job.engine.pipeline_parallel > 1:  # another stage may be the fullest
            return self.fits(job)
        changed = replace(base, activations=activations_of(job, self.machine.fused_norms))
        return changed.total <= self.available_to(job)

    def smallest_fix(self, job: PlanJob) -> str | None:
        """Return the config keys of the smallest change with which the job fits the same GPUs,
        without groups of ranks beside the job's; None if none was found."""
        if (micro := self.largest_micro_batch(job)) is not None:
            return f"set train.micro_batch={micro}"
        variants = _variants(job)
        first = job.engine.stage  # a small model may only fit below it, where there are no buckets
        for stage in (*range(first, 4), *reversed(range(first))):
            for keys, variant in variants:
                other = staged(variant, stage)
                if is_refused(with_micro_batch(other, 1)):
                    continue
                if (micro := self.largest_micro_batch(other)) is not None:
                    less = f"train.micro_batch={micro}" if micro < job.train.micro_batch else ""
                    return f"set {keys}{engine_keys(job, other)}{less}".strip()
        return None

    def more_gpus(self, job: PlanJob) -> str | None:
        """Return the config keys with which the job fits more GPUs; None if none was found."""
        keys, last = _variants(job)[-1]
        gpus = 2 * job.world_size
        while gpus <= _MOST_GPUS and job.batch_ramp.first % job.mesh(gpus).data == 0:
            wide = staged(replace(last, plan=replace(last.plan, gpus=gpus, nodes=None)), 3)
            if (micro := self.largest_micro_batch(wide)) is not None:
                engine = engine_keys(job, wide)
                return f"set {keys}{engine}plan.gpus={gpus} train.micro_batch={micro}"
            gpus *= 2
        return None


def _variants(job: PlanJob) -> list[tuple[str, PlanJob]]:
    """Return the job, and with more activation checkpointing, each with the keys that it needs."""
    others = ((how, with_checkpointing(job, how)) for how in more_checkpointing(job))
    return [("", job), *((f"model.activation_checkpointing={how} ", one) for how, one in others)]


def cheapest(options: Sequence[ShardingOption], available: float) -> ShardingOption | None:
    """Return the fastest of the options that fit in `available` bytes, and of equally fast ones the
    first, which shards the least; without a known speed, the first that fits. None: none fits."""
    fitting = [option for option in options if option.fits(available)]
    fastest = min(fitting, key=lambda option: option.step.seconds or 0.0, default=None)
    return next((o for o in fitting if fastest and o.is_as_fast_as(fastest)), fastest)


def name_of(job: PlanJob) -> str:
    """Return the short name of the job's division, such as zero2-offload, zero3-hpz8-tp2 or, of 8
    stages with 4 parts each, zero1-pp8x4."""
    e = job.engine
    offload = "-offload" if e.offload_optimizer or e.offload_parameters else ""
    parts = {
        "hpz": e.hierarchical_partition,
        "shard": e.shard_group,
        "pp": e.pipeline_parallel,
        "tp": e.tensor_parallel,
        "sp": e.sequence_parallel,
        "cp": e.context_parallel,
        "ep": e.expert_parallel,
    }
    name = f"zero{e.stage}{offload}" + "".join(f"-{k}{n}" for k, n in parts.items() if n > 1)
    stages = f"-pp{e.pipeline_parallel}"
    return name.replace(stages, f"{stages}x{e.chunks}") if e.chunks > 1 else name


def engine_keys(old: TrainJob, new: TrainJob) -> str:
    """Return the keys that give `old` the engine of `new`, each with a space behind it."""
    before, after = vars(old.engine), vars(new.engine)
    changed = (name for name in after if after[name] != before[name])
    return "".join(f"engine.{name}={str(after[name]).lower()} " for name in changed)


def staged(job: PlanJob, stage: int, near: int = 1) -> PlanJob:
    """Return the job at another stage, without the settings that this stage does not support."""
    old = job.engine
    engine = replace(
        old,
        stage=cast("Literal[0, 1, 2, 3]", stage),
        hierarchical_partition=near,
        offload_optimizer=old.offload_optimizer and stage > 0,
        offload_parameters=old.offload_parameters and stage == 3,
        expert_parallel=old.expert_parallel if near == 1 else 1,
        shard_group=old.shard_group if stage and near == 1 else 0,
        quantized_weights=old.quantized_weights and stage == 3,
    )
    return replace(job, engine=engine)


def is_refused(job: PlanJob) -> bool:
    """Whether a rule of the job refuses its division."""
    return bool([*job.engine.problems(), *job.problems()])


def with_micro_batch(job: PlanJob, micro: int) -> PlanJob:
    """Return the job with another micro-batch."""
    return _trained(job, micro_batch=micro)


def _groups(job: PlanJob) -> int:
    """Return the number of ranks, or groups of them, that are fed different windows."""
    return job.mesh(job.world_size).data


def _trained(job: PlanJob, **keys: Any) -> PlanJob:
    """Return the job with other keys of `train`."""
    return replace(job, train=replace(job.train, **keys))


def more_checkpointing(job: TrainJob) -> list[Checkpointing]:
    """Return the choices of activation checkpointing that keep less, the cheapest first."""
    known = checkpointings(job)
    return known[_place(job, known) + 1 :]


def less_checkpointing(job: TrainJob) -> list[Checkpointing]:
    """Return the choices that compute less, the cheapest first."""
    known = checkpointings(job)
    return known[: _place(job, known)]


def checkpointings(job: TrainJob) -> list[Checkpointing]:
    """Return the choices of activation checkpointing that the config allows, the cheapest first;
    none for a class of the user's own."""
    if not isinstance(job.model, ModelConfig):
        return []
    if job.train.activation_memory_budget is not None:
        return ["none"]
    is_refused = job.mesh(1).experts > 1 or job.model.mlp.columns is not None
    return [how for how in CHECKPOINTINGS if how != "selective" or not is_refused]


def _place(job: TrainJob, known: list[Checkpointing]) -> int:
    """Return the place of the job's choice."""
    now = getattr(job.model, "activation_checkpointing", None)
    return known.index(now) if now else 0


def with_checkpointing(job: J, how: Checkpointing) -> J:
    """Return the job with another choice of activation checkpointing, if the model is ours."""
    if not isinstance(job.model, ModelConfig):
        return job
    return replace(job, model=replace(job.model, activation_checkpointing=how))
