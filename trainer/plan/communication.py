"""Communication of an optimizer step: the bytes of each collective.

The collectives are those that DeepSpeed 0.19.8 runs under our engine. They were counted on real
ranks; tests/distributed/test_real_costs.py compares these formulas with them, byte for byte:
- Stages 0 and 1 all-reduce the gradients once per step, stage 2 once per micro-batch. Stages 1 and
  2 use an all-reduce where a reduce-scatter would be enough (use_multi_rank_bucket_allreduce), and
  all-gather the weights after the update.
- Ranks that divide a window (engine.sequence_parallel) exchange columns for heads around attention.
- Ranks that divide matrices (engine.tensor_parallel) sum what their parts make, and exchange
  parts of those that Muon updates.
- Stage 3 all-gathers the weights in the forward and backward pass of each micro-batch and
  reduce-scatters the gradients. With Muon ranks also exchange parts of matrices (bytes/muon.py).
  stage3_max_reuse_distance decides which weights are gathered a second time, see bytes/zero.py.
  With a hierarchical partition only the first gather of a step uses all ranks.
- Copies of the states (engine.shard_group) are divided, gathered and reduced among the ranks of one
  copy, and a rank's part of the gradient then all-reduced once a step over those of all copies.
- Ranks that divide experts (engine.expert_parallel) send each row to the rank of its expert and
  back, in the forward and in the backward pass, and before that how many rows there are, unless
  each expert has a fixed number of places. These bytes are averages over a group of ranks: how
  much one sends depends on what its tokens choose. The gradients and weights of experts go between
  the ranks that have the same ones.
A few numbers per step (norm, overflow, the StepSummary, the counts of experts) are left out. The
time of a collective is in links.py.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from math import prod

from forescale.config.mesh import Mesh
from forescale.config.train import TrainJob
from forescale.engine.optim import waves
from forescale.models.config import ModelConfig
from forescale.models.flops import BlockParts, columns_of, layers_of
from forescale.models.memory import of_tensor
from forescale.models.mixers.window import Window
from forescale.models.parallel.deal import Ring, shifts
from forescale.models.parallel.division import runs
from forescale.models.part import Mixer
from forescale.plan.bytes.memory import overlapping, partition, recomputes, touched
from forescale.plan.bytes.muon import Gathers, gathers, in_turns
from forescale.plan.bytes.parameters import Inventory, Parameter
from forescale.plan.bytes.pipeline import Part, of_stage, parts_of
from forescale.plan.bytes.zero import ZeroSettings
from forescale.plan.links import Collective, Kind

_STAGE_0_BUCKET = 500_000_000  # elements: DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE


def collectives(
    job: TrainJob, trained: Inventory, world: int, stage: int | None = None
) -> list[Collective]:
    """Return the collectives of one optimizer step, without those that send nothing.

    stage: of the pipeline; None: the one that computes longest.
    """
    s, mesh = ZeroSettings.of(job, world), job.mesh(world)
    every = parts_of(job, world)
    part = max(every, key=lambda part: part.share) if stage is None else every[stage]
    local = of_stage(trained, job, part.stage).of_rank(mesh)
    if s.stage < 3:
        zero = _replicated(s, local, mesh)
    else:
        # Between two ranks that have the same parameters are those that divide matrices with one.
        experts = local.experts if mesh.experts > 1 else frozenset[str]()
        others = frozenset(p.name for p in local.parameters) - experts
        zero = _partitioned(s, others, job, local, "", mesh.tensor)
        if experts:
            of_experts = replace(s, world=s.expert_world)
            zero += _partitioned(of_experts, experts, job, local, " of experts", mesh.experts)
    traffic = [*zero, *inside(job, world, part), *_whole_matrices(s, local, mesh)]
    traffic.append(_copied(s, job, local, mesh))
    traffic.append(_lent(s, [of_stage(trained, job, p.stage).of_rank(mesh) for p in every], part))
    return [c for c in traffic if c.payload and c.ranks > 1]


def inside(job: TrainJob, world: int, part: Part) -> list[Collective]:
    """Return the collectives that micro-batches wait for in a stage, the same at each ZeRO stage
    and with copies of the states."""
    s, mesh = ZeroSettings.of(job, world), job.mesh(world)
    every = [*_rows(s, job, part), *_sums(s, job, part), *_exchanged(s, job, mesh, part)]
    every += [*_ring(s, job, mesh, part), _streams(s, job, mesh, part)]
    return [replace(c, is_inner=True) for c in every if c.payload and c.ranks > 1]


def _streams(s: ZeroSettings, job: TrainJob, mesh: Mesh, part: Part) -> Collective:
    """Return the streams that a stage sends to the next one, and their gradients to the one before
    (engine/parallel/pipeline.py), once for each part of the model that it has."""
    config, chunks = job.model, job.engine.chunks
    if mesh.pipeline == 1 or not isinstance(config, ModelConfig):
        return Collective("streams of the pipeline", "send", 0, 1)
    columns = job.rows_at_once * job.train.sequence_length // mesh.columns
    values = config.sizes.width + (config.sizes.kv_width if config.shared_values else 0)
    calls = s.accumulation * (2 * chunks - part.is_first - part.is_last)
    payload = calls * s.size * columns * values
    return Collective(
        "streams of the pipeline", "send", payload, mesh.pipeline, calls, 0.0, mesh.in_stage,
        is_direct=True,
    )  # fmt: skip


def _lent(s: ZeroSettings, stages: Sequence[Inventory], part: Part) -> Collective:
    """Return the tables that several stages read: the first one lends them, and gets gradients."""
    tables = [sum(p.numel for p in stage.borrowed) for stage in stages]
    payload = s.size * sum(tables) if part.is_first else s.gradient * tables[part.stage]
    calls = sum(map(bool, tables)) if part.is_first else 1
    return Collective("lent tables", "send", payload, len(stages), calls, is_direct=True)


def _ring(s: ZeroSettings, job: TrainJob, mesh: Mesh, part: Part) -> list[Collective]:
    """Return the keys and values that ranks pass around (models/mixers/ring.py), and in the
    backward pass their gradients in fp32, which also travel home. A state passes otherwise, of a
    few columns."""
    config, ranks = job.model, mesh.context
    if ranks == 1 or not isinstance(config, ModelConfig):
        return []
    columns = job.rows_at_once * job.train.sequence_length // mesh.columns
    of_heads, layers = of_tensor(config, mesh.tensor), layers_of(config)
    heads, payload, calls = 2 * of_heads.sizes.heads_width, 0, 0
    for block in part.blocks:
        mixer = layers[min(block, config.num_blocks - 1)].mixer
        if mixer.splits_columns and (turns := _turns(config, mixer, job, ranks)):
            values = mixer.exchanged(of_heads, mesh.sequence) - heads
            onward = (2 + recomputes(job)) * turns
            payload += s.accumulation * columns * values * (s.size * onward + 4 * (turns + 1))
            calls += s.accumulation * (onward + turns + 1)
    stride, name = mesh.sequence * mesh.tensor, "keys and values"
    ring = Collective(name, "all_to_all", payload, ranks, calls, 1.0, stride, is_direct=True)
    return [ring]


def _turns(config: ModelConfig, mixer: Mixer, job: TrainJob, ranks: int) -> int:
    """Return how often the ranks of a ring pass keys and values on: with a window only to those
    that see them."""
    window, first = 0, 0
    if isinstance(mixer, Window):
        window, first = mixer.width, mixer.global_tokens
    count = runs(config, ranks)
    ring = Ring(0, ranks, count, config.causal, window, first)
    return len(shifts(ring, job.train.sequence_length // (ranks * count))) - 1


def _exchanged(s: ZeroSettings, job: TrainJob, mesh: Mesh, part: Part) -> list[Collective]:
    """Return the exchange of columns for heads where ranks divide rows: two in each layer, forward
    and backward (models/parallel/groups.py), and forward again where the layer is recomputed."""
    config, ranks = job.model, job.engine.sequence_parallel
    if ranks == 1 or not isinstance(config, ModelConfig):
        return []
    layers = layers_of(config)
    every = [layers[min(block, config.num_blocks - 1)].mixer for block in part.blocks]
    mixers = [mixer for mixer in every if mixer.splits_columns]
    of_heads = of_tensor(config, job.engine.tensor_parallel)  # a rank's own
    values = sum(mixer.exchanged(of_heads, ranks) for mixer in mixers)
    times = s.accumulation * (2 if config.activation_checkpointing == "none" else 3)
    columns = job.rows_at_once * job.train.sequence_length // mesh.columns
    payload, calls = s.size * times * columns * values, 2 * times * len(mixers)
    name = "heads for columns"
    return [Collective(name, "all_to_all", payload, ranks, calls, stride=mesh.tensor)]


def _sums(s: ZeroSettings, job: TrainJob, part: Part) -> list[Collective]:
    """Return the sums of ranks that divide the matrices (models/parallel/groups.py): of a part's
    output, and of its input's gradient; of the gradients of what the part has whole; of an
    encoder's output; and of the tables of tokens, if their rows are divided."""
    c, tensor = job.model, job.engine.tensor_parallel
    if tensor == 1 or not isinstance(c, ModelConfig):
        return []
    rows, length = job.rows_at_once, job.train.sequence_length
    columns = length // job.mesh(1).columns
    # Those of modules for later tokens are as the last one.
    blocks, layers = [min(block, c.num_blocks - 1) for block in part.blocks], layers_of(c)
    # A compiled block is computed again up to its end.
    to_end = c.activation_checkpointing == "full" and job.train.compile != "off"
    chunks = job.engine.tensor_chunks
    kinds = [(*map(id, layers[i].values()), i == c.encoder_layers - 1) for i in blocks]
    of = dict(zip(kinds, blocks, strict=True)).items()  # few: most of a hundred blocks are alike
    each = {k: _of_block(c, i, layers[i], rows, columns, chunks, to_end) for k, i in of}
    sums = [one for kind in kinds for one in each[kind]]
    if c.has_encoder:
        sums.append(c.sizes.width * rows * columns_of(c, 0, columns))
    heads, read = 0, rows * columns_of(c, c.encoder_layers, columns)
    if c.sizes.vocab_size % tensor == 0:
        heads = (1 + c.mtp_layers) * part.is_last
        # The vectors of tokens, and the gradient of what the heads read.
        sums += [c.sizes.width * rows * columns] * part.is_first + [c.sizes.width * read] * heads
    # Two fp32 numbers of each rank for each target.
    payload = s.size * sum(sums) + 8 * tensor * read * heads
    n, calls, name = s.accumulation, len(sums) + heads, "parts of the residual stream"
    return [Collective(name, "all_reduce", n * payload, tensor, n * calls)]


