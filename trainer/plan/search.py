"""The best ways to divide a job among its GPUs: meshes, ZeRO stages, copies of the states,
micro-batches and recomputation.

Ways are tried in the order of the least time of a step: the computation, what micro-batches wait
for, the bubble. What the fastest ones need in all ends the search; until then none is left out, as
those with the least may all be too large. Memory is counted before traffic.
Invariant: a division computes what the job computes, with its global batch, and breaks no rule of
the job. Imports no torch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, Literal, cast

from forescale.models.config import Checkpointing, ModelConfig
from forescale.plan.bytes.memory import Memory, activations_of, fullest, states
from forescale.plan.bytes.parameters import inventory
from forescale.plan.bytes.pipeline import bubble, parts_of
from forescale.plan.communication import collectives, inside
from forescale.plan.config import PlanJob
from forescale.plan.links import Collective, exposed
from forescale.plan.options import (
    ShardingOptions,
    checkpointings,
    engine_keys,
    is_refused,
    staged,
    with_checkpointing,
    with_micro_batch,
)
from forescale.plan.step_time import SAME_SPEED, StepTime, computing_seconds, peak_of
from forescale.plan.work import Work, work_of

_FEWEST_COLUMNS = 1024  # of a window, that a rank computes: fewer keep no GPU busy
_MOST_ROWS = 32  # of a micro-batch: more bring no speed
_MOST_NODES = 8  # that have one copy of the states, if not all have one
_LARGEST = 64  # stages of a pipeline
_ORDERS: tuple[tuple[Literal["1f1b", "interleaved"], int | None], ...] = (
    ("1f1b", None),
    ("interleaved", 2),
    ("interleaved", 4),
)


@dataclass(frozen=True)
class Division:
    """A job as it may be divided, and what that needs."""

    configured: PlanJob
    job: PlanJob
    memory: Memory
    traffic: Sequence[Collective]
    step: StepTime

    @property
    def seconds(self) -> float:
        """Seconds of a step, which are known."""
        assert self.step.seconds is not None
        return self.step.seconds

    @property
    def parts(self) -> tuple[int, ...]:
        """The ranks of each axis of the mesh, and whether a rank has a part of the weights alone:
        of divisions that agree in it only the best is worth a line."""
        return _parts(self.job)

    @cached_property
    def complexity(self) -> tuple[int, ...]:
        """What makes a division harder to understand, for those that are as fast."""
        e = self.job.engine
        copies = bool(e.shard_group) + (e.hierarchical_partition > 1)
        return sum(n > 1 for n in self.parts), copies, self.words.count("="), e.stage

    @cached_property
    def words(self) -> str:
        """What gives the job as configured this division; empty if it has it."""
        job = self.configured
        words, now = engine_keys(job, self.job), getattr(job.model, "activation_checkpointing", "")
        how = getattr(self.job.model, "activation_checkpointing", "")
        words += f"model.activation_checkpointing={how} " if how != now else ""
        micro = self.job.train.micro_batch
        return (words + f"train.micro_batch={micro}" * (micro != job.train.micro_batch)).strip()

    @cached_property
    def losses(self) -> dict[str, float]:
        """What a step takes beside the products that the model needs, as parts of its time, the
        largest first; without those below a percent."""
        machine, per_node = self.job.machine, self.job.per_node
        alone = {
            c.label: exposed([c], machine, per_node, self.step.computing or 0.0)
            for c in self.traffic
        }
        most = max(alone, key=alone.__getitem__, default="")
        parts = {
            f"waiting (most: {most})": self.step.waiting,
            "the pipeline's bubble": self.step.parts.get("bubble", 0.0),
            "recomputation": self._recomputed,
        }
        shares = {name: seconds / self.seconds for name, seconds in parts.items()}
        largest = sorted(shares.items(), key=lambda item: -item[1])
        return {name: share for name, share in largest if share >= 0.01}

    @property
    def _recomputed(self) -> float:
        """Seconds of a step in which the backward pass computes again what was not kept."""
        jobs = self.job, with_checkpointing(self.job, "none")
        now, less = (computing_seconds(job, job.machine) for job in jobs)
        return now - less


def best_divisions(options: ShardingOptions, job: PlanJob) -> list[Division]:
    """Return the best divisions of a job among its ranks (plan.divisions), the fastest first; of
    those that are as fast the simplest. Empty if no division fits, or if no speed is known that
    tells them apart."""
    machine, blind = options.machine, options.measured is not None or options.plan.mfu is not None
    most = options.plan.divisions
    if blind or not most or not isinstance(job.model, ModelConfig) or peak_of(job, machine) is None:
        return []
    search = _Search(options, job)
    best: dict[tuple[int, ...], Division] = {}
    for bound, way, sizes in sorted(search.ways(), key=lambda item: item[0]):
        known = sorted(division.seconds for division in best.values())
        if len(known) >= most and bound > known[most - 1]:
            break
        for division in search.fitting(way, sizes, bound, best):
            old = best.get(division.parts)
            if old is None or _rank(division, old):
                best[division.parts] = division
    result, rest = list[Division](), [*best.values()]
    while rest and len(result) < most:
        fastest = min(division.seconds for division in rest)
        equal = (d for d in rest if d.seconds <= SAME_SPEED * fastest)
        result.append(min(equal, key=lambda division: division.complexity))
        rest.remove(result[-1])
    return result


def _parts(job: PlanJob) -> tuple[int, ...]:
    e = job.engine
    near = e.tensor_parallel, e.sequence_parallel, e.context_parallel
    return e.pipeline_parallel, *near, e.expert_parallel, e.stage == 3


def _rank(new: Division, old: Division) -> bool:
    """Whether a division is better than another with as many ranks of each axis."""
    if max(new.seconds, old.seconds) <= SAME_SPEED * min(new.seconds, old.seconds):
        return new.complexity < old.complexity
    return new.seconds < old.seconds


class _Search:
    """Evaluates the ways of one job; what several ways share is computed once."""

    def __init__(self, options: ShardingOptions, job: PlanJob):
        self._options, self._job = options, job
        self._of_tensor: dict[int, ShardingOptions] = {}
        self._states: dict[Any, Any] = {}
        self._work: dict[Any, Work] = {}
        self._refused: dict[str, bool] = {}
        self._models: dict[str, Any] = {}

    def ways(self) -> Iterator[tuple[float, PlanJob, list[int]]]:
        """Yield each job with ZeRO-1 that the rules allow, the least seconds of its step before,
        and its micro-batches behind, the largest first.

        Without a pipeline the largest that fits is the fastest; with one each is a way.
        """
        job, near = self._job, self._options.machine.gpus_per_node or self._job.world_size
        model, world = cast(ModelConfig, job.model), job.world_size
        columns = max(1, job.train.sequence_length // _FEWEST_COLUMNS)
        experts = model.experts.experts if model.experts else 1
        heads = model.sizes.num_heads * all(m.splits_columns for m in model.mixers_used) or 1
        inner = [_divisors(world, min(near, world)) for _ in range(2)]
        # Fewer ranks than a node has bring experts nothing.
        divides = [n for n in _divisors(experts, experts) if n == 1 or n >= min(near, experts)]
        axes = (*inner, _divisors(world, columns), divides)
        stages = _divisors(world, min(model.num_blocks, _LARGEST))
        orders = [(n, order) for n in stages for order in (_ORDERS if n > 1 else _ORDERS[:1])]
        for axis, (pipeline, (schedule, chunks)) in product(product(*axes), orders):
            tensor, sequence, context, parts = axis
            ranks = tensor * sequence * context * pipeline
            if world % ranks or sequence * context > columns or tensor * sequence > near:
                continue
            more_heads = 2 * tensor * sequence
            if context > 1 and more_heads <= near and heads % more_heads == 0:
                continue  # an exchange of heads in a node is faster than a ring
            each, left = divmod(job.batch_ramp.first, world // ranks)
            if left or not each:
                continue
            engine = replace(
                staged(job, 1).engine,
                tensor_parallel=tensor,
                sequence_parallel=sequence,
                context_parallel=context,
                expert_parallel=parts,
                pipeline_parallel=pipeline,
                pipeline_schedule=schedule,
                pipeline_chunks=chunks,
                shard_group=0,
            )
            mesh = replace(job, engine=engine, train=replace(job.train, micro_batch=1))
            hows = checkpointings(mesh)
            mesh = self._recomputing(mesh, hows[-1])
            if self._is_refused(mesh):
                continue
            micros = [n for n in _divisors(each, _MOST_ROWS) if not n & (n - 1) or n == each][::-1]
            groups = [[micro] for micro in micros if micro <= 4] if pipeline > 1 else [micros]
            for how, sizes in product(hows, groups):
                way = self._recomputing(with_micro_batch(mesh, sizes[0]), how)
                yield self._least(way), way, sizes

    def _least(self, way: PlanJob) -> float:
        """Return the seconds that a step takes at each stage at least: those of the computation,
        of the traffic that micro-batches wait for, and of the pipeline's bubble."""
        seconds = self._work_of(way).seconds(self._options.machine, self._peak)
        every, rounds = parts_of(way, way.world_size), way.accumulation(way.world_size)
        slowest = max(every, key=lambda part: part.share)
        traffic = inside(way, way.world_size, slowest)
        waiting = exposed(traffic, self._options.machine, way.per_node, math.inf)
        each = seconds + waiting / rounds / slowest.share
        return (rounds * slowest.share + bubble(way, every)) * each

    def _recomputing(self, job: PlanJob, how: Checkpointing) -> PlanJob:
        """Return with_checkpointing of a job, with one model for all ways: it knows its sizes."""
        if how not in self._models:
            self._models[how] = with_checkpointing(self._job, how).model
        return replace(job, model=self._models[how])

    @cached_property
    def _peak(self) -> float:
        return peak_of(self._job, self._options.machine) or 1.0

    def _is_refused(self, job: PlanJob) -> bool:
        """Whether a rule of the sections that differ from the job's refuses it; the micro-batches
        and the recomputation that are tried break none."""
        if (key := str(job.engine)) not in self._refused:
            self._refused[key] = is_refused(job)
        return self._refused[key]

    def _work_of(self, job: PlanJob) -> Work:
        """Return the work of a micro-batch, which no stage and no copy changes."""
        e, how = job.engine, getattr(job.model, "activation_checkpointing", "none")
        axes = e.tensor_parallel, e.sequence_parallel, e.context_parallel, e.expert_parallel
        if (key := (*axes, job.train.micro_batch, how)) not in self._work:
            mesh = job.mesh(job.world_size)
            work = work_of(job, self._of(job).trained.of_rank(mesh).numel, mesh)
            assert work is not None, "of our own model"
            self._work[key] = work
        return self._work[key]

    def _of(self, job: PlanJob) -> ShardingOptions:
        """Return the options with the parameters as the ranks of a job divide them."""
        if (tensor := job.engine.tensor_parallel) not in self._of_tensor:
            self._of_tensor[tensor] = replace(self._options, trained=inventory(job))
        return self._of_tensor[tensor]

    def fitting(
        self,
        way: PlanJob,
        sizes: Sequence[int],
        bound: float,
        best: Mapping[tuple[int, ...], Division],
    ) -> Iterator[Division]:
        """Yield a way at each stage, and with copies of the states, at the largest micro-batch that
        fits, and at the job's, if the rules allow it; not where it can't be better than the best of
        its parts, because a step takes it `bound` seconds at least."""
        tensor, per_node, options = way.engine.tensor_parallel, way.per_node, self._of(way)
        near = max(1, per_node // tensor)
        every = way.mesh(way.world_size).states
        groups = [n * near for n in (1, 2, 4, _MOST_NODES) if n * near < every]
        jobs = [staged(way, stage) for stage in range(4)]
        if way.nodes > 1 and tensor == 1:
            jobs.append(staged(way, 3, per_node))
        jobs += [
            replace(job, engine=replace(job.engine, shard_group=group))
            for job, group in product(jobs[1:4], groups)
        ]

        def may_win(job: PlanJob) -> bool:
            old = best.get(_parts(job))
            return old is None or bound <= SAME_SPEED * old.seconds

        if not any(map(may_win, jobs)):
            return
        configured, fused = self._job.train.micro_batch, options.machine.fused_norms
        activations = []
        for size in sizes:
            one = with_micro_batch(way, size)
            parts = fullest(parts_of(one, one.world_size))
            activations.append([(part.stage, activations_of(one, fused, part)) for part in parts])
        for job in jobs:
            if not may_win(job) or self._is_refused(with_micro_batch(job, sizes[-1])):
                continue
            has_one = False
            for size, activation in zip(sizes, activations, strict=True):
                if has_one and size != configured:
                    continue
                one = with_micro_batch(job, size)
                memory = self._memory(options, one, activation)
                if memory.total <= options.available_to(one):
                    has_one = True
                    traffic = collectives(one, options.trained, one.world_size)
                    step = options.step(one, traffic, self._work_of(one))
                    yield Division(self._job, one, memory, traffic, step)

    def _memory(
        self, options: ShardingOptions, job: PlanJob, activations: list[tuple[int, Any]]
    ) -> Memory:
        """Return the memory of the fullest rank, without the memory of the host at the start.
        activations: of each stage of a pipeline that may be the fullest."""
        again = getattr(job.model, "activation_checkpointing", "none") == "full"
        rounds = job.accumulation(job.world_size)
        key = (str(job.engine), again, rounds > 1, job.gradient_dtype(job.world_size))
        for stage, _ in activations:
            if (*key, stage) not in self._states:
                of_stage = states(job, options.trained, job.world_size, None, stage)
                self._states[*key, stage] = of_stage
        rest = 0, *options.reserved(job)
        every = [Memory(self._states[*key, stage], held, *rest) for stage, held in activations]
        return max(every, key=lambda memory: memory.peak)


def _divisors(number: int, most: int) -> list[int]:
    return [n for n in range(1, most + 1) if number % n == 0]
