"""Memory of each rank in bytes: model states exactly, activations as an estimate.

The model states are those that DeepSpeed 0.19.8 keeps under our engine, including its padding and
what it keeps beyond the table of the ZeRO paper (Rajbhandari et al. 2020, arXiv 1910.02054, section
3). They were found by listing every tensor of real ranks; tests/distributed/test_real_costs.py
compares the formulas with them. engine/stages.py describes the layouts.
Invariant: imports no torch.

Beyond the table of the paper:
- Stages 1 and 2 pad each parameter group to a multiple of 2 elements per rank. If the border
  between two ranks cuts a parameter, both keep its whole gradient. Muon's momentum there also
  covers whole matrices, and is kept twice because the staged copy is never freed.
- Stage 1 keeps all gradients while micro-batches are accumulated; stage 2 reduces them after each.
- Gradients that are added up in fp32 (engine.gradient_dtype) are fp32 wherever they are kept, as
  are the buckets and Muon's momentum. At stage 0 the update then uses them as they are.
- Stage 3 pads each parameter to a multiple of the number of ranks. It always keeps its gradient
  partition, its bucket, and all small parameters (up to stage3_param_persistence_threshold
  elements) whole in addition to their partition. It gathers others ahead of their use, and keeps
  them whole after it if they are used again soon, see zero.py.
- Buffers, such as the counts of experts, are left out: a few numbers.
- The update makes fp32 copies of the gradients of one group (stage 3: one sub-group) at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul

from forescale.config.train import TrainJob
from forescale.engine.optim import Group
from forescale.models.config import ModelConfig
from forescale.models.memory import Activations, activations, of_tensor
from forescale.plan.bytes.muon import gathers
from forescale.plan.bytes.parameters import Inventory, Parameter, inventory
from forescale.plan.bytes.pipeline import Part, of_stage, parts_of
from forescale.plan.bytes.zero import BYTES, GatherTrace, ZeroSettings, block_of

_OUTER_BYTES = 8  # of a parameter: its outer weight and momentum, fp32
_ALIGNMENT = 2  # elements: DeepSpeed's nccl_start_alignment_factor


@dataclass(frozen=True)
class States:
    """Bytes of the model states of one rank; all on the device except `host`."""

    weights: int = 0  # in the precision of the forward pass
    resident: int = 0  # stage 3: small parameters kept whole, and the second, nearer partition
    gathered: int = 0  # stage 3: maximum of the parameters that are gathered at the same time
    gradients: int = 0  # maximum while micro-batches are accumulated
    held: int = 0  # gradients between backward and update
    masters: int = 0  # fp32 weights
    moments: int = 0  # of the optimizer
    update: int = 0  # fp32 gradients during the update, when activations are already freed
    scratch: int = 0  # of the optimizer beside them, for one tensor
    matrices: int = 0  # of Muon before that, see muon.py
    buckets: int = 0  # communication buffers
    stays: int = 0  # those of gradients and buckets that are there between steps too
    later: int = 0  # those that are not there yet in the backward pass of the head
    host: int = 0  # in CPU memory, with offload

    @property
    def steady(self) -> int:
        """Bytes that are allocated during the whole step."""
        return self.weights + self.resident + self.masters + self.moments

    @property
    def between(self) -> int:
        """Bytes that are allocated between steps."""
        return self.steady + self.stays

    @property
    def backward(self) -> int:
        """Maximum during forward and backward, without activations."""
        return self.steady + self.gathered + self.gradients + self.buckets

    @property
    def updating(self) -> int:
        """Maximum during the update."""
        # At stage 3 the gradients that are held are among those that stay.
        gradients = max(self.held, self.stays)
        return self.steady + gradients + max(self.update + self.scratch, self.matrices)


def states(
    job: TrainJob, trained: Inventory, world: int, rank: int | None = None, stage: int = 0
) -> States:
    """Return the model states of `rank`; None: of the rank with the most bytes in a stage of the
    pipeline."""
    s, mesh = ZeroSettings.of(job, world), job.mesh(world)
    stage = stage if rank is None else mesh.stage_of(rank)
    trained = of_stage(trained, job, stage).of_rank(mesh)
    of_rank = _states(s, job, trained, rank)
    if table := sum(p.numel for p in trained.borrowed):
        weights, gradients = of_rank.weights + s.size * table, s.gradient * table
        of_rank = replace(of_rank, weights=weights, gradients=of_rank.gradients + gradients)
    return of_rank


def _states(s: ZeroSettings, job: TrainJob, trained: Inventory, rank: int | None) -> States:
    """Return the states of a rank, of the parameters that it has."""
    if s.stage == 0:
        n, groups = trained.num_trained, trained.groups
        return States(
            weights=trained.numel * s.size,
            gradients=n * s.gradient,
            held=n * s.gradient,
            masters=4 * n if s.size < 4 else 0,
            moments=sum(_moments(g, sum(p.numel for p in g.params), len(g.params)) for g in groups),
            update=4 * n if s.gradient < 4 else 0,
            scratch=4 * max(g.update.scratch * p.numel for g in groups for p in g.params),
        )
    if s.stage == 3:
        of_rank = _partitioned(s, trained, recomputes(job))
    else:
        of_rank = _sharded(s, trained, s.ranks, None if rank is None else rank % s.ranks)
    # Offload is derived from the structure of DeepSpeed; not compared with real ranks.
    if s.offloads("offload_optimizer"):
        gradients = 2 * of_rank.masters if s.stage < 3 else of_rank.masters
        largest = s.gradient * max(p.numel for p in trained.trained)
        of_rank = replace(
            of_rank,
            masters=0,
            moments=0,
            update=0,
            scratch=0,
            held=0,
            later=max(0, of_rank.later - of_rank.held),  # the buckets alone
            gradients=largest,
            stays=of_rank.stays + largest if s.stage < 3 else of_rank.buckets,
            host=of_rank.host + of_rank.masters + of_rank.moments + gradients,
        )
    if s.offloads("offload_param"):
        of_rank = replace(of_rank, weights=0, host=of_rank.host + of_rank.weights)
    return of_rank


def recomputes(job: TrainJob) -> bool:
    """Whether the backward pass calls each block again, and so gathers its weights again. With
    selective checkpointing the block recomputes inside its own backward pass, with its weights."""
    return isinstance(job.model, ModelConfig) and job.model.activation_checkpointing == "full"


def gathers_of(job: TrainJob, world: int) -> GatherTrace:
    """Return the gathers of stage 3 in a micro-batch of a job, whose model sizes are known."""
    trained, s = inventory(job), ZeroSettings.of(job, world)
    return s.gathers(trained.parameters, recomputes(job), trained.experts)


def _moments(group: Group, numel: int, units: int) -> int:
    """Return the bytes of fp32 optimizer state. units: number of tensors that are updated."""
    update = group.update
    return 4 * update.moments * numel + (4 * units if update.has_counter else 0)


def _sharded(s: ZeroSettings, trained: Inventory, world: int, rank: int | None) -> States:
    """Return the states of stages 1 and 2."""
    groups = trained.groups
    parts = [partition(g, world) for g in groups]
    whole = [touched(g, world) for g in groups]
    accumulates = s.stage == 1 and (s.accumulation > 1 or s.waits)
    # A copy of the gradients in their own format, where they are not of one parameter alone.
    size = s.gradient if s.gradient < 4 else 0
    flat = [size] * len(groups)
    if rank is not None:
        flat = [size * (len(overlapping(g, world)[rank]) > 1) for g in groups]
    else:
        # Ranks differ in the two momenta of matrices, and in gradients unless all are kept.
        times = [2 * g.update.is_by_matrix + (not accumulates) for g in groups]
        sizes = [sum(map(mul, times, each)) for each in zip(*whole, strict=True)]
        rank = max(range(world), key=sizes.__getitem__)
    held = s.gradient * sum(of[rank] for of in whole)
    padded = sum(holders(g, world) * n for g, n in zip(groups, parts, strict=True))
    muon = [gathers(s, g, holders(g, world), n) for g, n in zip(groups, parts, strict=True)]
    stays = sum(each.stays for each in muon)
    buckets = s.gradient * s.bucket * (2 if s.overlap else 1)
    return States(
        weights=s.size * (padded + trained.num_frozen),
        gradients=s.gradient * trained.num_trained if accumulates else held,
        held=held,
        masters=4 * sum(parts),
        moments=sum(
            # the current momentum, and the staged one
            2 * s.gradient * of[rank] if g.update.is_by_matrix else _moments(g, part, 1)
            for g, part, of in zip(groups, parts, whole, strict=True)
        ),
        update=4 * max(parts),
        scratch=max(
            n * max(copied, 4 * g.update.scratch)
            for g, n, copied in zip(groups, parts, flat, strict=True)
        ),
        matrices=max(each.most for each in muon),
        buckets=buckets + stays,
        stays=stays,
        later=0 if accumulates else held + buckets,
    )


def holders(group: Group, world: int) -> int:
    """Return the number of ranks that have a group's parameters and divide its states: of `world`
    that have a copy of the states, all, or those with the same experts or parts of matrices."""
    return world // group.parts


def partition(group: Group, world: int) -> int:
    """Return the elements of one rank's partition of a group at stages 1 and 2."""
    step = _ALIGNMENT * holders(group, world)
    return -(-sum(p.numel for p in group.params) // step) * _ALIGNMENT


def overlapping(group: Group, world: int) -> list[list[Parameter]]:
    """Return for each rank the parameters that overlap its partition of a group at stages 1 and
    2."""
    part, start = partition(group, world), 0
    shares: list[list[Parameter]] = [[] for _ in range(holders(group, world))]
    for p in group.params:
        for rank in range(start // part, (start + p.numel - 1) // part + 1):
            shares[rank].append(p)
        start += p.numel
    return [shares[rank // group.parts] for rank in range(world)]


def touched(group: Group, world: int) -> list[int]:
    """Return for each rank the total elements of those parameters. It adds up their begins and
    ends, because a plan needs it for 16,384 ranks some hundred times."""
    part, start = partition(group, world), 0
    change = [0] * (holders(group, world) + 1)  # from one rank to the next
    for p in group.params:
        change[start // part] += p.numel
        start += p.numel
        change[(start - 1) // part + 1] -= p.numel
    sums = list(accumulate(change))
    return [sums[rank // group.parts] for rank in range(world)]


def _partitioned(s: ZeroSettings, trained: Inventory, recompute: bool) -> States:
    """Return the states of stage 3."""
    every, experts = trained.parameters, trained.experts
    ranks = {p.name: s.expert_world if p.name in experts else s.world for p in every}
    part_of = {p.name: -(-p.numel // ranks[p.name]) for p in every}
    among = [ranks[g.params[0].name] for g in trained.groups]
    sizes = [sum(part_of[p.name] for p in g.params) for g in trained.groups]
    groups, total = [*zip(trained.groups, among, sizes, strict=True)], sum(sizes)
    alone = s.world == 1  # then the partition is the whole parameter, and nothing is copied
    resident = [p for p in every if p.numel <= s.persistence and ranks[p.name] > 1]
    # The second partition of a parameter exists from its first use in a step until the update.
    second = sum(-(-p.numel // s.world) * s.world // s.near for p in every) if s.near > 1 else 0
    most = 0 if alone else s.gathers(every, recompute, experts).most
    within = [_sub_groups(s, [part_of[p.name] for p in g.params]) for g in trained.groups]
    largest = max(size for of in within for size in of)
    flat = s.gradient if s.gradient < 4 else 0  # a copy of the gradients in their own format
    divided = [1 if g.names[0] in experts else g.parts for g in trained.groups]
    muon = [gathers(s, g, n, 0, t) for (g, n, _), t in zip(groups, divided, strict=True)]
    buckets = s.sent * s.bucket + sum(each.stays for each in muon)
    return States(
        weights=s.size * sum(part_of.values()),
        resident=s.size * (sum(part_of[p.name] * ranks[p.name] for p in resident) + second),
        gathered=s.size * most,
        gradients=s.gradient * total,
        held=s.gradient * total,
        masters=4 * total,
        moments=sum(
            s.sent * part if g.update.is_by_matrix else _moments(g, part, len(of))
            for (g, _, part), of in zip(groups, within, strict=True)
        ),
        update=4 * largest,
        scratch=largest * max(flat, *(4 * g.update.scratch for g in trained.groups)),
        matrices=max(each.most for each in muon),
        buckets=buckets,
        stays=s.gradient * total + buckets,
    )


def _sub_groups(s: ZeroSettings, parts: Sequence[int]) -> list[int]:
    """Return the elements of each sub-group of a group. parts: those of a rank of each parameter,
    with which DeepSpeed fills one until it has sub_group_size elements."""
    sizes, most = [0], int(s.zero.get("sub_group_size", 10**9))
    for part in parts:
        if sizes[-1] >= most:
            sizes.append(0)
        sizes[-1] += part
    return sizes


@dataclass(frozen=True)
class Memory:
    """Memory of one rank in bytes. activations: None for a model class of the user; start: CPU
    memory for drawing the initial weights."""

    states: States
    activations: Activations | None
    start: int
    reserved: int = 0
    margin: int = 0

    @property
    def at_backward(self) -> int:
        """Maximum during forward and backward."""
        a = self.activations
        if a is None or a.within is None:
            return self.states.backward + (a.total if a else 0)
        return self.states.backward + max(a.at_head - self.states.later, a.at_block)

    @property
    def peak(self) -> int:
        """Maximum of a step, without `reserved` and `margin`."""
        return max(self.at_backward, self.states.updating)

    @property
    def total(self) -> int:
        """Bytes that the GPU must have."""
        return self.peak + self.reserved + self.margin

    def rows(self) -> dict[str, int]:
        """Return the bytes by kind; the kinds add up to `total`."""
        s, a = self.states, self.activations
        logits = min(a.logits, self.at_backward - s.backward) if a else 0
        return {
            "weights": s.weights + s.resident,
            "gradients": s.gradients,
            "fp32 weights": s.masters,
            "moments": s.moments,
            "gathered weights": s.gathered,
            "buckets": s.buckets,
            "activations": self.at_backward - s.backward - logits if a else 0,
            "logits": logits,
            "extra for the update": self.peak - self.at_backward,
            "safety margin": self.margin,
            "driver and libraries": self.reserved,
        }


def memory(
    job: TrainJob,
    trained: Inventory,
    world: int,
    fused_norms: bool = True,
    reserved: int = 0,
    margin: int = 0,
) -> Memory:
    """Return the memory of the rank with the most bytes. The model sizes of the job are known."""
    # A rank draws the initial weights in fp32, all of them; at stage 3 the largest part that the
    # ranks divide as soon as it is drawn (engine/build.py, partition_of), and so, beside what a
    # rank keeps, the experts' others.
    parts: dict[str, int] = {}
    sizes = {p.name: p.numel for p in trained.of_rank(job.mesh(1)).parameters}
    divides = job.engine.stage == 3 and isinstance(job.model, ModelConfig)
    for p in trained.parameters:
        part = block_of(p.name) or p.name.partition(".")[0]
        parts[part] = parts.get(part, 0) + 4 * (p.numel - sizes[p.name] * (not divides))
    start = max(parts.values()) + (0 if divides else 4 * sum(sizes.values()))
    rest = start, reserved, margin
    every = [
        Memory(
            states(job, trained, world, None, part.stage),
            activations_of(job, fused_norms, part),
            *rest,
        )
        for part in fullest(parts_of(job, world))
    ]
    return max(every, key=lambda memory: memory.peak)


def fullest(parts: Sequence[Part]) -> list[Part]:
    """Return the stages of which one has the most bytes: the first holds the most micro-batches,
    one of the next most blocks, and the last one has the head."""
    return [*{part.stage: part for part in [*parts[:2], parts[-1]]}.values()]


def activations_of(
    job: TrainJob, fused_norms: bool = True, part: Part | None = None
) -> Activations | None:
    """Return the activations of a rank; None for a model class of the user. part: of a stage of a
    pipeline; None: the whole model."""
    if not isinstance(job.model, ModelConfig):
        return None
    context = job.engine.context_parallel
    of_rank = activations(
        job.model,
        job.rows_at_once,
        # In a ring a rank keeps what it would of a window of its own columns.
        job.train.sequence_length // context,
        BYTES[job.precision.kind],
        masked=job.data.document_mask or job.objective.pads,
        fused_norms=fused_norms,
        ranks=job.engine.sequence_parallel,
        tensor=job.engine.tensor_parallel,
        budget=job.train.activation_memory_budget,
        compiled=fused_norms and job.train.compile != "off",
        experts=job.engine.expert_parallel,
        trained=not job.lora.rank,
        blocks=None if part is None else part.blocks,
        is_last=part is None or part.is_last,
    )
    if context > 1:
        of_rank = _in_ring(job, of_rank)
    if part is None or job.engine.pipeline_parallel == 1:
        return of_rank
    # Of each micro-batch in flight also what the stage sends.
    sent = 0 if part.is_last else _stream(job)
    held = round(part.held * (of_rank.layers + sent))
    return replace(of_rank, layers=held, mask=round(part.held * of_rank.mask))


def _stream(job: TrainJob) -> int:
    """Return the bytes of the residual stream of a rank's columns of a micro-batch."""
    assert isinstance(job.model, ModelConfig)
    columns = job.rows_at_once * job.train.sequence_length // job.mesh(1).columns
    return BYTES[job.precision.kind] * columns * job.model.sizes.width


def _in_ring(job: TrainJob, alone: Activations) -> Activations:
    """Return the activations of a rank in a ring (models/mixers/ring.py): while it attends, it has
    the keys and values of two ranks, their gradients and that of its queries in fp32."""
    assert isinstance(job.model, ModelConfig)
    s = of_tensor(job.model, job.engine.tensor_parallel).sizes
    columns = job.rows_at_once * job.train.sequence_length // job.mesh(1).columns
    extra = columns * (4 * s.heads_width + (2 * BYTES[job.precision.kind] + 8) * 2 * s.kv_width)
    within = None if alone.within is None else alone.within + extra
    return replace(alone, again=alone.again + extra, within=within)


def checkpoint_bytes(job: TrainJob, trained: Inventory, world: int) -> int:
    """Return the bytes of one checkpoint of all ranks: fp32 weights, the optimizer's moments, and
    frozen weights in the precision of the forward pass. The precision of Muon's momentum depends on
    the ZeRO stage. Of a run on several clusters also the outer weights, their momentum, and the
    deltas of an exchange under way.
    """
    s = ZeroSettings.of(job, world)
    size = 4 if s.stage == 0 else s.sent if s.stage == 3 else s.gradient

    def each(group: Group) -> int:
        return 4 + (size if group.update.is_by_matrix else 4 * group.update.moments)

    total = sum(p.numel * each(g) for g in trained.groups for p in g.params)
    return total + s.size * trained.num_frozen + _outer_bytes(job, trained)


def _outer_bytes(job: TrainJob, trained: Inventory) -> int:
    """Return the bytes of outer states of all ranks; of deltas only those of an exchange under
    way."""
    count = sum(p.numel for g in trained.groups for p in g.params)
    deltas = 4 * count // job.outer.fragments if job.outer.delay else 0
    return _OUTER_BYTES * count + deltas if job.outer.every else 0


def share_bytes(
    job: TrainJob, trained: Inventory, world: int, rank: int = 0, among: int | None = None
) -> int:
    """Return the bytes of a checkpoint that a rank copies and writes. Before stage 3 the first one,
    or the first of those that divide matrices, has all frozen weights in its share. among: ranks
    that share the rest, if not the world. The ranks of a stage of a pipeline share the stage's."""
    mesh = job.mesh(world)
    trained = of_stage(trained, job, mesh.stage_of(rank))
    total, ranks = checkpoint_bytes(job, trained, world), mesh.tensor
    frozen = ZeroSettings.of(job, world).size * trained.num_frozen if job.engine.stage < 3 else 0
    shared = -(-(total - frozen) * mesh.pipeline // (among or world))
    return shared + (frozen // ranks if rank < ranks else 0)


def copy_bytes(job: TrainJob, trained: Inventory, world: int, on_gpu: bool, rank: int = 0) -> int:
    """Return the bytes of CPU memory for a rank's copy of a checkpoint; 0 if checkpoints are not
    written in the background.

    The copy of a GPU is page-locked, and torch rounds page-locked memory up to a power of two
    (CachingHostAllocator.h of torch 2.13, without a limit).
    """
    if not job.checkpoint.background:
        return 0
    size = share_bytes(job, trained, world, rank)
    return 1 << (size - 1).bit_length() if on_gpu and size else size


def outer_bytes(job: TrainJob, trained: Inventory, world: int) -> int:
    """Return the bytes of CPU memory that a rank has of the outer states."""
    ranks = job.mesh(world).tensor if job.engine.stage == 0 else world
    return _outer_bytes(job, trained) // ranks


def checkpoints_kept(job: TrainJob) -> int:
    """Return the maximum number of checkpoints on disk, including one that is being written."""
    keep = job.checkpoint
    count = keep.keep + 1 + int(keep.keep_best) + int(job.has_decay) + len(keep.at)
    if keep.keep_every is not None and (every := job.cadence(keep.keep_every)):
        count += every.times(job.total_steps)
    return count
