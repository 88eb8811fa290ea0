"""What a job holds on each rank, in bytes: model states to the last byte, activations by estimate.

The states are those that DeepSpeed 0.19.8 really keeps under our engine, with its padding and
whatever it keeps beyond the ZeRO paper's table (Rajbhandari et al. 2020, arXiv 1910.02054, section
3). Found by listing every tensor of real ranks (tests/distributed/test_real_costs.py holds the
formulas to them); layouts are described in engine/layout.py. Invariant: imports no torch.

What is beyond the table:
- Stages 1 and 2 pad each parameter group to a multiple of 2 elements a rank, and keep whole the
  gradients of parameters that a border cuts. Muon's momentum there is of whole matrices too, and
  kept twice: the staged one stays.
- Stage 1 keeps whole gradients while micro-batches are accumulated; stage 2 reduces each one.
- Stage 3 pads each parameter to a multiple of the ranks; keeps all small parameters (up to
  stage3_param_persistence_threshold elements) whole beside their partition, its gradient partition
  and its bucket all the time, and after their use what is used again soon.
- In the update fp32 copies of gradients are made, a group (stage 3: a sub-group) at a time.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from forescale.config.train import TrainJob
from forescale.engine.deepspeed_config import deepspeed_config
from forescale.engine.optim import Group
from forescale.models.config import ModelConfig
from forescale.models.flops import Activations, activations
from forescale.plan.parameters import Inventory
from forescale.plan.zero3 import walk

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_ALIGNMENT = 2  # elements: DeepSpeed's nccl_start_alignment_factor
_SUB_GROUP = 10**9  # elements: its sub_group_size
_MOST_MUON_BUFFERS = 256 << 20  # bytes of all-gather buffers that stage 3 keeps for Muon


@dataclass(frozen=True)
class States:
    """Bytes of one rank. On the device, but for `host`."""

    weights: int = 0  # as they are computed with
    resident: int = 0  # stage 3: small parameters, whole, and the second, nearer partition
    gathered: int = 0  # stage 3: parameters in use, at most
    gradients: int = 0  # the most that stands while micro-batches are accumulated
    held: int = 0  # gradients between backward and update
    masters: int = 0  # fp32 weights
    moments: int = 0  # of the optimizer
    update: int = 0  # fp32 gradients, while weights are updated and activations are gone
    buckets: int = 0  # of communication
    host: int = 0  # in the memory of the CPU, with offload

    @property
    def steady(self) -> int:
        """What stands all the time."""
        return self.weights + self.resident + self.masters + self.moments

    @property
    def backward(self) -> int:
        """At the height of forward and backward, without activations."""
        return self.steady + self.gathered + self.gradients + self.buckets

    @property
    def updating(self) -> int:
        return self.steady + self.held + self.update


@dataclass(frozen=True)
class Settings:
    """What the derived DeepSpeed configuration says, with DeepSpeed's defaults."""

    stage: int
    size: int  # bytes of a weight
    world: int
    accumulation: int
    zero: Mapping[str, Any]

    @classmethod
    def of(cls, job: TrainJob, world: int) -> "Settings":
        micro_batches = job.train.global_batch // (job.train.micro_batch * world)
        zero = deepspeed_config(job, world)["zero_optimization"]
        size = _BYTES[job.precision.kind]
        return cls(zero["stage"], size, world, max(1, micro_batches), zero)

    @property
    def bucket(self) -> int:
        """Elements."""
        return int(self.zero["reduce_bucket_size"])

    @property
    def overlap(self) -> bool:
        told = self.zero.get("overlap_comm")
        return self.stage == 3 if told is None else bool(told)

    @property
    def near(self) -> int:
        """Ranks of the hierarchical partition; 1: none."""
        return int(self.zero.get("zero_hpz_partition_size", 1))

    @property
    def persistence(self) -> int:
        return int(self.zero.get("stage3_param_persistence_threshold", 10**5))

    @property
    def reuse(self) -> int:
        return int(self.zero.get("stage3_max_reuse_distance", 10**9))

    @property
    def prefetch(self) -> int:
        return int(self.zero.get("stage3_prefetch_bucket_size", 5 * 10**7))

    def offloads(self, what: str) -> bool:
        device = (self.zero.get(what) or {}).get("device", "none")
        return device not in ("none", None)


