"""What torch's operations answer on a device that isn't there.

Invariant: values are never computed. Where an operation's values would decide what follows, it has
the largest result that there can be, and `Waits` receives the place; operands that CUDA's kernels
refuse are refused.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import fake_impls, fake_tensor
from torch._subclasses.fake_tensor import FakeTensor

from forescale.rehearsal.waits import Waits

_KERNELS = torch.library.Library("aten", "IMPL", "CUDA")  # what it registers ends with it


def answer_for_operations(waits: Waits) -> None:
    """Let torch's operations answer without values, for the rest of this process's life."""
    _answer_for_tensors(waits)
    _share_rows(waits)
    _register_kernels()
    _assume_sizes(waits)
    F.scaled_dot_product_attention = _attention


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
