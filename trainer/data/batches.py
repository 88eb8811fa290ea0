"""A dataset as a PyTorch IterableDataset: batches in the order of training, with exact resume.

Invariant: the windows are those of a run with the same train.sequence_length, train.global_batch
and train.seed on this dataset alone; they depend neither on ranks and threads nor on interruptions.
The state counts the batches that the consumer took, never prefetched ones.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from forescale.data.dataset import SHUFFLE_SHARDS, Dataset
from forescale.data.feed import Feed
from forescale.data.mixture import Mixture, MixtureStage
from forescale.data.order import Order
from forescale.data.stream import StepShare, stream
from forescale.ground.errors import UserError

_NAME = "data"


class Batches(IterableDataset):
    """Batches of the training split, each a dict of tensors: tokens and targets (B, L) int64, -100
    where there is no target, and with documents=True documents (B, L) int32.

    sequence_length: L; batch: windows of a batch over all ranks: rank r of world_size gets the r-th
    run of them. epochs: passes over the split, rounded down to whole batches; None: without end.
    documents: number the documents of each window. threads: number of threads that read ahead.
    Raises UserError for invalid sizes, and if the split has no window.
    """

    def __init__(
        self,
        dataset: Dataset,
        sequence_length: int,
        batch: int,
        *,
        seed: int = 1337,
        epochs: float | None = None,
        documents: bool = False,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
    ):
        super().__init__()
        least = {
            "sequence_length": 1,
            "batch": 1,
            "seed": 0,
            "rank": 0,
            "world_size": 1,
            "threads": 1,
        }
        values: tuple[Any, ...] = (sequence_length, batch, seed, rank, world_size, threads)
        for (name, first), value in zip(least.items(), values, strict=True):
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise UserError(name, f"{value!r} is not a whole number", f"give {first} or more")
            if not first <= value < 2**40:
                raise UserError(name, f"{value} is not a number of them", f"give at least {first}")
        passes: Any = epochs
        if passes is not None and not (isinstance(passes, int | float) and 0 < passes < math.inf):
            raise UserError("epochs", f"{passes!r} is not a number of passes", "give 1 or more")
        if rank >= world_size:
            raise UserError("rank", f"{rank} is none of {world_size} ranks", "count them from 0")
        if batch % world_size:
            problem = f"{batch} windows can't be divided among {world_size} ranks"
            raise UserError("batch", problem, f"make it a multiple of {world_size}")
        split = dataset.split("train")
        order = Order(split.shard_tokens, sequence_length, seed, SHUFFLE_SHARDS)
        mixture = Mixture({_NAME: order}, [MixtureStage.of(0, [1])], seed)
        self._feed = Feed(
            {_NAME: split}, mixture, dataset.vocab_size, documents=documents, seed=seed
        )
        self._share = StepShare(batch, batch // world_size, rank, world_size)
        self._threads, self._taken = threads, 0
        per_epoch = order.windows_per_epoch
        self._count = None if epochs is None else int(epochs * per_epoch) // batch
        self._settings = {
            "dataset": dataset.identity,
            "sequence_length": sequence_length,
            "batch": batch,
            "seed": seed,
        }

    def __len__(self) -> int:
        """The batches of all epochs. Raises TypeError if they have no end."""
        if self._count is None:
            raise TypeError("epochs=None has no end")
        return self._count

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the remaining batches, from the one after the last that was taken."""
        if get_worker_info() is not None:
            problem = "would be read once by each worker process of the DataLoader"
            todo = "write DataLoader(batches, batch_size=None, num_workers=0): it has threads"
            raise UserError("num_workers", problem, todo)
        size = self._share.global_batch
        steps = range(self._taken, 1 << 62 if self._count is None else self._count)
        batches = stream(self._feed, self._share, steps, self._taken * size, workers=self._threads)
        try:
            for batch in batches:
                (micro,) = batch.micro
                tensors = {"tokens": micro.tokens, "targets": micro.targets}
                if micro.documents is not None:
                    tensors["documents"] = micro.documents
                self._taken = batch.step + 1  # before the consumer has it: it may stop there
                yield tensors
        finally:
            batches.close()

    def state_dict(self) -> dict[str, Any]:
        """Return where the reading is: plain values, the same on each rank."""
        return {**self._settings, "batches": self._taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue after the batches of a state, at any rank and number of ranks. Raises UserError
        for a state of other data or another order."""
        state = dict(state)
        for name, value in self._settings.items():
            if state.get(name) != value:
                problem = f"the state is of {state.get(name)}, these batches of {value}"
                raise UserError(name, problem, "open the data as when the state was taken")
        if type(taken := state.get("batches")) is not int or taken < 0:
            raise UserError("batches", f"{taken!r} is not a number of them", "give a whole state")
        self._taken = taken
