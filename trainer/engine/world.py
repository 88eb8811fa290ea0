"""The processes of a run: this rank, its device, and the summary of a step that all ranks share.

All cross-rank decisions travel in one all-reduced StepSummary per step. Invariant: after `join` the
world really has the requested size, and DeepSpeed really runs in it. Accelerate alone doesn't
promise that: with `cpu=True` it falls back to plain DDP, and with its DeepSpeed switch but no
backend every rank gets a world of its own, both silently.
"""

import os
import resource
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from forescale.config.mesh import Mesh
from forescale.engine.digits import DIGITS, MOST_SLOTS, Digits, number_of
from forescale.engine.ranks import ALONE, LastStage, Ranks, Tree, joined
from forescale.ground.errors import UserError
from forescale.ground.rendezvous import LOOPBACK, free_port, is_loopback, open_store, use_loopback


def set_environment() -> None:
    """Set what deepspeed and accelerate read while they are imported; call it before that."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # accelerate launch --cpu
    # What `accelerate launch` sets beside the ranks (precision, compilation, sharding) is the
    # affair of our config; on a CPU it would leave DeepSpeed out.
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    elif "PYTORCH_ALLOC_CONF" not in os.environ:
        # Segments that grow fragment less, where the sizes of activations vary.
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    # Rank 0's store and the default group of ranks on CPUs hold a connection to every rank.
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    if "RANK" not in os.environ:
        os.environ.update(alone)
        os.environ["MASTER_PORT"] = str(free_port())
    os.environ.setdefault("MASTER_ADDR", LOOPBACK)
    if is_loopback(os.environ["MASTER_ADDR"]):
        use_loopback()


def import_libraries(compiler: bool) -> None:
    """Import what ranks import, for a process that they are forked from; with the compiler, or
    without it. Sets environment variables."""
    # Else torch would start the CUDA driver to see whether there is a GPU.
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
    set_environment()
    import accelerate  # noqa: F401
    import deepspeed  # noqa: F401

    if compiler:
        import torch._dynamo
        import torch._inductor.compile_fx  # noqa: F401


@dataclass(frozen=True)
class StepSummary:
    """What all ranks know of a step; the same on each.

    losses: sum of nats of each micro-batch, in global order; of a step of over 1,024 micro-batches
    their exact sum alone, rounded once, in the place of all; tokens_hash: see data/stream.py;
    stop: some rank was asked to end; failed: some rank's save in the background has failed;
    seconds: rank 0's clock, so that all ranks read the same time; extra: further numbers by name
    (engine.step.Facts.extra), each the mean over ranks.
    """

    step: int
    losses: list[float]
    tokens_hash: int
    stop: bool
    failed: bool
    seconds: float
    extra: dict[str, float] = field(default_factory=dict)


class World(Ranks):
    """All ranks of this job, and this one among them.

    device: where this rank's model lives. Of the mesh (config/mesh.py): `columns`, the ranks that
    are fed the same windows as this one and divide their columns; `sequence`, those of them that
    exchange columns for heads; `context`, those that pass keys and values around; `tensor`, those
    that have the same columns and divide the matrices; `data`, those that have the same columns of
    other windows and the same parts of matrices, so that among them each window counts once;
    `states`, those that have the same parts of matrices; `shard`, those of them that have one copy
    of the states between them; `replicas`, those that have the same part of the states, one of each
    copy; `pipeline`, those at this one's place in each stage of the pipeline, in the order of the
    stages; `experts`, those that have the experts of a layer between them; `expert_data`, those
    that have the same experts as this, and one copy of their states between them.
    """

    compares: ClassVar[bool] = True  # the names of `extra` with those of the other ranks

    def __init__(self, accelerator, mesh: Mesh | None = None, timeout_seconds: float = 1800.0):
        super().__init__(accelerator.process_index, accelerator.num_processes)
        self.mesh = mesh or Mesh(self.size)
        wait = timedelta(seconds=timeout_seconds)
        self.sequence = self._grouped(self.mesh.sequence_peers(self.rank), wait)
        self.context = self._grouped(self.mesh.context_peers(self.rank), wait)
        self.columns = self.sequence if self.context.size == 1 else self.context
        if min(self.sequence.size, self.context.size) > 1:
            self.columns = self._grouped(self.mesh.columns_peers(self.rank), wait)
        self.tensor = self._grouped(self.mesh.tensor_peers(self.rank), wait)
        self.data: Ranks = self
        if self.mesh.data < self.size:
            self.data = self._grouped(self.mesh.data_peers(self.rank), wait)
        self.pipeline = self._grouped(self.mesh.pipeline_peers(self.rank), wait)
        # DeepSpeed reduces over the following, even if a group has one rank.
        self.states: Ranks = self
        if self.tensor.size > 1 or self.pipeline.size > 1:
            self.states = self._grouped(self.mesh.state_peers(self.rank), wait, least=1)
        self.shard, self.replicas = self.states, ALONE
        if self.mesh.shards < self.states.size:
            self.shard = self._grouped(self.mesh.shard_peers(self.rank), wait, least=1)
            self.replicas = self._grouped(self.mesh.replica_peers(self.rank), wait)
        self.experts = self._grouped(self.mesh.expert_peers(self.rank), wait)
        self.expert_data: Ranks = self
        if self.experts.size > 1 or self.pipeline.size > 1:
            peers = self.mesh.expert_data_peers(self.rank)
            self.expert_data = self._grouped(peers, wait, least=1)
        self.accelerator = accelerator
        self.device = torch.device(accelerator.device)
        self._groups: dict[str, Ranks] = {}
        self._pending: deque = deque()  # all-reduces of steps whose summary nobody has read
        self._has_cuda = self.device.type == "cuda"
        self._reads: torch.cuda.Stream | None = None
        self._digits = Digits(self.device)
        self._extra: tuple[str, ...] | None = None  # the names of the first step
        self._began = time.monotonic()

    @property
    def scoring(self) -> Ranks:
        """The ranks that score different windows, for Engine.losses with `everywhere` False."""
        return LastStage(self.data, self.pipeline) if self.pipeline.size > 1 else self.data

    @property
    def names_windows(self) -> bool:
        """True on one of the ranks that have the same windows, which count once."""
        return self.pipeline.is_main and self.columns.is_main and self.tensor.is_main

    def _grouped(
        self,
        peers: list[int],
        timeout: timedelta | None,
        least: int = 2,
        backend: str | None = None,
    ) -> Ranks:
        """Return this rank among some ranks, in a process group of their own if there are at least
        so many."""
        group = None
        if len(peers) >= least:  # only these ranks meet to make it: there may be many such groups
            group = dist.new_group(peers, timeout, backend, use_local_synchronization=True)
        return Ranks(peers.index(self.rank), len(peers), group)

    def in_background(
        self, name: str, new: bool = False, timeout: timedelta | None = None
    ) -> Ranks:
        """Return the ranks over a process group of their own, for one other thread, which may use
        it while this one trains. Every rank calls this together.

        The same name gives the same group again, because a group holds a connection to every rank;
        with `new`, a new one: the old one may have been left in the middle of a collective.
        timeout: how long one may wait for another rank.
        """
        if new or name not in self._groups:
            tree = self.new_tree(timeout)
            group: Any = tree  # where there is one; no one calls sum() on it
            if self.size > 1 and tree is None:
                group = dist.new_group(backend="gloo", timeout=timeout)
            self._groups[name] = Ranks(self.rank, self.size, group, tree)
        return self._groups[name]

    def new_tree(self, timeout: timedelta | None = None) -> Tree | None:
        """Return a tree of new process groups of gloo; None where one group has all ranks. Every
        rank calls this together."""

        def grouped(peers: list[int]) -> Ranks:
            return self._grouped(peers, timeout, least=1, backend="gloo")

        return Tree.of(self.rank, self.size, grouped)

    def ring(self, shift: int) -> tuple[Ranks, Ranks]:
        """Return this rank with the one `shift` after it, and with the one before it, each in a
        process group of two, for one other thread. Every rank calls this together; shift divides
        their number."""
        count, starts = self.size // shift, (self.rank, (self.rank - shift) % self.size)
        pairs: dict[int, Ranks] = {}
        turns = {s: 2 if count % 2 and s // shift == count - 1 else s // shift % 2 for s in starts}
        for turn in range(3):  # so that no rank waits for one that waits for the next
            now = [start for start in starts if turns[start] == turn]
            # A rank without a pair is alone in a group: torch must count as many on each rank.
            peers = sorted({self.rank, *now, *((start + shift) % self.size for start in now)})
            group = self._grouped(peers, None, least=1, backend="gloo")
            pairs |= dict.fromkeys(now, group)
        return pairs[starts[0]], pairs[starts[1]]

    def union_in_background(self, item: Callable[..., Any]) -> Callable[[frozenset], frozenset]:
        """Return a function, for one other thread, that returns the union of all ranks' sets of
        tuples; `item` makes such a tuple from its fields."""
        ranks = self.in_background("union", new=True)

        def union(mine: frozenset) -> frozenset:
            return frozenset(item(*fields) for fields in ranks.merged([*mine], joined))

        return union

    def share(
        self,
        step: int,
        losses: torch.Tensor,
        first: int,
        count: int,
        tokens_hash: int,
        stop: bool,
        failed: bool = False,
        extra: Mapping[str, float | torch.Tensor] = MappingProxyType({}),
    ) -> None:
        """Start the all-reduce of a step's summary; never waits.

        losses: this rank's micro-batch sums, shape (n,), which stand at `first` of `count`. A slot
        has one non-zero term, or one of each rank that holds columns of the micro-batch, and fp64
        adds these without an error that fp32 sees. Where there are many, each digit of their sum
        has a slot: such a summary doesn't grow with the ranks. tokens_hash: of windows that no
        other rank names. It travels as two halves of 32 bits, whose sums stay exact in fp64. extra:
        numbers or 0-dim tensors; the names must be those of the first step, on all ranks
        (UserError).
        """
        names = tuple(extra)
        self._extra = names if self._extra is None else self._extra
        if names != self._extra:
            now, before = (", ".join(each) or "none" for each in (names, self._extra))
            problem = f"are {now}, and were {before}"
            raise UserError("metrics(): the names", problem, _SAME_NAMES)
        if as_digits := count > MOST_SLOTS:
            first, count, losses = 0, DIGITS, self._digits.of(losses)
        part = torch.zeros(
            count + 5 + len(names) + bool(names), dtype=torch.float64, device=self.device
        )
        part[first : first + len(losses)] = losses
        clock = time.monotonic() - self._began if self.is_main else 0.0
        numbers = [tokens_hash >> 32, tokens_hash & 0xFFFFFFFF, int(stop), int(failed), clock]
        numbers += [_hash_of(names)] if names else []
        numbers += [0.0 if torch.is_tensor(value) else value for value in extra.values()]
        # From pinned memory, or the copy would wait for all that the device has to do before it.
        host = torch.tensor(numbers, dtype=torch.float64, pin_memory=self._has_cuda)
        part[count : count + len(numbers)].copy_(host, non_blocking=True)
        for slot, value in enumerate(extra.values(), len(part) - len(names)):
            if torch.is_tensor(value):
                part[slot] = value  # a copy on the device: nothing waits for the value
        work = dist.all_reduce(part, async_op=True) if self.size > 1 else None
        self._pending.append((step, count, as_digits, self._late_read(part, work)))

    def _late_read(self, part: torch.Tensor, work: Any) -> Callable[[], list[float]]:
        """Return a function that waits for an all-reduce and returns its values.

        On a GPU a stream of their own copies the values to the host. Asked for later, a copy would
        come behind all kernels of the next step, and so wait for them.
        """
        if not self._has_cuda:

            def read() -> list[float]:
                if work is not None:
                    work.wait()
                return part.tolist()

            return read
        self._reads = self._reads or torch.cuda.Stream()
        self._reads.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._reads):
            if work is not None:
                work.wait()  # of the stream, and not of this thread
            host = torch.empty(part.shape, dtype=part.dtype, pin_memory=True)
            host.copy_(part, non_blocking=True)
            done = torch.cuda.Event()
            done.record()

        def read_copy(source: torch.Tensor = part) -> list[float]:  # which lives until it is copied
            done.synchronize()
            return host.tolist()

        return read_copy

    def summaries(self, behind: int) -> Iterator[StepSummary]:
        """Yield the summaries of the shared steps, oldest first, but for the `behind` newest.

        Raises UserError if the ranks' `extra` have different names.
        """
        while len(self._pending) > behind:
            step, count, as_digits, read = self._pending.popleft()
            values = read()
            high, low, stop, failed, clock = values[count : count + 5]
            tokens_hash = ((int(high) << 32) + int(low)) % 2**64
            # Behind a summary's own slots: the hash of the names, then a sum for each.
            sums, names = values[count + 5 :], self._extra or ()
            if names and World.compares and sums[0] != self.size * _hash_of(names):
                problem = f"differ between ranks (here: {', '.join(names)})"
                raise UserError("metrics(): the names", problem, _SAME_NAMES)
            extra = {name: value / self.size for name, value in zip(names, sums[1:], strict=True)}
            losses = [number_of(values[:count])] if as_digits else values[:count]
            yield StepSummary(step, losses, tokens_hash, stop > 0, failed > 0, clock, extra)

    def close(self) -> None:
        """Wait for all ranks, then leave: a rank that has left resets its connections, and a slower
        rank would not receive the answer to its last collective."""
        if self.size > 1:
            with suppress(RuntimeError):  # the answer to this one doesn't matter
                dist.barrier()


_SAME_NAMES = "let the model return the same names on all ranks at every step"


def _hash_of(names: Iterable[str]) -> int:
    return zlib.crc32("\0".join(names).encode())


def lost_peer(error: Exception) -> bool:
    """True for an error that only says that another rank has left, or doesn't answer."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError):
        return True
    return isinstance(error, RuntimeError) and "gloo" in str(error)