def _of_block(
    config: ModelConfig,
    block: int,
    parts: BlockParts,
    rows: int,
    columns: int,
    chunks: int,
    to_end: bool,
) -> list[int]:
    """Return the values of each sum of a block in a micro-batch. chunks: engine.tensor_chunks;
    to_end: of its recomputation."""
    c = config.of_block(block)
    columns = columns_of(config, block, columns)
    tokens = rows * columns
    of_mlp = [rows * length for length in _cut(columns, config.mlp.columns or columns)]
    if not parts.mlp.is_routed:  # experts are summed whole
        of_mlp = [one for each in of_mlp for one in _cut(each, -(-each // chunks))]
    outputs = [_cut(tokens, -(-tokens // chunks))] * (len(parts) - 1) + [of_mlp]
    sums = outputs + [[tokens]] * len(parts)  # and the gradients of their inputs
    if config.activation_checkpointing != "none":
        # The last part's output is needed again only for a norm that follows it.
        ends_normed = block == config.encoder_layers - 1 and config.norms_stream
        sums += outputs if to_end or c.norms_after or ends_normed else outputs[:-1]
    whole: list[int] = []  # what every rank has, but uses for its own heads or tokens alone
    for part in parts.values():
        cut = {**part.divided(c), **dict.fromkeys(part.stacked)}
        others = cut.keys() | {f"{name}.bias" for name in part.writes}
        whole += [prod(shape) for name, shape in part.shapes(c).items() if name not in others]
    return [tokens * config.sizes.width for each in sums for tokens in each] + whole


def _cut(total: int, each: int) -> list[int]:
    """Return a total as parts of a size, the last of them what is left."""
    return [min(each, total - at) for at in range(0, total, each)]


def _whole_matrices(s: ZeroSettings, trained: Inventory, mesh: Mesh) -> list[Collective]:
    """Return the exchanges of parts of the matrices that ranks divide, for Muon, on the rank that
    has the most of them.

    trained: what a rank has of them. At stages 1 and 2 ranks orthogonalise those of which their
    partition has a part; at stage 3 those that they get whole.
    """
    group = next((g for g in trained.groups if g.update.is_by_matrix), None)
    tensor = mesh.tensor
    if tensor == 1 or group is None:
        return []
    size = 4 if s.stage == 0 else s.sent if s.stage == 3 else s.gradient

    def turns(params: Sequence[Parameter]) -> Gathers:
        return in_turns(params, trained.cut, tensor, size, s.size)

    if s.stage == 3:  # the first rank has the most of each wave
        order = waves(group.params, s.world, s.sent, tensor)
        every = [turns([group.params[i] for i in wave[0]]) for wave in order]
    elif s.stage:
        shares = overlapping(group, s.ranks)[:: group.parts]
        every = [max(map(turns, shares), key=lambda one: one.payload)]
    else:
        every = [turns(group.params)]
    payload, calls = sum(one.payload for one in every), sum(one.calls for one in every)
    return [Collective("Muon's whole matrices", "all_to_all", payload, tensor, calls)]


def _rows(s: ZeroSettings, job: TrainJob, part: Part) -> list[Collective]:
    """Return the exchanges of ranks that divide experts."""
    parts, c = job.engine.expert_parallel, job.model
    experts = c.experts if isinstance(c, ModelConfig) else None
    if parts == 1 or not isinstance(c, ModelConfig) or experts is None:
        return []
    routed = [parts.mlp.is_routed for parts in layers_of(c)]
    layers = sum(routed[min(block, c.num_blocks - 1)] for block in part.blocks) * s.accumulation
    tokens = job.rows_at_once * job.train.sequence_length
    rows, passes = tokens * experts.top_k // job.mesh(parts).near, 1 + recomputes(job)
    if experts.capacity:
        rows = experts.experts * math.ceil(experts.capacity * rows / experts.experts)
    travels = layers * 2 * (passes + 1)
    counts = 0 if experts.capacity else layers * passes
    sent = travels * rows * c.sizes.width * s.size
    return [
        Collective("rows of experts", "all_to_all", sent, parts, travels),
        Collective("numbers of rows", "all_to_all", counts * 8 * experts.experts, parts, counts),
    ]


def _replicated(s: ZeroSettings, trained: Inventory, mesh: Mesh) -> list[Collective]:
    """Return the collectives of gradients and weights."""
    times = s.accumulation if s.stage == 2 else 1
    # The backward pass takes two thirds of a micro-batch's time. Stages 0 and 1 reduce gradients
    # only in the backward pass of the last micro-batch.
    beside = 2 / 3 if s.stage == 2 else 2 / 3 / s.accumulation
    beside *= s.stage > 0 and s.overlap and not s.waits
    bucket = s.bucket if s.stage else _STAGE_0_BUCKET
    sums = []
    experts = trained.experts if mesh.experts > 1 else frozenset[str]()
    # All other parameters, then the experts, each with the ranks that have different ones.
    for of, apart in (("", mesh.tensor), (" of experts", mesh.experts)):
        params = [p for p in trained.trained if (p.name in experts) == bool(of)]
        groups = [g for g in trained.groups if (g.names[0] in experts) == bool(of)]
        ranks, calls = s.ranks // apart, times * _buckets(params, bucket)
        sent = s.sent * sum(p.numel for p in params) * times
        kind: Kind = "all_reduce"
        sums.append(Collective(f"gradients{of}", kind, sent, ranks, calls, beside, apart))
        if s.stage:
            each = [partition(group, s.ranks) for group in groups]
            weights, kind = s.size * ranks * sum(each), "all_gather"
            name = f"weights{of} after the update"
            sums.append(Collective(name, kind, weights, ranks, len(each), stride=apart))
            for group, part in zip(groups, each, strict=True):
                muon = _muon(gathers(s, group, ranks, part), ranks)
                sums.append(replace(muon, label=muon.label + of, stride=apart))
    return sums


def _copied(s: ZeroSettings, job: TrainJob, trained: Inventory, mesh: Mesh) -> Collective:
    """Return the sum of the ranks that have the same part of the states, one of each copy
    (engine/parallel/replicas.py): of a rank's part of the gradient, with Muon before stage 3 of the
    whole matrices that it reads."""
    elements = 0
    for group in trained.groups:
        ranks = s.ranks // group.parts
        if s.stage == 3:
            elements += sum(-(-p.numel // ranks) for p in group.params)
        elif group.update.is_by_matrix:
            elements += max(touched(group, s.ranks))
        else:
            elements += partition(group, s.ranks)
    copies, calls = mesh.states // mesh.shards, -(-elements // s.bucket)
    label, payload = "gradients of copies", s.gradient * elements
    # Stage 3 sums in the last backward pass, where all ranks make the same gradients (step.py).
    hidden = s.stage == 3 and s.overlap and isinstance(job.model, ModelConfig)
    beside = 2 / 3 / s.accumulation if hidden else 0.0
    return Collective(label, "all_reduce", payload, copies, calls, beside, s.ranks)


def _buckets(parameters: Sequence[Parameter], most: int) -> int:
    """Return the number of buckets that hold all gradients in the order of the backward pass."""
    count, filled = 0, 0
    for p in reversed(parameters):
        if not count or filled + p.numel > most:
            count, filled = count + 1, 0
        filled += p.numel
    return count


def _partitioned(
    s: ZeroSettings,
    names: frozenset[str],
    job: TrainJob,
    trained: Inventory,
    of: str,
    stride: int,
) -> list[Collective]:
    """Return the collectives of stage 3 of the parameters that the same ranks divide: `names`.

    s: the settings of these ranks; of: what their labels end with; stride: as of a Collective.
    """
    params = [p for p in trained.parameters if p.name in names]
    small = [p for p in params if p.numel <= s.persistence]
    trace = s.gathers(trained.parameters, recomputes(job), trained.experts, names)
    first, again = s.fetched * trace.first, s.fetched * trace.again
    beside = 1.0 if s.overlap else 0.0
    near, n = s.near, s.accumulation
    payload, calls = n * (first + again), n * trace.calls
    far = (first, trace.calls - trace.calls_again) if near > 1 else (payload, calls)
    traffic = [
        Collective(
            "weights in forward and backward", "all_gather", far[0], s.world, far[1], beside
        ),
        Collective(
            "small weights after the update",
            "all_gather",
            s.size * _padded(s, small),
            s.world,
            len(small),
        ),
    ]
    if near > 1:
        close = payload - far[0], calls - far[1]
        traffic.append(
            Collective(
                "weights from the nearer partition", "all_gather", close[0], near, close[1], beside
            )
        )
    traffic += _reduced(s, trained, names, beside)
    for group in trained.groups:
        if group.names[0] in names:
            divided = 1 if of else group.parts
            traffic.append(_muon(gathers(s, group, s.world, divided=divided), s.world))
    return [replace(c, label=c.label + of, stride=stride) for c in traffic]


def _reduced(
    s: ZeroSettings, trained: Inventory, names: Collection[str], beside: float
) -> list[Collective]:
    """Return the collectives of the gradients of `names` at stage 3.

    What is larger than a bucket is alone in one, and scattered whatever the settings say. A bucket
    is of parameters that the same ranks divide.
    """
    groups = groupby(trained.trained, lambda p: p.name in names)
    runs = [(is_inside, [*run]) for is_inside, run in groups]
    calls = sum(_buckets(run, s.bucket) for is_inside, run in runs if is_inside)
    every = [p for p in trained.trained if p.name in names]
    large = [p for p in every if p.numel > s.bucket]
    if s.zero.get("reduce_scatter", True):
        elements: dict[Kind, tuple[int, int]] = {"reduce_scatter": (_padded(s, every), calls)}
    else:
        small = sum(p.numel for p in every if p.numel <= s.bucket)
        elements = {
            "all_reduce": (small, calls - len(large)),
            "reduce_scatter": (_padded(s, large), len(large)),
        }
    n = s.accumulation
    return [
        Collective("gradients", kind, n * s.sent * numel, s.world, n * calls, beside)
        for kind, (numel, calls) in elements.items()
    ]


def _padded(s: ZeroSettings, params: Iterable[Parameter]) -> int:
    """Return the elements of partitions of equal size on all ranks."""
    return s.world * sum(-(-p.numel // s.world) for p in params)


def _muon(of: Gathers, ranks: int) -> Collective:
    return Collective("Muon's matrices", of.kind, of.payload, ranks, of.calls)
