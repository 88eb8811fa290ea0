"""Batches of a step, a pure function of the order: the only part of the data that knows tensors.

    order -> windows of a step -> micro-batches, numbered globally -> this rank's run -> tensors

Invariant: micro-batch j of a step covers windows [g0 + j * micro_batch, g0 + (j + 1) * micro_batch)
and is the same tensor at any world size; rank r of W gets the r-th of W contiguous runs of them.
The cursor is the step that the consumer has taken, never what was prefetched.
"""

import hashlib
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import torch

from trainer.data.order import Order
from trainer.data.shards import Split
from trainer.errors import UserError

IGNORED = -100  # a position that is no target, as torch.nn.functional.cross_entropy has it
_AHEAD = 2  # steps that are held ready
T = TypeVar("T")


@dataclass(frozen=True)
class MicroBatch:
    """What one rank feeds at once."""

    index: int  # global inside the step
    tokens: torch.Tensor  # (micro_batch, L) int64
    targets: torch.Tensor  # (micro_batch, L) int64, IGNORED where there is none


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step that owns windows [g0, g1)."""

    step: int
    g0: int
    g1: int
    micro: list[MicroBatch]
    targets: int  # of the whole step, over all ranks
    window_hash: int  # sum mod 2^64 over this rank's windows; the ranks' sum is the step's


def window_hash(g: int, tokens: np.ndarray) -> int:
    """BLAKE2b-64 of g (uint64) and the window's tokens (uint32 each), little-endian, unpadded."""
    data = g.to_bytes(8, "little") + tokens.astype("<u4").tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def stream(
    split: Split,
    order: Order,
    step: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    total_steps: int,
    first: int | None = None,
) -> Generator[Batch, None, None]:
    """This rank's batches of steps [step, total_steps), prepared by one thread, two steps ahead.

    global_batch: windows a step; micro_batch: windows a micro-batch; first: the global sample index
    of `step`'s first window (None: step * global_batch). Faults of reading are raised here, at the
    step that they belong to. Closing the generator ends the thread. Raises UserError where the
    batch doesn't divide.
    """
    count, rest = divmod(global_batch, micro_batch)
    if rest or count % world_size:
        raise UserError(
            "train.global_batch",
            f"{global_batch} windows don't divide into micro-batches of {micro_batch} "
            f"for {world_size} ranks",
            f"make it a multiple of {micro_batch * world_size}",
        )
    origin = step * global_batch if first is None else first
    share = count // world_size

    def batch(t: int) -> Batch:
        g0 = origin + (t - step) * global_batch
        micro, digest = [], 0
        for j in range(rank * share, (rank + 1) * share):
            a = g0 + j * micro_batch
            places = zip(*order.windows(a, a + micro_batch), strict=True)
            rows = [split.read(*map(int, place)) for place in places]
            digest += sum(window_hash(a + i, row) for i, row in enumerate(rows))
            micro.append(_tensors(j, rows, micro_batch, order.sequence_length))
        g1 = g0 + global_batch
        return Batch(t, g0, g1, micro, order.targets(g0, g1), digest % 2**64)

    return _prefetch(map(batch, range(step, total_steps)), _AHEAD)


def validation_windows(
    split: Split,
    sequence_length: int,
    micro_batch: int,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
) -> Iterator[MicroBatch]:
    """The windows of a split in their fixed order, or the first `limit` of them, for evaluation.

    Rank r takes every world_size-th micro-batch from r on. All ranks get equally many, because they
    call collectives together: missing rows and micro-batches are padding without a target. The
    documents were shuffled when the dataset was built, so the first windows are a fair sample.
    """
    places = [
        (shard, start, min(sequence_length + 1, tokens - start))
        for shard, tokens in enumerate(split.shard_tokens)
        for start in range(0, tokens - 1, sequence_length)
    ][:limit]
    count = -(-len(places) // micro_batch)
    for index in range(rank, -(-count // world_size) * world_size, world_size):
        rows = [
            split.read(*place) for place in places[index * micro_batch : (index + 1) * micro_batch]
        ]
        yield _tensors(index, rows, micro_batch, sequence_length)


def _tensors(index: int, rows: list[np.ndarray], micro_batch: int, length: int) -> MicroBatch:
    """Windows as inputs and targets; what isn't there is token 0 and no target."""
    tokens = np.zeros((micro_batch, length), np.int64)
    targets = np.full((micro_batch, length), IGNORED, np.int64)
    for i, row in enumerate(rows):
        tokens[i, : len(row) - 1] = row[:-1]
        targets[i, : len(row) - 1] = row[1:]
    return MicroBatch(index, torch.from_numpy(tokens), torch.from_numpy(targets))


def _prefetch(items: Iterator[T], ahead: int) -> Generator[T, None, None]:
    """The items, made by a thread that is at most `ahead` items in advance."""
    free, ready, closed = threading.Semaphore(ahead), SimpleQueue[Any](), threading.Event()

    def work() -> None:
        try:
            while free.acquire() and not closed.is_set():
                ready.put((next(items, ready), None))
        except BaseException as e:
            ready.put((ready, e))

    thread = threading.Thread(target=work, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            item, error = ready.get()
            if error is not None:
                raise error
            if item is ready:
                return
            free.release()
            yield item
    finally:
        closed.set()
        free.release()
        thread.join()