def join(config: dict, size: int, timeout_seconds: float, mesh: Mesh | None = None) -> World:
    """Join the ranks that the environment names, and check that there are `size` of them.

    config: the DeepSpeed JSON. timeout_seconds: how long a collective may wait for another rank.
    mesh: how they are grouped; None: not at all.
    """
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.utils import DistributedType, InitProcessGroupKwargs

    class Plugin(DeepSpeedPlugin):
        def set_deepspeed_weakref(self) -> None:
            """Do nothing: this is for models of transformers, and would import it."""

    _quiet_deepspeed()
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    wait = timedelta(seconds=timeout_seconds)
    # torchrun serves a store for the ranks to meet at. Else the default process group is made over
    # a store of ours: torch's own would listen on all interfaces. Accelerate and DeepSpeed take the
    # group that is there.
    has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not dist.is_initialized() and not has_store:
        rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
        store = open_store(os.environ["MASTER_ADDR"], port, rank, size, timeout_seconds)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=wait)
    group = InitProcessGroupKwargs(backend=backend, timeout=wait)
    accelerator = Accelerator(
        cpu=False, deepspeed_plugin=Plugin(hf_ds_config=config), kwargs_handlers=[group]
    )
    kind = accelerator.distributed_type
    assert kind == DistributedType.DEEPSPEED, f"accelerate runs {kind} and not DeepSpeed"
    joined = dist.get_world_size() if dist.is_initialized() else 0
    assert joined == size, f"{joined} ranks have joined but {size} were requested"
    world = World(accelerator, mesh, timeout_seconds)
    world.tree = world.new_tree(wait)
    return world


def _quiet_deepspeed() -> None:
    """Silence DeepSpeed below errors, and keep it from compiling its shared-memory collectives on a
    CPU: the build takes over a minute, a process killed during it leaves a lock that hangs the next
    one, and gloo does the same work."""
    import logging
    import warnings

    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed calls functions that newer versions of torch have renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    deepspeed.ops.__compatible_ops__ = {}  # else each rank compiles programs to see what it could


def compare_nothing() -> None:
    """Compare no values with other ranks, for a rank that is rehearsed without them. At stage 3
    DeepSpeed compares the order of modules with that of rank 0."""
    import deepspeed.runtime.zero.partitioned_param_coordinator as coordinator

    World.compares = False
    coordinator.assert_ints_same_as_other_ranks = lambda *_: None
