"""The ways to shard a job: what each holds, sends and takes, which fit, and the nearest that does.

Invariant: a way changes ZeRO stage, hierarchical partition, micro-batch, activation checkpointing
or the number of GPUs, and nothing that changes what is learnt.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, cast

from forescale.models.config import ModelConfig
from forescale.plan.communication import Collective, collectives
from forescale.plan.config import MachineConfig, PlanConfig, PlanJob
from forescale.plan.memory import Memory, memory
from forescale.plan.parameters import Inventory
from forescale.plan.step_time import Measured, Price, Step, step_of

_MOST_GPUS = 16_384


@dataclass(frozen=True)
class Choice:
    """The job with one way to shard it. largest: micro-batch that fits, None where none does;
    inside_seconds, between_seconds: that the links inside a node and between nodes need a step."""

    name: str
    job: PlanJob
    memory: Memory
    unlike: int  # activation bytes with activation checkpointing the other way round
    largest: int | None
    traffic: list[Collective]
    inside_seconds: float
    between_seconds: float
    step: Step

    def fits(self, available: float) -> bool:
        return self.memory.total <= available


@dataclass(frozen=True)
class Ways:
    """What all ways of one job have in common."""

    held: Inventory
    price: Price
    machine: MachineConfig
    plan: PlanConfig
    measured: Measured | None

    def all(self, job: PlanJob) -> list[Choice]:
        """Stages 0 to 3, and 3 with a hierarchical partition where there are several nodes."""
        jobs = [_staged(job, stage) for stage in range(4)]
        near = job.engine.hierarchical_partition
        if job.nodes > 1 or near > 1:
            jobs.append(_staged(job, 3, near if near > 1 else job.per_node))
        return [self.of(j) for j in jobs]

    def of(self, job: PlanJob) -> Choice:
        world, per_node, machine = job.world_size, job.per_node, self.machine
        traffic = collectives(job, self.held, world)
        mfu = self.plan.mfu
        other = self.memory(_toggled(job)).activations
        return Choice(
            name=name_of(job),
            job=job,
            memory=self.memory(job),
            unlike=other.total - other.logits if other else 0,
            largest=self.largest(job),
            traffic=traffic,
            inside_seconds=sum(t.inside_seconds(machine, per_node) for t in traffic),
            between_seconds=sum(t.between_seconds(machine, per_node) for t in traffic),
            step=step_of(
                job, self.held, self.price, traffic, machine, world, per_node, mfu, self.measured
            ),
        )

    def memory(self, job: PlanJob) -> Memory:
        margin = int(self.plan.margin * self.available_to(job))
        reserved = int(self.machine.reserved_bytes)
        return memory(job, self.held, job.world_size, self.machine.fused_norms, reserved, margin)

    @cached_property
    def _this_computer(self) -> float:
        import psutil

        return psutil.virtual_memory().total

    def available_to(self, job: PlanJob) -> float:
        """Bytes of a GPU, or a rank's share of this computer."""
        return self.machine.memory_bytes or self._this_computer / job.per_node

    def fits(self, job: PlanJob) -> bool:
        return self.memory(job).total <= self.available_to(job)

    def largest(self, job: PlanJob) -> int | None:
        """The largest micro-batch that divides the batch and fits."""
        each = job.train.global_batch // job.world_size
        for micro in range(each, 0, -1):
            if each % micro == 0 and self.fits(_with(job, micro)):
                return micro
        return None

    def nearest(self, job: PlanJob) -> str | None:
        """The smallest change that fits, in keys; None where none is known."""
        if (micro := self.largest(job)) is not None:
            return f"set train.micro_batch={micro}"
        ways = [("", job)]
        if isinstance(job.model, ModelConfig) and not job.model.activation_checkpointing:
            ways.append(("model.activation_checkpointing=true ", _toggled(job)))
        for stage in range(job.engine.stage, 4):
            for keys, way in ways:
                at = _staged(way, stage)
                if (micro := self.largest(at)) is not None:
                    engine = f"engine=zero{stage} " if stage > job.engine.stage else ""
                    less = f"train.micro_batch={micro}" if micro < job.train.micro_batch else ""
                    return f"set {keys}{engine}{less}".strip()
        keys, last = ways[-1]
        gpus = 2 * job.world_size
        while gpus <= _MOST_GPUS and job.train.global_batch % gpus == 0:
            wide = _staged(_on(last, gpus), 3)
            if (micro := self.largest(wide)) is not None:
                return f"set {keys}engine=zero3 plan.gpus={gpus} train.micro_batch={micro}"
            gpus *= 2
        return None


def name_of(job: PlanJob) -> str:
    near = job.engine.hierarchical_partition
    offload = "-offload" if job.engine.offload_optimizer or job.engine.offload_parameters else ""
    return f"zero{job.engine.stage}{offload}" + (f"-hpz{near}" if near > 1 else "")


def _staged(job: PlanJob, stage: int, near: int = 1) -> PlanJob:
    """The job at another stage, without what that stage hasn't got."""
    old = job.engine
    engine = replace(
        old,
        stage=cast("Literal[0, 1, 2, 3]", stage),
        hierarchical_partition=near,
        offload_optimizer=old.offload_optimizer and stage > 0,
        offload_parameters=old.offload_parameters and stage == 3,
    )
    return replace(job, engine=engine)


def _with(job: PlanJob, micro_batch: int) -> PlanJob:
    return replace(job, train=replace(job.train, micro_batch=micro_batch))


def _on(job: PlanJob, gpus: int) -> PlanJob:
    return replace(job, plan=replace(job.plan, gpus=gpus, nodes=None))


def _toggled(job: PlanJob) -> PlanJob:
    """With activation checkpointing the other way round."""
    if not isinstance(job.model, ModelConfig):
        return job
    on = not job.model.activation_checkpointing
    return replace(job, model=replace(job.model, activation_checkpointing=on))
