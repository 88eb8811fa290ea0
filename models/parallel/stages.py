"""Which modules of a model each part of a pipeline has: some successive blocks, and what stands
before the first and behind the last.

Part k of p x c is on stage k % p of p: with c parts a stage, the stream passes each stage c times
(interleaved stages: Narayanan et al. 2021, arXiv 2104.04473, section 2.2). Invariant: the parts
together have every module once. What several parts read is the first one's, and the others borrow
it (engine/parallel/pipeline.py). Imports no torch: a plan reads this file on a login node.
"""

from bisect import bisect_left
from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

from forescale.models.flops import head_flops, layers_of

if TYPE_CHECKING:
    from forescale.models.config import ModelConfig


class Division:
    """A model of a resolved `config` in `count` parts.

    blocks: of each part. The parts cost nearly the same: the costliest costs as little as can be.
    """

    def __init__(self, config: "ModelConfig", count: int):
        self.config, self.count = config, count

    @cached_property
    def blocks(self) -> list[range]:
        blocks, behind = costs_of(self.config)
        return dealt(blocks, self.count, behind)

    @cached_property
    def _ends(self) -> list[int]:
        return [blocks.stop for blocks in self.blocks]

    @property
    def last(self) -> int:
        return self.count - 1

    def readers(self, name: str) -> list[int]:
        """Return the parts that read a module or parameter of the whole model, by its name; the
        first of them has it."""
        config, (top, _, rest) = self.config, name.partition(".")
        if top in ("blocks", "value_embeddings"):
            block = int(rest.partition(".")[0])
            return [bisect_left(self._ends, block + 1)]
        if top == "relative_position":
            return [*range(self.count)]
        if top in ("norm", "transform", "head", "mtp"):
            return [self.last]
        again = config.mtp_layers > 0 or (top == "embedding" and config.tie_embeddings)
        return [0, self.last] if again and top in ("embedding", "bigrams") else [0]

    def part_of(self, name: str) -> int:
        """Return the part that has a module or parameter, by its name."""
        return self.readers(name)[0]


class Stage:
    """The parts of a model that a rank has: those of `stage` of `stages`.

    division: of the model, once its config is known.
    """

    def __init__(self, stage: int, stages: int, chunks: int):
        self.stage, self.stages, self.count = stage, stages, stages * chunks
        self.parts = range(stage, self.count, stages)

    def of(self, config: "ModelConfig") -> "Stage":
        """Return this, with the division of a model of a resolved config."""
        self.division = Division(config, self.count)
        return self

    def reads(self, name: str) -> bool:
        """True if a part of this stage reads a module."""
        return any(part in self.parts for part in self.division.readers(name))

    def borrows(self, name: str) -> bool:
        """True if a part of this stage reads a module that another stage has."""
        return self.reads(name) and self.division.part_of(name) not in self.parts

    def borrowers(self, name: str) -> list[int]:
        """Return the other stages that read a module of this one."""
        if self.division.part_of(name) not in self.parts:
            return []
        return sorted({k % self.stages for k in self.division.readers(name)} - {self.stage})


def costs_of(config: "ModelConfig") -> tuple[tuple[int, ...], int]:
    """Return the FLOPs of a token in each block, and behind the last one, with those of later
    tokens: forward, backward, and what is computed again."""
    if "_costs" in config.__dict__:  # as of a cached property: a plan reads it thousands of times
        return config.__dict__["_costs"]
    passes = 4 if config.activation_checkpointing == "full" else 3
    layers, length = layers_of(config), config.sizes.max_sequence_length
    alike = {id(part): part for parts in layers for part in parts.values()}  # most of them are
    flops = {key: passes * part.flops(config, length, False) for key, part in alike.items()}
    blocks = (*(sum(flops[id(part)] for part in parts.values()) for parts in layers),)
    head = (3 + (config.loss_chunk != 0)) * head_flops(config)
    later = blocks[-1] + 12 * config.sizes.width**2 + head  # has a block as the last one
    return config.__dict__.setdefault("_costs", (blocks, head + config.mtp_layers * later))


def dealt(costs: Sequence[int], parts: int, behind: int = 0) -> list[range]:
    """Return successive blocks for each of `parts`, at least one each, such that the costliest part
    costs least, and then the squares of the costs. behind: what the last part has besides."""
    sums, n = [0, *accumulate(costs)], len(costs)
    sums[n] += behind
    best: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [])}  # by the end of the last part
    for part in range(1, parts + 1):
        ends = range(part, n + 1) if part < parts else [n]
        before, best = best, {}
        for end in ends:
            best[end] = min(
                (max(largest, cost), squares + cost**2, [*starts, first])
                for first, (largest, squares, starts) in before.items()
                if first < end and (cost := sums[end] - sums[first]) >= 0
            )
    starts = best[n][2]
    return [range(first, end) for first, end in zip(starts, [*starts[1:], n], strict=True)]
