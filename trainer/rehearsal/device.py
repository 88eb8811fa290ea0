"""A GPU that isn't there: what `torch.cuda` and torch's operations say of it in this process.

Invariant: what the job's own code and DeepSpeed ask of a device, they ask of this one; each time
the host would wait for it, `Waits` receives the place. Values are never computed: tensors are
torch's fake tensors, with a device, a type and a shape.
"""

import contextlib
import linecache
import os
import re
import sys
import traceback
from collections import Counter
from collections.abc import Callable
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import fake_impls, fake_tensor
from torch._subclasses.fake_tensor import FakeTensor

from forescale import models
from forescale.plan.gpu import Gpu

_KERNELS = torch.library.Library("aten", "IMPL", "CUDA")  # what it registers ends with it


class Waits:
    """How often the host has waited for the device, by kind and place, while `counting`. total:
    what the integers of a list that it reads add up to; None: each is 1. assumed: where the user's
    code had a value last that no rehearsal knows; "" if it had none."""

    def __init__(self) -> None:
        self.counting = False
        self.total: int | None = None
        self.places: Counter[tuple[str, str]] = Counter()
        self.assumed = ""

    def add(self, kind: str) -> None:
        if self.counting:
            self.places[kind, place()] += 1

    def read(self, tensor: Tensor, kind: str = "read") -> None:
        """Note that values are read which aren't there: of the device the host waits for them."""
        if tensor.is_cuda:
            self.add(kind)
        if not (where := place()).startswith(("forescale/", "deepspeed/")):
            self.assumed = where


_HERE = os.path.dirname(__file__)
_PACKAGES = os.path.dirname(os.path.dirname(_HERE))
_TORCH = os.path.dirname(torch.__file__)
# Where the code is that Inductor writes: below this folder, or one whose name begins so.
INDUCTOR = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or "torchinductor"
# What only calls others.
_BETWEEN = re.compile(rf"{re.escape(INDUCTOR)}|deepspeed/(accelerator|utils/nvtx)")
_COMPILED = re.compile(r"Source Nodes: \[(.*?)\]|Original path: (.*)")


def place() -> str:
    """Return the file and line of the innermost frame that is neither torch's nor the rehearsal's
    nor in between; in the code that torch's compiler has written, the variables of the model that
    are computed there; "autograd" where the backward pass alone has called."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if INDUCTOR in name and (nodes := _nodes(name, frame.f_lineno)):
            return nodes
        if not name.startswith((_TORCH, _HERE, "<")) and not _BETWEEN.search(name):
            return f"{shorter(name)}:{frame.f_lineno}"
        frame = frame.f_back
    return "autograd"


def _nodes(name: str, line: int) -> str:
    """Return what the comment above a line of Inductor's code says that it computes, or where a
    kernel of the user's is."""
    for above in range(line, max(line - 40, 0), -1):
        if match := _COMPILED.search(linecache.getline(name, above)):
            return f"compiled {match[1]}" if match[1] else shorter(str(match[2]))
    return ""


# Of an editable installation our packages lie beside each other.
_FOLDERS = {
    os.path.dirname(models.__file__): "forescale/models",
    os.path.dirname(_HERE): "forescale",
}


def shorter(name: str) -> str:
    """Return the path of a file from its package on, or from this directory."""
    for folder, package in _FOLDERS.items():
        if name.startswith(f"{folder}/"):
            return f"{package}{name.removeprefix(folder)}"
    for top in (f"{_PACKAGES}/", "site-packages/", "dist-packages/"):
        if top in name:
            return name.rpartition(top)[2]
    return name.removeprefix(f"{os.getcwd()}/")


_UNANSWERED = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)
# Of torch without a device, and of its compiler, which knows no pretended streams.
_NO_DEVICE = re.compile(
    r"NVIDIA driver|CUDA error|CUDA support|dummy base|ATen_cuda|'_cuda_|Could not run 'aten"
    r"|streams::|Expected StreamVariable|has no attribute 'user_object_index'"
)


def doubt(error: Exception, waits: Waits) -> str:
    """Return why an error may not be one on a GPU; "" if it would be."""
    *_, innermost = traceback.extract_tb(error.__traceback__) or [None]
    is_torch = innermost is not None and innermost.filename.startswith(_TORCH)
    if (
        isinstance(error, _UNANSWERED)
        or _NO_DEVICE.search(str(error))
        or (is_torch and isinstance(error, NotImplementedError | AssertionError))
    ):
        return "a rehearsal has no answer here, and a GPU may"
    if waits.assumed:
        return f"values are assumed at {waits.assumed}, and with others it may go on"
    return ""


