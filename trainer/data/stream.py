"""Batches of a step, a pure function of the feed: the only part of the data that knows tensors.

    feed -> windows of a step -> this rank's run of them -> micro-batches, numbered globally

Invariant: micro-batch j of a step holds its windows [j * micro_batch, (j + 1) * micro_batch) and is
the same tensor at any world size; rank r of W gets the r-th of W contiguous runs of them. The
cursor is the step that the consumer has taken, never what was prefetched (forescale.data.pipeline).
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from forescale.data.dataset import Split
from forescale.data.feed import Feed, Lost, Rows
from forescale.data.mixture import Interval
from forescale.data.pipeline import Agree, At, Tell, prefetched
from forescale.errors import UserError

IGNORED = -100  # a position that is no target, as torch.nn.functional.cross_entropy has it


@dataclass(frozen=True)
class MicroBatch:
    """What one rank feeds at once."""

    index: int  # global inside the step
    tokens: torch.Tensor  # (micro_batch, L) int64
    targets: torch.Tensor  # (micro_batch, L) int64, IGNORED where there is none
    documents: torch.Tensor | None = None  # (micro_batch, L) int32, where they are kept apart

    def arguments(self, device: torch.device) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """What a model is called with, on its device: positional and named."""
        placed = [t.to(device, non_blocking=True) for t in (self.tokens, self.targets)]
        if self.documents is None:
            return tuple(placed), {}
        return tuple(placed), {"documents_BL": self.documents.to(device, non_blocking=True)}


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step, whose windows are those of [g0, g1) that are not skipped."""

    step: int
    g0: int
    g1: int
    micro: list[MicroBatch]
    shares: dict[str, int]  # targets of the whole step, over all ranks, by source
    window_hash: int  # sum mod 2^64 over this rank's windows; the ranks' sum is the step's
    lost: frozenset[Lost]  # members that this rank has found damaged since it knew `quarantine`
    quarantine: frozenset[Lost]  # members that count as damaged on all ranks from this step on

    @property
    def targets(self) -> int:
        """Of the whole step, over all ranks."""
        return sum(self.shares.values())


@dataclass(frozen=True)
class Share:
    """How a step is cut: `global_batch` windows in micro-batches of `micro_batch`, this rank's.

    Raises UserError where it doesn't divide.
    """

    global_batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        at_once = self.micro_batch * self.world_size
        if self.global_batch % at_once:
            raise UserError(
                "train.global_batch",
                f"{self.global_batch} windows don't divide into micro-batches of "
                f"{self.micro_batch} for {self.world_size} ranks",
                f"make it a multiple of {at_once}",
            )

    @property
    def first(self) -> int:
        """The number of this rank's first micro-batch in the step."""
        return self.rank * self.count

    @property
    def count(self) -> int:
        """This rank's micro-batches."""
        return self.global_batch // self.micro_batch // self.world_size

    def of(self, intervals: Sequence[Interval]) -> list[Interval]:
        """This rank's samples out of a step's."""
        low, size = self.first * self.micro_batch, self.count * self.micro_batch
        found: list[Interval] = []
        for a, b in intervals:
            start, end = a + low, min(b, a + low + size)
            if start < end:
                found.append((start, end))
                size -= end - start
            low = max(0, low - (b - a))
        return found


