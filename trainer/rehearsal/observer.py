"""What a rank's steps do with the device: bytes that live, operations, collectives, and waits.

Invariant: sees each operation that torch dispatches while the mode is on, also in the backward
pass, and changes nothing but values that the host reads, which fake tensors don't have.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager
from torch.distributed import ProcessGroup, Work
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry

from forescale.models.mixers.ring import INSIDE
from forescale.plan.links import Collective
from forescale.rehearsal.operations import compare_types
from forescale.rehearsal.timeline import Timeline
from forescale.rehearsal.waits import Waits, place

_BLOCK = 512  # bytes: what CUDA's caching allocator rounds each request up to
_LARGE = 1 << 20  # bytes of a tensor whose place is looked up
# What c10d's operations do, by the argument whose bytes are those of the whole tensors, of an
# all-to-all those of one rank.
_COLLECTIVES = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 0),
    "alltoall_": ("all_to_all", 0),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "send": ("send", 0),
    "barrier": ("barrier", -1),
}
# Functional ones, which a compiler can follow: by whether their whole tensor is the input.
_FUNCTIONAL = {
    "all_reduce": ("all_reduce", True),
    "all_reduce_": ("all_reduce", True),
    "all_gather_into_tensor": ("all_gather", False),
    "all_gather_into_tensor_out": ("all_gather", False),
    "reduce_scatter_tensor": ("reduce_scatter", True),
    "all_to_all_single": ("all_to_all", True),
}
_SLICE = torch.ops.aten.slice.Tensor


@dataclass(frozen=True)
class Allocation:
    """Memory of the device that lives. phase: of the step in which it was made."""

    size: int
    phase: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    place: str


@dataclass(frozen=True)
class Cost:
    """An operation of a phase: its FLOPs, and the bytes that it reads and writes."""

    name: str
    phase: str
    flops: int
    bytes: int


class Observer(TorchDispatchMode):
    """Watches operations. `phase` names the part of the step; `live` and `peak` are in bytes."""

    supports_higher_order_operators = True

    def __init__(self, waits: Waits):
        super().__init__()
        self.waits = waits
        self.timeline = Timeline()
        _tell_of_waits(self.timeline)
        self.roofline: Callable[[int, int], float] = lambda flops, moved: 0.0  # its seconds
        self.phase = "build"
        self.integer = 0  # what the host reads of integers
        self.live, self._count = 0, 0
        self._living: dict[int, tuple[int, Allocation]] = {}  # by storage: begin
        self.reset()

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Return True: torch's compiler leaves alone what runs in other modes."""
        return True

    def reset(self) -> None:
        """Forget what was counted, but not what lives."""
        self.peaks: dict[str, int] = defaultdict(int)
        self.peak, self.peak_phase, self._peak_at = 0, self.phase, self._count
        self._ended: list[tuple[int, int, Allocation]] = []  # begin, end
        self.operations: Counter[Cost] = Counter()
        self.collectives: dict[tuple[str, int], list[int]] = {}  # kind, ranks -> bytes, calls
        self.timeline.reset()

    def at_peak(self) -> list[Allocation]:
        """Return what lived when most bytes did, since the last reset."""
        at = self._peak_at
        return [each for begin, each in self._living.values() if begin <= at] + [
            each for begin, end, each in self._ended if begin <= at < end
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = {**(kwargs or {})}
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False  # fake tensors can't be pinned
        schema = getattr(func, "_schema", None)
        if schema is None:  # a higher-order operator
            return func(*args, **kwargs)
        if func is _SLICE and type(args[0]) is FakeTensor:
            return _part(args)
        if schema.name in INSIDE:  # one operation for all else
            with self:
                return INSIDE[schema.name](*args, **kwargs)
        space, _, name = schema.name.partition("::")
        if name == "_local_scalar_dense":
            return self._value(args[0])
        compare_types(func, args)
        out = func(*args, **kwargs)
        if space == "c10d":
            self._collective(name, args, out)
        if space == "_c10d_functional" and self.waits.counting:
            self._functional(name, args, out)
        if name in ("_to_copy", "copy_"):
            self._copied(name, args, kwargs, out)
        self._account(func, schema, args, kwargs, out)
        return out

    def _value(self, tensor: Tensor) -> Any:
        self.waits.read(tensor)
        if tensor.dtype.is_floating_point:
            return 1.0
        return False if tensor.dtype == torch.bool else self.integer

    def _copied(self, name: str, args: Any, kwargs: Any, out: Any) -> None:
        source = args[1] if name == "copy_" else args[0]
        target = args[0] if name == "copy_" else out
        if source.device == target.device:
            return
        third = args[2] if name == "copy_" and len(args) > 2 else False
        if not kwargs.get("non_blocking", third):
            self.waits.add(f"copy {source.device.type} -> {target.device.type}")

    def _functional(self, name: str, args: Any, out: Any) -> None:
        if name == "wait_tensor":
            self.timeline.wait(args[0].untyped_storage()._cdata)
        if name not in _FUNCTIONAL:
            return
        kind, is_input = _FUNCTIONAL[name]
        group: Any = next(x for x in args[::-1] if isinstance(x, str))
        size = _resolve_process_group(group).size()
        storage = out.untyped_storage()
        self._sent(kind, size, [args[0] if is_input else out], storage, storage._cdata)

    def _collective(self, name: str, args: Any, out: Any) -> None:
        if not self.waits.counting or name not in _COLLECTIVES:
            return
        kind, at = _COLLECTIVES[name]
        tensors = [] if at < 0 else [t for t in tree_iter(args[at]) if isinstance(t, Tensor)]
        groups = [x for x in args if isinstance(x, torch.ScriptObject)]
        size = next((n for g in groups if (n := _size_of(g)) is not None), 1)
        handles = [x for x in tree_iter(out) if isinstance(x, torch.ScriptObject)]
        work = Work.unbox(handles[-1]) if handles else None
        self._sent(kind, size, tensors, work, id(work))

    def _sent(self, kind: Any, size: int, tensors: list[Tensor], handle: Any, key: int) -> None:
        """Count a collective. handle: lives until it has ended; key: that its wait names."""
        if size == 1:  # nothing is sent
            return
        payload = sum(t.numel() * t.element_size() for t in tensors)
        entry = self.collectives.setdefault((kind, size), [0, 0])
        entry[0] += payload
        entry[1] += 1
        self.timeline.begin(handle, key, Collective("", kind, payload, size))

    def spend(self, cost: Cost) -> None:
        """Count an operation that is launched."""
        self.operations[cost] += 1
        self.timeline.compute(cost.flops, self.roofline(cost.flops, cost.bytes))

    def _account(self, func: Any, schema: Any, args: Any, kwargs: Any, out: Any) -> None:
        """Note the memory and the cost of an operation."""
        outputs = [t for t in tree_iter(out) if isinstance(t, Tensor) and t.is_cuda]
        for tensor in outputs:
            self._note(tensor)
        if not outputs or not self.waits.counting or _is_free(func, schema):
            return
        inputs = [t for t in tree_iter((args, kwargs)) if isinstance(t, Tensor)]
        moved = sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **kwargs, out_val=out) if count else 0
        self.spend(Cost(schema.name, self.phase, int(flops), moved))

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._living:
            return
        self._count += 1
        size = -(-storage.nbytes() // _BLOCK) * _BLOCK
        where = place() if size >= _LARGE else ""
        new = Allocation(size, self.phase, tuple(tensor.shape), tensor.dtype, where)
        self._living[key] = self._count, new
        self.live += size
        weakref.finalize(storage, self._end, key)
        self.peaks[self.phase] = max(self.peaks[self.phase], self.live)
        if self.live > self.peak:
            self.peak, self.peak_phase, self._peak_at = self.live, self.phase, self._count

    def _end(self, key: int) -> None:
        begin, old = self._living.pop(key)
        self.live -= old.size
        # It ends before the next one begins, and so doesn't live at a peak that comes then.
        self._ended.append((begin, self._count + 1, old))


def _tell_of_waits(timeline: Timeline) -> None:
    """Let the handles of collectives say where they are waited for."""
    from torch._C import _distributed_c10d

    kind: Any = _distributed_c10d.FakeWork
    original = kind.wait

    def wait(self: Any, *args: Any, **kwargs: Any) -> Any:
        timeline.wait(id(self))
        return original(self, *args, **kwargs)

    kind.wait = wait


def _size_of(script: torch.ScriptObject) -> int | None:
    """Return the number of ranks of a process group; None for another object."""
    try:
        return int(ProcessGroup.unbox(script).size())
    except (RuntimeError, TypeError):
        return None


def _part(args: Any) -> FakeTensor:
    """Return what torch.ops.aten.slice does of a fake tensor. Stage 3 makes one of each rank's part
    of each buffer that it gathers, and torch's own way takes 0.3 ms for each."""
    whole = args[0]
    with in_kernel_invocation_manager(whole.fake_mode):
        part = _SLICE(*args)
    return FakeTensor(whole.fake_mode, part, whole.device)


def _is_free(func: Any, schema: Any) -> bool:
    """True if an operation launches no kernel: a view, or memory without values."""
    name = schema.name.partition("::")[2]
    if name.startswith(("empty", "new_empty", "set_", "resize_", "_reshape_alias", "lift")):
        return True
    return func.is_view or name in ("detach", "alias", "_unsafe_view")