def states(
    job: TrainJob,
    held: Inventory,
    world: int,
    rank: int | None = None,
) -> States:
    """The bytes of `rank`, or of the rank that holds most."""
    s = Settings.of(job, world)
    if s.stage == 0:
        return _replicated(s, held)
    if s.stage == 3:
        return _offloaded(s, held, _partitioned(s, held, recomputes(job)))
    return _offloaded(s, held, _sharded(s, held, rank))


def recomputes(job: TrainJob) -> bool:
    return isinstance(job.model, ModelConfig) and job.model.activation_checkpointing


def _replicated(s: Settings, held: Inventory) -> States:
    n, mixed, groups = held.numel, s.size < 4, held.groups
    return States(
        weights=n * s.size,
        gradients=n * s.size,
        held=n * s.size,
        masters=4 * n if mixed else 0,
        moments=sum(_moments(g, sum(p.numel for p in g.params), len(g.params)) for g in groups),
        update=4 * n if mixed else 0,
    )


def _moments(group: Group, numel: int, units: int) -> int:
    """AdamW: two moments and a counter a tensor. Muon: one, of stages that keep it in fp32."""
    return 4 * numel if group.use_muon else 8 * numel + 4 * units


def _sharded(s: Settings, inventory: Inventory, rank: int | None) -> States:
    """Stages 1 and 2."""
    groups = inventory.groups
    parts = {g.name: partition(g, s.world) for g in groups}
    whole = {g.name: touched(g, s.world) for g in groups}
    muon = [g.name for g in groups if g.use_muon]

    def size_of(r: int) -> int:
        return sum(whole[name][r] * (3 if name in muon else 1) for name in whole)

    if rank is None:
        rank = max(range(s.world), key=size_of)
    held = s.size * sum(whole[g.name][rank] for g in groups)
    accumulates = s.stage == 1 and s.accumulation > 1
    largest = max(parts.values())
    return States(
        weights=s.size * s.world * sum(parts.values()),
        gradients=s.size * inventory.numel if accumulates else held,
        held=held,
        masters=4 * sum(parts.values()),
        moments=sum(
            # once as it is, once as it is to be
            2 * s.size * whole[g.name][rank] if g.use_muon else _moments(g, parts[g.name], 1)
            for g in groups
        ),
        update=4 * largest,
        buckets=s.size * s.bucket * (2 if s.overlap else 1),
    )


