"""Turn an out-of-memory error into one message with numbers and a micro-batch that fits."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from forescale.config.hardware import gpu_memory
from forescale.config.train import TrainJob
from forescale.ground.errors import UserError
from forescale.models.config import ModelConfig
from forescale.plan.bytes.memory import Memory, memory
from forescale.plan.bytes.parameters import inventory
from forescale.plan.config import MachineConfig, PlanConfig
from forescale.plan.options import MOST_MICRO_BATCH, more_checkpointing, with_checkpointing

_LARGE_VOCABULARY = 65_536
_IMPORTS = 2**30  # bytes
_NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")  # on a CPU


def bytes_of(job: TrainJob, world_size: int, micro_batch: int | None = None) -> Memory | None:
    """Return the planned memory of a rank (bytes/memory.py); None for a class of the user's own.

    The activations of such a class are not known.
    """
    if not isinstance(job.model, ModelConfig) or job.model.vocab_size is None:
        return None
    if micro_batch is not None:
        job = replace(job, train=replace(job.train, micro_batch=micro_batch))
    return memory(job, inventory(job), world_size)


def fits_here(job: TrainJob, ranks: int) -> bool | None:
    """Return True if so many ranks fit in the memory of this machine's GPUs; without a GPU in what
    is free, each with a GiB for what it imports. None for a class of the user's own, whose memory
    is not known.

    What is not known before the data is opened is guessed, the vocabulary as a large one.
    """
    import psutil

    if not isinstance(job.model, ModelConfig):
        return None
    length = job.train.sequence_length
    guesses: dict[str, Any] = {"vocab_size": _LARGE_VOCABULARY, "max_sequence_length": length}
    if job.model.has_encoder:
        guesses["source_length"] = length // 2
    unknown = {name: by for name, by in guesses.items() if getattr(job.model, name) is None}
    needs = bytes_of(replace(job, model=replace(job.model, **unknown)), ranks)
    assert needs is not None, "of our own model with a vocabulary"
    if (size := gpu_memory()) is not None:
        return needs.total + MachineConfig.reserved_bytes <= (1 - PlanConfig.margin) * size
    return ranks * (needs.total + _IMPORTS) < psutil.virtual_memory().available


@contextmanager
def explained(job: TrainJob) -> Iterator[None]:
    """Raise UserError with numbers and a micro-batch that fits if the body runs out of memory."""
    try:
        yield
    except Exception as e:
        import psutil
        import torch

        is_allocation = any(text in str(e) for text in _NO_MEMORY) and isinstance(e, RuntimeError)
        if not (isinstance(e, MemoryError | torch.OutOfMemoryError) or is_allocation):
            raise
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
            available = torch.cuda.get_device_properties(0).total_memory
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            soft, _ = resource.getrlimit(resource.RLIMIT_AS)
            total = psutil.virtual_memory().total
            available = total if soft == resource.RLIM_INFINITY else min(soft, total)
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        planned = bytes_of(job, ranks)
        plan = f"planned: {_gib(planned.total)}, " if planned else ""
        problem = f"a rank ran out of memory ({plan}used: {_gib(peak)} of {_gib(available)})"
        raise UserError("memory", problem, _todo(job, ranks, available)) from e


def _todo(job: TrainJob, ranks: int, available: int) -> str:
    fits = largest_micro_batch(job, ranks, available)
    how = cheapest_checkpointing(job, ranks, available)
    key = f"model.activation_checkpointing={how}"
    if fits:
        return f"set train.micro_batch={fits}" + (f", or {key}" if how else "")
    if how:
        return f"set {key}"
    left = ", model.activation_checkpointing=full" if more_checkpointing(job) else ""
    stage = f"a higher engine stage{left} or engine.offload_optimizer"
    return f"lower train.micro_batch, choose a smaller model, or use {stage}"


def largest_micro_batch(job: TrainJob, world_size: int, available: int) -> int | None:
    """Return the largest smaller micro-batch that divides the batch and should fit.

    It must fit in 90% of `available` bytes. Its activations must also be at most 90% of the present
    ones: these did not fit, perhaps because of something that the plan can't know, such as other
    processes or fragmentation. None if no micro-batch fits or the model is the user's class.
    """
    for micro in range(min(job.train.micro_batch - 1, MOST_MICRO_BATCH), 0, -1):
        divides = job.batch_ramp.first % (micro * job.mesh(world_size).data) == 0
        if divides and _should_fit(job, bytes_of(job, world_size, micro), world_size, available):
            return micro
    return None


def cheapest_checkpointing(job: TrainJob, world_size: int, available: int) -> str | None:
    """Return the activation checkpointing that makes least again and should fit, by the same rule;
    None if none does."""
    for how in more_checkpointing(job):
        planned = bytes_of(with_checkpointing(job, how), world_size)
        if _should_fit(job, planned, world_size, available):
            return how
    return None


def _should_fit(job: TrainJob, planned: Memory | None, world_size: int, available: int) -> bool:
    present = bytes_of(job, world_size)
    if present is None or planned is None:
        return False
    if present.activations is None or planned.activations is None:
        return False
    is_less = planned.activations.total <= 0.9 * present.activations.total
    return planned.total <= 0.9 * available and is_less


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