def stream(
    feed: Feed,
    share: Share,
    steps: range,
    g: int,
    *,
    workers: int = 1,
    quarantine: frozenset[Lost] = frozenset(),
    agree: Agree | None = None,
    tell: Tell = lambda sentence: None,
) -> Generator[Batch, None, None]:
    """This rank's batches of `steps`, the first of which begins at sample g.

    workers, agree, tell: see `prefetched`. quarantine: members that are known to be damaged. Faults
    of reading are raised here, at the step that they belong to. Closing the generator ends the
    workers.
    """

    def plan() -> Iterator[tuple[int, list[Interval]]]:
        nonlocal g
        for step in steps:
            samples = feed.step(g, share.global_batch)
            yield step, samples
            g = samples[-1][1]

    def make(job: tuple[int, list[Interval]], known: frozenset[Lost], at: At) -> Batch:
        step, samples = job
        rows = feed.read(share.of(samples), known, at)
        return Batch(
            step=step,
            g0=samples[0][0],
            g1=samples[-1][1],
            micro=_micro_batches(rows, share),
            shares=dict(zip(feed.names, feed.targets(samples).tolist(), strict=True)),
            window_hash=rows.hash,
            lost=rows.lost,
            quarantine=known | rows.lost,
        )

    def fetch(job: tuple[int, list[Interval]]) -> None:
        feed.will_read(share.of(job[1]))

    return prefetched(plan(), make, fetch, quarantine, workers, agree, tell)


def validation_windows(
    split: Split,
    sequence_length: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    documents: bool = False,
) -> Iterator[MicroBatch]:
    """The windows of a split in their fixed order, or `limit` of them evenly spread over it.

    Rank r takes every world_size-th micro-batch from r on. All ranks get equally many, because they
    call collectives together: missing rows and micro-batches are padding without a target.
    """
    places = [
        (shard, start, min(sequence_length + 1, tokens - start))
        for shard, tokens in enumerate(split.shard_tokens)
        for start in range(0, tokens - 1, sequence_length)
    ]
    if limit is not None and limit < len(places):
        places = [places[i * len(places) // limit] for i in range(limit)]
    count = -(-len(places) // micro_batch)
    for index in range(rank, -(-count // world_size) * world_size, world_size):
        chosen = places[index * micro_batch : (index + 1) * micro_batch]
        yield _validation_micro_batch(
            split, index, chosen, (micro_batch, sequence_length), documents
        )


def _validation_micro_batch(
    split: Split,
    index: int,
    places: list[tuple[int, int, int]],
    shape: tuple[int, int],
    documents: bool,
) -> MicroBatch:
    tokens = np.zeros((shape[0], shape[1] + 1), split.dtype)
    numbers = np.zeros(tokens.shape, np.int32) if documents else None
    lengths = np.ones(shape[0], np.int64)
    for i, place in enumerate(places):
        lengths[i] = place[2]
        tokens[i, : place[2]] = split.read(*place)
        if numbers is not None:
            ends = split.document_ends(*place)
            numbers[i] = np.searchsorted(ends, np.arange(shape[1] + 1), side="right")
    inputs, targets, numbered = _tensors(tokens, lengths, numbers)
    return MicroBatch(index, inputs, targets, numbered)


def _micro_batches(rows: Rows, share: Share) -> list[MicroBatch]:
    tensors = _tensors(rows.tokens, rows.sizes, rows.documents, rows.begins)
    parts = zip(*(t.split(share.micro_batch) for t in tensors if t is not None), strict=True)
    return [MicroBatch(share.first + i, *part) for i, part in enumerate(parts)]


def _tensors(
    tokens: np.ndarray,
    lengths: np.ndarray,
    documents: np.ndarray | None,
    begins: np.ndarray | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Windows (n, L + 1) as inputs and targets; beyond a window's end token 0 and no target, and
    none where a packed document begins."""
    # One piece of memory: two would be mapped and unmapped anew every step, at ten times the cost.
    pair = np.empty((2, len(tokens), tokens.shape[1] - 1), np.int64)
    pair[0], pair[1] = tokens[:, :-1], tokens[:, 1:]
    for i in np.flatnonzero(lengths < tokens.shape[1]).tolist():
        pair[0, i, lengths[i] - 1 :] = 0
        pair[1, i, lengths[i] - 1 :] = IGNORED
    if begins is not None:
        pair[1][begins[:, 1:]] = IGNORED
    inputs, targets = torch.from_numpy(pair)
    numbers = None if documents is None else torch.from_numpy(documents[:, :-1].copy())
    return inputs, targets, numbers
