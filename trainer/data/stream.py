"""Batches of a step, a pure function of the feed. Of the data room, only this file and batches.py
use tensors.

    feed -> windows of a step -> this rank's run of them -> micro-batches, numbered globally

Invariant: micro-batch j of a step holds its windows [j * micro_batch, (j + 1) * micro_batch) and is
the same tensor at any world size; rank r of W gets the r-th of W contiguous runs of them. The
position in the data is the step that the consumer has taken, never a prefetched one
(forescale.data.pipeline).
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from forescale.data.bins import Bins
from forescale.data.dataset import Split
from forescale.data.feed import Feed, LostMember, OnRead, Rows, empty_rows
from forescale.data.mixture import Interval
from forescale.data.objective import IGNORED, NEXT_TOKEN, Objective, rows_of
from forescale.data.pipeline import Agree, Log, prefetched
from forescale.ground.errors import UserError


@dataclass(frozen=True)
class MicroBatch:
    """The windows that one rank processes at once, each a row, or cut into several (`cut`)."""

    index: int  # global inside the step
    tokens: torch.Tensor  # (micro_batch, L) int64; of preferences (2 * micro_batch, L)
    targets: torch.Tensor  # (micro_batch, L) int64, IGNORED if there is none
    documents: torch.Tensor | None = None  # (micro_batch, L) int32, with document_mask
    # (micro_batch, L) bool, False where a row has no token; only where a window ends early, and
    # only with an objective whose model must know (its padding_mask).
    padding_mask: torch.Tensor | None = None
    references: torch.Tensor | None = None  # (micro_batch, 2) float32, see Feed; no argument

    def cut(self, length: int) -> "MicroBatch":
        """Return it with each window cut into rows of `length` targets: (micro_batch * L / length,
        length). Only for windows without padding mask and references."""
        if length == self.tokens.shape[1]:
            return self
        documents = None if self.documents is None else self.documents.reshape(-1, length)
        tokens, targets = self.tokens.reshape(-1, length), self.targets.reshape(-1, length)
        return replace(self, tokens=tokens, targets=targets, documents=documents)

    def pinned(self) -> "MicroBatch":
        """Return it in pinned memory, from which a copy to a GPU does not wait."""
        fields = ("tokens", "targets", "documents", "padding_mask", "references")
        tensors = {name: getattr(self, name) for name in fields}
        return replace(self, **{k: t.pin_memory() for k, t in tensors.items() if t is not None})

    def arguments(self, device: torch.device) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
        """Return positional and named arguments of the model, on the device."""
        placed = [t.to(device, non_blocking=True) for t in (self.tokens, self.targets)]
        named = {"documents_BL": self.documents, "padding_mask_BL": self.padding_mask}
        return tuple(placed), {
            name: tensor.to(device, non_blocking=True)
            for name, tensor in named.items()
            if tensor is not None
        }


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step: the samples of [g0, g1) without skipped ones."""

    step: int
    g0: int
    g1: int
    micro: list[MicroBatch]
    shares: dict[str, int]  # targets of the whole step, over all ranks, by source
    window_hash: int  # sum mod 2^64 over this rank's windows; the ranks' sum is the step's
    micro_batches: int  # of the whole step, over all ranks
    lost: frozenset[LostMember]  # damaged members that this rank met while reading this batch
    quarantine: frozenset[LostMember]  # members treated as damaged on all ranks from this step on

    @property
    def targets(self) -> int:
        """Targets of the whole step, over all ranks."""
        return sum(self.shares.values())


@dataclass(frozen=True)
class StepShare:
    """One rank's share of a step: `global_batch` windows in micro-batches of `micro_batch`.

    is_even: all ranks must have the same number of these; else some may have one more. Raises
    UserError if the batch can't be divided so.
    """

    global_batch: int
    micro_batch: int
    rank: int = 0
    world_size: int = 1
    is_even: bool = True

    def __post_init__(self) -> None:
        at_once = self.micro_batch * (self.world_size if self.is_even else 1)
        if self.global_batch % at_once or self.total < self.world_size:
            least = self.micro_batch * self.world_size
            raise UserError(
                "train.global_batch",
                f"{self.global_batch} windows can't be divided into micro-batches of "
                f"{self.micro_batch} for {self.world_size} ranks",
                f"make it a multiple of {at_once}, {least} at least",
            )

    @property
    def total(self) -> int:
        """The micro-batches of the step, over all ranks."""
        return self.global_batch // self.micro_batch

    @property
    def first(self) -> int:
        """The number of this rank's first micro-batch in the step."""
        return self.total * self.rank // self.world_size

    @property
    def count(self) -> int:
        """The number of this rank's micro-batches."""
        return self.total * (self.rank + 1) // self.world_size - self.first

    def of(self, intervals: Sequence[Interval]) -> list[Interval]:
        """Return this rank's samples out of a step's."""
        low, size = self.first * self.micro_batch, self.count * self.micro_batch
        share: list[Interval] = []
        for a, b in intervals:
            start, end = a + low, min(b, a + low + size)
            if start < end:
                share.append((start, end))
                size -= end - start
            low = max(0, low - (b - a))
        return share


_Planned = tuple[int, list[Interval], StepShare]  # a step, its samples, its share


