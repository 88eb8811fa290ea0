"""The processes of a run: who this rank is, its device, and the one word that ranks share a step.

Invariant: after `join` the world really has the size that was asked for, and DeepSpeed really runs
in it. Accelerate alone doesn't promise that: with `cpu=True` it falls back to plain DDP, and with
its DeepSpeed switch but no backend every rank gets a world of its own, both silently.
"""

import os
import resource
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def set_environment() -> None:
    """Must run before deepspeed or accelerate are imported: both read these while importing."""
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    # A group of gloo's holds a connection to every rank.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    if "RANK" not in os.environ:
        os.environ.update(alone)
        os.environ["MASTER_PORT"] = str(free_port())
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")


def free_port() -> int:
    """A TCP port of this host that nobody listens on at this moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@dataclass(frozen=True)
class Word:
    """What all ranks know of a step, the same on each.

    `losses`: sum of nats of each micro-batch, in global order; `tokens_hash`: see data.stream;
    `stop`: some rank was asked to end; `failed`: some rank's save behind the training has failed;
    `seconds`: rank 0's clock, so that all read the same time.
    """

    step: int
    losses: list[float]
    tokens_hash: int
    stop: bool
    failed: bool
    seconds: float


@dataclass(frozen=True)
class Line:
    """Objects between ranks, over a group of theirs; None: the default one."""

    rank: int
    size: int
    group: Any = None

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, on every rank, in rank order. A synchronisation."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def to_main(self, value: Any) -> list[Any] | None:
        """Everybody's value, in rank order, on rank 0; None on the others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self.group)
        return values


class World:
    """This rank among its peers. `device` is where its model lives."""

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self.rank: int = accelerator.process_index
        self.size: int = accelerator.num_processes
        self.device: torch.device = accelerator.device
        self._line = Line(self.rank, self.size)
        self._lines: dict[str, Line] = {}
        self._words: deque = deque()
        self._began = time.monotonic()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """Everybody's value, on every rank, in rank order. A synchronisation."""
        return self._line.gather(value)

    def to_main(self, value: Any) -> list[Any] | None:
        """Everybody's value, in rank order, on rank 0; None on the others."""
        return self._line.to_main(value)

    def in_background(self, name: str, new: bool = False) -> "Line":
        """A line for one other thread, which may use it while this one trains. Every rank calls
        this together. The same name gives the same line again, for a group holds a connection to
        every rank; `new` where one that was used may have been left in the middle of a word."""
        if new or name not in self._lines:
            group = dist.new_group(backend="gloo") if self.size > 1 else None
            self._lines[name] = Line(self.rank, self.size, group)
        return self._lines[name]

    def union_in_background(self) -> Callable[[frozenset], frozenset]:
        """A function that unites what the ranks give it, for one other thread."""
        line = self.in_background("union", new=True)
        return lambda mine: frozenset().union(*line.gather(mine))

    def from_main(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def share(
        self,
        step: int,
        losses: torch.Tensor,
        first: int,
        count: int,
        tokens_hash: int,
        stop: bool,
        failed: bool = False,
    ) -> None:
        """Send this rank's part of a step's word; never waits.

        losses: this rank's micro-batch sums, shape (n,), which stand at `first` of `count`.
        Each sum has one non-zero term a slot, so it is exact; the hash travels as two halves of 32
        bits, whose sums stay exact in fp64.
        """
        part = torch.zeros(count + 5, dtype=torch.float64, device=self.device)
        part[first : first + len(losses)] = losses
        clock = time.monotonic() - self._began if self.is_main else 0.0
        rest = [tokens_hash >> 32, tokens_hash & 0xFFFFFFFF, int(stop), int(failed), clock]
        part[count:] = torch.tensor(rest, dtype=torch.float64)
        work = dist.all_reduce(part, async_op=True) if self.size > 1 else None
        self._words.append((step, part, work))

    def words(self, behind: int) -> Iterator[Word]:
        """The words sent so far, oldest first, but for the `behind` newest."""
        while len(self._words) > behind:
            step, part, work = self._words.popleft()
            if work is not None:
                work.wait()
            *losses, high, low, stop, failed, clock = part.tolist()
            tokens_hash = ((int(high) << 32) + int(low)) % 2**64
            yield Word(step, losses, tokens_hash, stop > 0, failed > 0, clock)

    def close(self) -> None:
        """Leave together: a rank that is gone resets its connections, and would take from a slower
        one the answer to the last collective."""
        if self.size > 1:
            with suppress(RuntimeError):  # of this one the answer doesn't matter
                dist.barrier()


def lost_peer(error: Exception) -> bool:
    """Whether an error says no more than that another rank is gone, or doesn't answer."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def join(config: dict, size: int, timeout_seconds: float) -> World:
    """Join the ranks that the environment names, and check that they are `size`.

    config: the DeepSpeed JSON. timeout_seconds: how long a collective may wait for a peer.
    """
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DistributedType, InitProcessGroupKwargs

    class Plugin(DeepSpeedPlugin):
        def set_deepspeed_weakref(self) -> None:
            """Serves models that transformers builds; needs transformers, and we don't."""

    _quiet_deepspeed()
    cuda = torch.cuda.is_available()
    group = InitProcessGroupKwargs(
        backend="nccl" if cuda else "gloo", timeout=timedelta(seconds=timeout_seconds)
    )
    accelerator = Accelerator(
        cpu=False,
        deepspeed_plugin=Plugin(hf_ds_config=config),
        kwargs_handlers=[group],
    )
    kind = accelerator.distributed_type
    assert kind == DistributedType.DEEPSPEED, f"accelerate runs {kind} and not DeepSpeed"
    joined = dist.get_world_size() if dist.is_initialized() else 0
    assert joined == size, f"{joined} ranks have joined where {size} were asked for"
    return World(accelerator)


def _quiet_deepspeed() -> None:
    """Keep DeepSpeed to warnings, and from compiling its shared-memory collectives on a CPU: the
    build takes over a minute, and a process killed in it leaves a lock that hangs the next one;
    gloo does the same work."""
    import logging
    import warnings

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed calls what newer versions of torch give new names.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