class _Event:
    """An event that is over as soon as it is recorded."""

    waits: Waits

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_event, self.stream = 0, Stream.main

    def record(self, stream: Any = None) -> None:
        self.stream = stream or Stream.current

    def wait(self, stream: Any = None) -> None:
        Stream.joined(stream or Stream.current, self.stream)

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        self.waits.add("event")

    def elapsed_time(self, _: Any) -> float:
        return 1.0


class Stream(_Event):
    """A stream on which everything is done at once. main: that of the computation; current: where
    launches go; joined: called where one stream waits for another, with both."""

    device = torch.device("cuda", 0)
    device_index, device_type, stream_id, cuda_stream = 0, 1, 0, 0
    main: "Stream"
    current: "Stream"
    joined: Callable[["Stream", "Stream"], None] = staticmethod(lambda *_: None)

    def __init__(self, *_: Any, **__: Any) -> None:
        self._before: list[Stream] = []

    def wait_stream(self, other: "Stream") -> None:
        Stream.joined(self, other)

    def wait_event(self, event: _Event) -> None:
        Stream.joined(self, event.stream)

    def record_event(self, event: Any = None) -> Any:
        event = event or _Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.waits.add("stream")
        Stream.joined(Stream.main, self)

    def __enter__(self) -> "Stream":
        self._before.append(Stream.current)
        Stream.current = self
        return self

    def __exit__(self, *_: Any) -> None:
        Stream.current = self._before.pop()


Stream.main = Stream.current = Stream()


def pretend(gpu: Gpu, waits: Waits) -> None:
    """Let this process believe that it has `gpu.per_node` such GPUs, for the rest of its life."""
    _Event.waits = waits
    _answer_for_cuda(gpu, waits)
    _answer_for_tensors(waits)
    _share_rows(waits)
    _register_kernels()
    _assume_sizes(waits)
    F.scaled_dot_product_attention = _attention


def _answer_for_cuda(gpu: Gpu, waits: Waits) -> None:
    cuda: Any = torch.cuda
    properties = SimpleNamespace(
        name=gpu.name,
        major=gpu.capability[0],
        minor=gpu.capability[1],
        total_memory=gpu.memory,
        multi_processor_count=gpu.processors,
        shared_memory_per_block=49_152,
        shared_memory_per_block_optin=gpu.shared,
        shared_memory_per_multiprocessor=gpu.shared + 1024,
        regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2_048,
        max_threads_per_block=1_024,
        warp_size=32,
        L2_cache_size=50 << 20,
        gcnArchName="",
        uuid="pretended",
    )
    torch.version.cuda = torch.version.cuda or "13.0"
    cuda.default_generators = (torch.default_generator,)
    answers: dict[str, Callable[..., Any]] = {
        **_answering(True, "is_available", "is_initialized", "is_bf16_supported"),
        **_answering(0, "current_device", "_exchange_device", "_maybe_exchange_device"),
        **_answering(0, "memory_allocated", "max_memory_allocated"),
        **_answering(0, "memory_reserved", "max_memory_reserved", "initial_seed"),
        **_answering(None, "_lazy_init", "init", "set_device", "manual_seed", "manual_seed_all"),
        **_answering(None, "set_stream", "empty_cache", "reset_peak_memory_stats"),
        **_answering(None, "set_rng_state", "ipc_collect", "set_per_process_memory_fraction"),
        **_answering("", "memory_summary"),
        "device_count": lambda: gpu.per_node,
        "get_device_properties": lambda *_, **__: properties,
        "_get_device_properties": lambda *_: properties,  # what an earlier import of it calls
        "get_device_name": lambda *_, **__: gpu.name,
        "get_device_capability": lambda *_, **__: gpu.capability,
        "mem_get_info": lambda *_: (gpu.memory, gpu.memory),
        "memory_stats": lambda *_, **__: Counter(),
        "synchronize": lambda *_, **__: waits.add("device"),
        "current_stream": lambda *_, **__: Stream.current,
        "default_stream": lambda *_, **__: Stream.main,
        "stream": lambda stream: stream or contextlib.nullcontext(),
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "Stream": Stream,
        "Event": _Event,
    }
    of_c = ("_cuda_exchangeDevice", "_cuda_maybeExchangeDevice", "_cuda_getCurrentRawStream")
    for owner, some in (
        (cuda, answers),
        (cuda.nvtx, _answering(0, "range_push", "range_pop", "mark")),
        (torch._C, _answering(0, *of_c)),
        (torch.accelerator, _answering(True, "is_available")),
        (torch.accelerator, _answering(0, "current_device_index")),
        (torch.accelerator, {"synchronize": lambda *_: waits.add("device")}),
    ):
        for name, answer in some.items():
            setattr(owner, name, answer)