def stream(
    feed: Feed,
    share: StepShare,
    steps: range,
    g: int,
    *,
    workers: int = 1,
    quarantine: frozenset[LostMember] = frozenset(),
    agree: Agree | None = None,
    log: Log = lambda sentence: None,
    pin: bool = False,
    length: Callable[[int], int] | None = None,
    windows: Callable[[int], int] | None = None,
) -> Generator[Batch, None, None]:
    """Yield this rank's batches of `steps`, the first of which begins at sample g.

    workers, agree, log: see `prefetched`. quarantine: members that are known to be damaged. Errors
    of reading are raised here, at the step that they belong to. Closing the generator ends the
    workers. pin: give pinned tensors, for a GPU. length: targets of a row by step, into which
    windows are cut; None: a row is a window. windows: number by step; None: always that of `share`.
    """

    def plan() -> Iterator[_Planned]:
        nonlocal g
        for step in steps:
            of_step = replace(share, global_batch=windows(step)) if windows else share
            samples = feed.step(g, of_step.global_batch)
            yield step, samples, of_step
            g = samples[-1][1]

    def make(job: _Planned, known: frozenset[LostMember], on_read: OnRead) -> Batch:
        step, samples, of_step = job
        rows = feed.read(of_step.of(samples), known, on_read)
        micro = _micro_batches(rows, of_step.micro_batch, of_step.first, feed.objective)
        if length is not None:
            micro = [m.cut(length(step)) for m in micro]
        return Batch(
            step=step,
            g0=samples[0][0],
            g1=samples[-1][1],
            micro=[m.pinned() for m in micro] if pin else micro,
            shares=dict(zip(feed.names, feed.targets(samples).tolist(), strict=True)),
            window_hash=rows.hash,
            micro_batches=of_step.total,
            lost=rows.lost,
            quarantine=known | rows.lost,
        )

    def fetch(job: _Planned) -> None:
        _, samples, of_step = job
        feed.will_read(of_step.of(samples))

    return prefetched(plan(), make, fetch, quarantine, workers, agree, log)


def validation_windows(
    split: Split,
    sequence_length: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    documents: bool = False,
    objective: Objective = NEXT_TOKEN,
    bins: Bins | None = None,
    references: np.ndarray | None = None,
) -> Iterator[MicroBatch]:
    """Yield the windows of a split in their fixed order, or `limit` of them, evenly spread over it.
    bins: of the split, if its windows are bins, such as pairs; references: of each bin, see Feed.

    Rank r takes every world_size-th micro-batch from r on. All ranks get the same number because
    they call collectives together: missing rows and micro-batches are padding without a target.
    """
    places = held_out_places(split, sequence_length, bins)
    numbers = np.array(spread(len(places), limit), np.int64)
    micro_batch = min(micro_batch, max(1, len(numbers)))  # no rows beyond the windows
    count = -(-len(numbers) // micro_batch)
    for index in range(rank, -(-count // world_size) * world_size, world_size):
        chosen = numbers[index * micro_batch : (index + 1) * micro_batch]
        rows = empty_rows(micro_batch, sequence_length, split.dtype, documents, bins, references)
        rows.numbers[: len(chosen)] = chosen
        for i, (shard, runs) in enumerate(places[number] for number in chosen.tolist()):
            start, ends = runs[0][0], np.cumsum([length for _, length in runs])
            size = rows.sizes[i] = ends[-1]  # runs follow each other
            rows.tokens[i, :size] = split.read(shard, start, size)
            if rows.documents is not None:
                document_ends = split.document_ends(shard, start, size)
                rows.number_documents(i, document_ends)
            if bins is not None:
                rows.mark_pieces(i, bins, ends)
        if references is not None and rows.references is not None:
            rows.references[: len(chosen)] = references[chosen]
        (micro,) = _micro_batches(rows, micro_batch, index, objective)
        micro.targets[len(chosen) * rows_of(objective) :] = IGNORED
        yield micro


_Place = tuple[int, list[tuple[int, int]]]  # a shard; first token and number of tokens of each run


def spread(count: int, limit: int | None) -> list[int]:
    """Return `limit` numbers below `count`, evenly spread; all without a limit."""
    if limit is None or limit >= count:
        return [*range(count)]
    return (np.arange(limit) * count // limit).tolist()


def held_out_places(split: Split, sequence_length: int, bins: Bins | None) -> list[_Place]:
    """Return where the windows of a split lie, in their fixed order: a shard, and the runs of its
    tokens, (first, number), that make the window."""
    if bins is not None:
        return [
            (shard, bins.pieces(shard, number))
            for shard, count in enumerate(bins.counts.tolist())
            for number in range(count)
        ]
    return [
        (shard, [(start, min(sequence_length + 1, tokens - start))])
        for shard, tokens in enumerate(split.shard_tokens)
        for start in range(0, tokens - 1, sequence_length)
    ]


def _micro_batches(rows: Rows, size: int, first: int, objective: Objective) -> list[MicroBatch]:
    """Return the rows as micro-batches of `size` windows, numbered from `first` on."""
    cuts = () if rows.cuts is None else (rows.cuts,)
    pair = objective.examples(rows.tokens, rows.sizes, rows.numbers, *cuts)
    if rows.ignored is not None:
        pair[1][rows.ignored[:, 1:]] = IGNORED
    inputs, targets = torch.from_numpy(pair)
    # The document of each input: (n, L + 1) -> (n, L).
    documents = None if rows.documents is None else torch.from_numpy(rows.documents[:, :-1].copy())
    references = None if rows.references is None else torch.from_numpy(rows.references)
    padding_mask = getattr(objective, "padding_mask", None)
    micro, each = [], rows_of(objective)
    for i, start in enumerate(range(0, len(rows.tokens), size)):
        part = slice(start, start + size)
        of = slice(part.start * each, part.stop * each)
        mask = padding_mask(rows.sizes[part], *(c[part] for c in cuts)) if padding_mask else None
        micro.append(
            MicroBatch(
                first + i,
                inputs[of],
                targets[of],
                None if documents is None else documents[part],
                None if mask is None else torch.from_numpy(mask),
                None if references is None else references[part],
            )
        )
    return micro
