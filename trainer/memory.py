"""What a rank holds in memory, and the sentence for a rank that ran out of it."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from models.config import ModelConfig
from models.flops import activation_bytes, count
from trainer.config import TrainJob
from trainer.errors import UserError


@dataclass(frozen=True)
class Bytes:
    """Of one rank: weights and gradients as they are computed with, fp32 masters and moments, and
    what one micro-batch's forward leaves for its backward."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations


def bytes_of(job: TrainJob, world_size: int, micro_batch: int | None = None) -> Bytes | None:
    """The estimate for one of our models (ZeRO: Rajbhandari et al. 2020, arXiv 1910.02054, section
    3); None for a class of the user's own, of which we can't know the activations."""
    if not isinstance(job.model, ModelConfig) or job.model.vocab_size is None:
        return None
    size = 4 if job.precision.kind == "fp32" else 2
    n, stage = count(job.model).total, job.engine.stage
    moments = 8 if job.optimizer.kind == "adamw" else 4 + 4  # at most: Muon keeps one
    masters = 0 if stage == 0 and size == 4 else 4
    micro = micro_batch or job.train.micro_batch
    return Bytes(
        weights=n * size // (world_size if stage == 3 else 1),
        gradients=n * size // (world_size if stage >= 2 else 1),
        optimizer=n * (masters + moments) // (world_size if stage >= 1 else 1),
        activations=activation_bytes(job.model, micro, job.train.sequence_length, size),
    )


@contextmanager
def explained(job: TrainJob) -> Iterator[None]:
    """Turn running out of memory into one sentence with numbers and a micro-batch that fits."""
    try:
        yield
    except Exception as e:
        if not _is_out_of_memory(e):
            raise
        raise UserError("memory", _what(job), _todo(job)) from e


def _is_out_of_memory(error: Exception) -> bool:
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def _peak() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _available() -> int:
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    total = psutil.virtual_memory().total
    return total if soft == resource.RLIM_INFINITY else min(soft, total)


def _world_size() -> int:
    import os

    return int(os.environ.get("WORLD_SIZE", "1"))


def _what(job: TrainJob) -> str:
    planned = bytes_of(job, _world_size())
    plan = f"{_gib(planned.total)} were planned, " if planned else ""
    return f"a rank ran out of it ({plan}{_gib(_peak())} were in use of {_gib(_available())})"


def _todo(job: TrainJob) -> str:
    fits = largest_micro_batch(job, _world_size(), _available())
    if fits:
        return f"set train.micro_batch={fits}"
    more = "a higher engine stage, model.activation_checkpointing=true or engine.offload_optimizer"
    return f"lower train.micro_batch, or use {more}"


def largest_micro_batch(job: TrainJob, world_size: int, available: int) -> int | None:
    """The largest micro-batch below the present one that divides the batch and should fit in nine
    tenths of `available` bytes; None where none does or the model isn't ours.

    The present one did not fit, so nine tenths of its plan are a bound too: for what the plan can't
    know, such as other processes and fragmentation.
    """
    present = bytes_of(job, world_size)
    if present is None:
        return None
    for micro in range(job.train.micro_batch - 1, 0, -1):
        planned = bytes_of(job, world_size, micro)
        divides = job.train.global_batch % (micro * world_size) == 0
        if divides and planned and planned.total <= 0.9 * min(available, present.total):
            return micro
    return None


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
