"""The stages of a pipeline: what a stage has of the model, holds at once, and waits for.

The division is the engine's own (models/parallel/stages.py), the orders are those of
engine/parallel/schedules.py; tests compare these formulas with their simulation. Imports no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from forescale.config.train import TrainJob
from forescale.engine.parallel.schedules import passes_of
from forescale.models.config import ModelConfig
from forescale.models.parallel.stages import Stage, costs_of, dealt
from forescale.plan.bytes.parameters import Inventory


@dataclass(frozen=True)
class Part:
    """What the ranks of a stage have of a model: its blocks; whether tokens enter and losses leave
    there. share: of the computation of a micro-batch; held: of how many micro-batches the stage
    holds the activations at most."""

    stage: int
    blocks: tuple[int, ...]
    is_first: bool = True
    is_last: bool = True
    share: float = 1.0
    held: float = 1.0


def parts_of(job: TrainJob, world: int) -> list[Part]:
    """Return the part of each stage; of a model without a pipeline the whole."""
    config, stages, chunks = job.model, job.engine.pipeline_parallel, job.engine.chunks
    if not isinstance(config, ModelConfig):
        return [Part(0, ())]
    if stages == 1:
        return [Part(0, (*range(config.num_blocks + config.mtp_layers),))]
    costs, behind = costs_of(config)
    blocks = _dealt(costs, behind, stages * chunks)
    last, total = stages * chunks - 1, sum(costs) + behind
    later = range(config.num_blocks, config.num_blocks + config.mtp_layers)  # behind the last
    result = []
    for stage in range(stages):
        every = [blocks[part] for part in range(stage, stages * chunks, stages)]
        cost = sum(costs[i] for of in every for i in of) + behind * (stage == stages - 1)
        of_stage = [i for of in every for i in of] + [*later] * (stage == stages - 1)
        held: float = in_flight(job, world, stage)
        if chunks > 1:
            sizes = tuple(len(of) for of in every)
            held = _most_blocks(stage, stages, job.accumulation(world), sizes) / sum(sizes)
        result.append(
            Part(stage, (*of_stage,), stage == 0, last % stages == stage, cost / total, held)
        )
    return result


@lru_cache(maxsize=4096)
def _most_blocks(stage: int, stages: int, micros: int, sizes: tuple[int, ...]) -> int:
    """Return the most blocks whose activations of a micro-batch an interleaved stage holds. sizes:
    the blocks of each of its parts, of which the first ones wait longest."""
    # Of many rounds of micro-batches the third is as the second.
    rounds = max(1, micros // stages)
    micros = min(micros, 3 * -(-micros // rounds))
    most = now = 0
    for action in passes_of(stage, stages, len(sizes), micros, "B"):
        now += sizes[action.part // stages] * (1 if action.kind == "F" else -1)
        most = max(most, now)
    return most


@lru_cache(maxsize=256)
def _dealt(costs: tuple[int, ...], behind: int, parts: int) -> list[range]:
    return dealt(costs, parts, behind)


def in_flight(job: TrainJob, world: int, stage: int) -> int:
    """Return of how many micro-batches a stage holds the activations of a part at most."""
    micros, e = job.accumulation(world), job.engine
    behind = e.pipeline_parallel - 1 - stage
    if e.pipeline_schedule == "zero-bubble":  # it holds what its weights' gradients are made of
        return min(micros, e.pipeline_parallel)
    if e.chunks == 1:
        return min(micros, behind + 1)
    rounds = max(1, micros // e.pipeline_parallel)
    return min(2 * behind + (e.chunks - 1) * -(-micros // rounds) + 1, micros * e.chunks)


def bubble(job: TrainJob, parts: Sequence[Part]) -> float:
    """Return the time in which the slowest stage waits for the first micro-batch and after the
    last, in times of a whole micro-batch.

    1F1B waits once for each other stage, with several parts a stage once for a part of it
    (Narayanan et al. 2021, arXiv 2104.04473, section 2.2); without the gradients of weights, a
    third of the computation, it waits for the rest alone (ZB-H1: Qi et al. 2024, arXiv 2401.10241,
    table 2).
    """
    others = 1 - max(part.share for part in parts)
    if job.engine.pipeline_schedule == "zero-bubble":
        return others / 3
    return others / job.engine.chunks


def of_stage(trained: Inventory, job: TrainJob, stage: int) -> Inventory:
    """Return the parameters that a stage trains. With tables that several stages read, the first
    one's."""
    config, stages, chunks = job.model, job.engine.pipeline_parallel, job.engine.chunks
    if stages == 1 or not isinstance(config, ModelConfig):
        return trained
    key = ("stage", stage, stages, chunks, config.activation_checkpointing)
    if key not in trained.parts:
        place = Stage(stage, stages, chunks).of(config)
        place.division.blocks = _dealt(*costs_of(config), place.count)
        reads = {p.name: place.reads(p.name) for p in trained.parameters}
        tables = [p for p in trained.parameters if reads[p.name] and place.borrows(p.name)]
        reads |= dict.fromkeys([p.name for p in tables], False)
        groups = []
        for group in trained.groups:
            if params := [p for p in group.params if reads[p.name]]:
                groups.append(replace(group, params=params, names=[p.name for p in params]))
        parameters = [p for p in trained.parameters if reads[p.name]]
        of_stage = Inventory(parameters, groups, trained.experts, trained.cut, tables)
        trained.parts[key] = of_stage
    return trained.parts[key]