def _answering(value: Any, *names: str) -> dict[str, Callable[..., Any]]:
    """Return a function of its own for each name: torch's compiler keeps rules by function."""
    return {name: _constant(value) for name in names}


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *_, **__: value


def _answer_for_tensors(waits: Waits) -> None:
    """Let methods that read values answer without them, and count as waits."""
    tensor: Any = Tensor
    fake: Any = FakeTensor  # has a method of its own, which reads each value alone

    def tolist(self: FakeTensor) -> Any:
        waits.read(self)
        shape, total = list(self.shape), waits.total
        value: Any = 1.0 if self.dtype.is_floating_point else 1
        if shape and total is not None:
            n = shape.pop()
            value = [total // n + (i < total % n) for i in range(n)]
        for size in reversed(shape):
            value = [value] * size
        return value

    def numpy(self: FakeTensor, **_: Any) -> Any:
        if self.is_cuda:
            raise TypeError(f"can't convert a tensor on {self.device} to numpy; call .cpu() before")
        waits.read(self)
        return np.ones(tuple(self.shape), str(self.dtype).removeprefix("torch."))

    def text(self: FakeTensor, form: str) -> str:
        return format(self.item() if self.dim() == 0 else str(self), form)

    fake.tolist, fake.numpy, fake.__format__ = tolist, numpy, text
    tensor.pin_memory = lambda self, *_: self
    tensor.is_pinned = lambda self, *_: not self.is_cuda
    tensor.record_stream = lambda self, stream: None
    # torch.tensor(..., device="cuda") is made on the host, and then moved.
    torch._C._set_only_lift_cpu_tensors(True)
    # A fake tensor must hold no constant: torch would compute with it on the device.
    converter: Any = fake_tensor.FakeTensorConverter
    plain = converter.from_real_tensor

    def without_constant(self: Any, mode: Any, t: Tensor, make_constant: bool = False, **k: Any):
        return plain(self, mode, t, make_constant=False, **k)

    converter.from_real_tensor = without_constant
    torch.utils.swap_tensors = _swap


def _share_rows(waits: Waits) -> None:
    """Let ranks that divide experts exchange equally many rows: which ones, values would say."""
    from forescale.models.parallel import expert_exchange as exchange

    plain = exchange._route

    def route(rows_MD: Tensor, *args: Any) -> Any:
        waits.total = len(rows_MD)
        try:
            return plain(rows_MD, *args)
        finally:
            waits.total = None

    exchange._route = route  # type: ignore[assignment]


def _register_kernels() -> None:
    """Let operations that torch's CPU build takes apart stay whole, as CUDA's kernels for them let
    them be in its CUDA build."""
    for name in ("_fused_rms_norm", "silu_backward", "mish_backward"):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA"):
            _KERNELS.impl(name, _no_kernel)


def _no_kernel(*_: Any) -> Any:
    raise AssertionError("fake tensors run no kernel")


def _assume_sizes(waits: Waits) -> None:
    """Let operations whose values decide how many rows they return have the most there can be (of a
    count or a repetition: one each), and count as waits."""
    aten, i64 = torch.ops.aten, torch.int64

    def unique(t: Tensor, *_: Any, **__: Any) -> tuple[Tensor, ...]:
        counts = t.new_empty(t.numel(), dtype=i64)
        return t.new_empty(t.numel()), t.new_empty(t.shape, dtype=i64), counts

    def masked_select(t: Tensor, mask: Tensor) -> Tensor:
        return t.new_empty(torch.broadcast_shapes(t.shape, mask.shape).numel())

    def bincount(t: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
        return t.new_empty(max(minlength, 1), dtype=i64 if weights is None else weights.dtype)

    answers: dict[Any, Callable[..., Any]] = {
        aten.equal.default: lambda *_: True,
        aten.allclose.default: lambda *_, **__: True,
        aten.nonzero.default: lambda t: t.new_empty((t.dim(), t.numel()), dtype=i64).t(),
        aten.masked_select.default: masked_select,
        aten.repeat_interleave.Tensor: lambda t, output_size=None: t.new_empty(
            output_size or t.numel()
        ),
        aten.bincount.default: bincount,
        aten._unique2.default: unique,
        aten.unique_consecutive.default: unique,
    }
    table = fake_impls.op_implementations_dict
    for operation, answer in answers.items():
        plain = table.get(operation, lambda *_, **__: NotImplemented)
        table[operation] = _answering_after_a_wait(answer, plain, waits)


def _answering_after_a_wait(answer: Any, plain: Any, waits: Waits) -> Callable[..., Any]:
    def answered(mode: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
        if mode.shape_env is not None:  # the compiler, which breaks its graph there
            return plain(mode, func, *args, **kwargs)
        if kwargs.get("output_size") is None:
            waits.read(args[0], "size")
        return answer(*args, **kwargs)

    return answered


def compare_types(func: Any, args: Any) -> None:
    """Refuse operands of two types as CUDA's kernels do; fake tensors take any."""
    if (operands := _OF_ONE_TYPE.get(func.overloadpacket)) is None:
        return
    types = [t.dtype for t in args[operands] if isinstance(t, Tensor) and t.is_cuda]
    if len(set(types)) > 1:
        names = " and ".join(str(t).removeprefix("torch.") for t in dict.fromkeys(types))
        name = func._schema.name.partition("::")[2].strip("_")
        raise RuntimeError(f"{name} takes tensors of one type, not of {names}")


_ATEN = torch.ops.aten
_OF_ONE_TYPE = {  # which of their arguments
    _ATEN.mm: slice(2),
    _ATEN.mv: slice(2),
    _ATEN.addmm: slice(3),
    _ATEN.addmv: slice(3),
    _ATEN.baddbmm: slice(3),
    _ATEN.convolution: slice(3),
    _ATEN._scaled_dot_product_flash_attention: slice(3),
    _ATEN._scaled_dot_product_efficient_attention: slice(4),
    _ATEN.index_add: slice(0, 4, 3),
    _ATEN.index_add_: slice(0, 4, 3),
    _ATEN.index_copy: slice(0, 4, 3),
    _ATEN.index_put: slice(0, 3, 2),
    _ATEN.index_put_: slice(0, 3, 2),
    _ATEN.binary_cross_entropy: slice(2),
}


@fake_impls.register_op_impl(lambda func: func.overloadpacket in _OF_ONE_TYPE)
def _compared(mode: Any, func: Any, *args: Any, **kwargs: Any) -> Any:
    """Compare where the compiler traces, too: only there is the line of the model known."""
    compare_types(func, args)
    return NotImplemented  # go on as usual


def _swap(a: Any, b: Any) -> None:
    """Swap two tensors as torch.utils.swap_tensors does, which Module.to calls; that one refuses
    tensors with weak references, as each fake tensor has in its mode."""
    a.__class__, b.__class__ = b.__class__, a.__class__
    a.__dict__, b.__dict__ = {**a.__dict__, **b.__dict__}, dict(a.__dict__)
    torch._C._swap_tensor_impl(a, b)
    a._backward_hooks = a._backward_hooks  # which registers them with what it has now


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Return the kernel's output that torch would choose on CUDA: flash without a mask, else
    memory-efficient, else the products themselves (ATen/native/transformers/cuda/sdp_utils.cpp)."""
    aten, low = torch.ops.aten, query.dtype in (torch.bfloat16, torch.float16)
    widest = max(query.shape[-1], value.shape[-1])
    same = query.shape[-1] == value.shape[-1]
    if attn_mask is None and low and widest <= 256 and same and query.dim() == 4:
        out = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )
        return out[0]
    if query.dim() != 4 or (enable_gqa and query.shape[1] > key.shape[1]):
        return aten._scaled_dot_product_attention_math(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:  # the kernel takes what it adds
            attn_mask = torch.where(attn_mask, query.new_zeros(()), query.new_zeros(()))
        attn_mask = attn_mask.expand(*query.shape[:2], query.shape[2], key.shape[2])
    out = aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, dropout_p, is_causal, scale=scale
    )
    return out[0]