def partition(group: Group, world: int) -> int:
    """Elements of a rank's part of a group at stages 1 and 2."""
    step = _ALIGNMENT * world
    return -(-sum(p.numel for p in group.params) // step) * _ALIGNMENT


def touched(group: Group, world: int) -> list[int]:
    """Of each rank, the elements of all parameters of which it owns some, counted whole."""
    part, start = partition(group, world), 0
    changes = [0] * (world + 1)
    for p in group.params:
        changes[start // part] += p.numel
        start += p.numel
        changes[(start - 1) // part + 1] -= p.numel
    sums, total = [], 0
    for change in changes[:world]:
        total += change
        sums.append(total)
    return sums


def _partitioned(s: Settings, inventory: Inventory, recompute: bool) -> States:
    """Stage 3."""
    groups, every = inventory.groups, inventory.parameters
    parts = {g.name: sum(-(-p.numel // s.world) for p in g.params) for g in groups}
    alone = s.world == 1  # then the partition is the whole, and nothing is copied
    resident = [p for p in every if p.numel <= s.persistence and not alone]
    # Each parameter's second partition stands from the first use of a step to its update.
    second = sum(-(-p.numel // s.world) * s.world // s.near for p in every) if s.near > 1 else 0
    trace = walk(every, {p.name for p in resident}, s.reuse, recompute)
    rest = inventory.numel - sum(p.numel for p in resident)
    most = 0 if alone else min(trace.most + s.prefetch, rest)
    largest = max(min(part, max(_SUB_GROUP // s.world, 1)) for part in parts.values())
    muon = 2 * s.size * s.world * sum(parts[g.name] for g in groups if g.use_muon)
    return States(
        weights=s.size * sum(parts.values()),
        resident=s.size * (sum(p.numel for p in resident) + second),
        gathered=s.size * most,
        gradients=s.size * sum(parts.values()),
        held=s.size * sum(parts.values()),
        masters=4 * sum(parts.values()),
        moments=sum(
            s.size * parts[g.name] if g.use_muon else 8 * parts[g.name] + 4 * _sub_groups(g)
            for g in groups
        ),
        update=4 * largest,
        buckets=s.size * s.bucket + min(muon, _MOST_MUON_BUFFERS),
    )


def _sub_groups(group: Group) -> int:
    """How many sub-groups DeepSpeed cuts a group into: whole parameters, until they are enough."""
    count, filled = 1, 0
    for p in group.params:
        if filled >= _SUB_GROUP:
            count, filled = count + 1, 0
        filled += p.numel
    return count


def _offloaded(s: Settings, held: Inventory, on_device: States) -> States:
    """With optimizer or parameters in CPU memory; by its structure, not held to the byte."""
    found = on_device
    if s.offloads("offload_optimizer"):
        largest = s.size * max(p.numel for p in held.parameters)
        gradients = 2 * found.masters if s.stage < 3 else found.masters
        host = found.masters + found.moments + gradients
        found = replace(
            found, masters=0, moments=0, update=0, held=0, gradients=largest, host=found.host + host
        )
    if s.offloads("offload_param"):
        found = replace(found, weights=0, host=found.host + found.weights)
    return found


@dataclass(frozen=True)
class Memory:
    """Of one rank, with a micro-batch. activations: None where the model isn't ours."""

    states: States
    activations: Activations | None
    reserved: int = 0
    margin: int = 0

    @property
    def at_backward(self) -> int:
        return self.states.backward + (self.activations.total if self.activations else 0)

    @property
    def peak(self) -> int:
        """The height of a step, without what is reserved."""
        return max(self.at_backward, self.states.updating)

    @property
    def total(self) -> int:
        return self.peak + self.reserved + self.margin

    def rows(self) -> dict[str, int]:
        """By kind; they add up to `total`."""
        s, a = self.states, self.activations
        return {
            "weights": s.weights + s.resident,
            "gradients": s.gradients,
            "fp32 weights": s.masters,
            "moments": s.moments,
            "gathered weights": s.gathered,
            "buckets": s.buckets,
            "activations": a.total - a.logits if a else 0,
            "logits": a.logits if a else 0,
            "update, beyond that": self.peak - self.at_backward,
            "margin": self.margin,
            "driver, libraries": self.reserved,
        }


def memory(
    job: TrainJob,
    held: Inventory,
    world: int,
    fused_norms: bool = True,
    reserved: int = 0,
    margin: int = 0,
) -> Memory:
    """What a rank of a settled job holds; its activations by forescale.models.flops."""
    found = None
    if isinstance(job.model, ModelConfig):
        found = activations(
            job.model,
            job.train.micro_batch,
            job.train.sequence_length,
            _BYTES[job.precision.kind],
            masked=job.data.document_mask,
            fused_norms=fused_norms,
        )
    return Memory(states(job, held, world), found, reserved, margin)


def checkpoint_bytes(job: TrainJob, held: Inventory) -> int:
    """Of one checkpoint, all ranks: fp32 weights and the optimizer's moments; Muon's in the
    precision that its stage keeps it in."""
    size = 4 if job.engine.stage == 0 else _BYTES[job.precision.kind]
    return sum(p.numel * (4 + (size if g.use_muon else 8)) for g in held.groups for p in g.params)


def as_dict(found: Any) -> dict[str, int]:
    return {f.name: getattr(found, f.name) for f in fields(found)}
