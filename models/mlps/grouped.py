"""Products of rows with the matrix of their group: the hidden matrices of experts, as one tensor.

Rows of one group lie together. Invariant: a row's result depends on that row and its matrix alone,
a group may be empty, and every matrix has a gradient, zeros where no row met it. So under ZeRO-3
all experts are one module, which every rank calls once, whatever its tokens chose.
"""

from typing import Any

import torch
from torch import Tensor, nn


class GroupedLinear(nn.Module):
    """rows (M, in), ends (E,) -> (M, out): rows [ends[e - 1], ends[e]) times the e-th matrix.

    weight (E, out, in) is drawn with standard deviation `std`, as in init.Linear. Muon
    orthogonalises each of its matrices: DeepSpeed's iterations work on the last two axes, and its
    scale is of their sizes. No biases. as_one: the product is one operation for torch, which
    selective activation checkpointing can keep.
    """

    def __init__(
        self, num_groups: int, num_in: int, num_out: int, std: float, as_one: bool = False
    ):
        super().__init__()
        self.as_one = as_one
        self.weight = nn.Parameter(torch.empty(num_groups, num_out, num_in).normal_(0, std))

    def forward(self, rows_MI: Tensor, ends_E: Tensor) -> Tensor:
        return _Grouped.apply(rows_MI, self.weight, ends_E, self.as_one)


class _Grouped(torch.autograd.Function):
    """Saves the parameter itself and no view of it, so that ZeRO-3 can release it meanwhile."""

    @staticmethod
    def forward(
        ctx: Any, rows_MI: Tensor, weight_EOI: Tensor, ends_E: Tensor, as_one: bool
    ) -> Tensor:
        ctx.save_for_backward(rows_MI, weight_EOI, ends_E)
        return _times(rows_MI, weight_EOI.mT, ends_E, as_one)

    @staticmethod
    def backward(ctx: Any, grad_MO: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        rows_MI, weight_EOI, ends_E = ctx.saved_tensors
        grad_MO = grad_MO.contiguous()
        is_trained = ctx.needs_input_grad[1]
        own_EOI = _outer(grad_MO, rows_MI, ends_E) if is_trained else None
        return _times(grad_MO, weight_EOI, ends_E), own_EOI, None, None


def _times(rows_MI: Tensor, matrix_EIO: Tensor, ends_E: Tensor, as_one: bool = False) -> Tensor:
    """Return (M, O): each row times its group's matrix (I, O)."""
    is_one = as_one or torch.compiler.is_compiling()
    return (_times_op if is_one else _plain_times)(rows_MI, matrix_EIO, ends_E)


def _outer(left_MO: Tensor, right_MI: Tensor, ends_E: Tensor) -> Tensor:
    """Return (E, O, I): the sum of outer products over the rows of each group."""
    return (_outer_op if torch.compiler.is_compiling() else _plain_outer)(left_MO, right_MI, ends_E)


def _is_native(tensor: Tensor, width: int) -> bool:
    """True where torch's grouped kernel serves: bf16 on a GPU, rows of whole 16 bytes. It needs no
    number of rows on the host. Not tried on a GPU yet: we had none."""
    usable = tensor.is_cuda and tensor.dtype == torch.bfloat16 and hasattr(torch, "_grouped_mm")
    return usable and tensor.shape[-1] % 8 == 0 and width % 8 == 0


def _plain_times(rows_MI: Tensor, matrix_EIO: Tensor, ends_E: Tensor) -> Tensor:
    width = matrix_EIO.shape[-1]
    if _is_native(rows_MI, width):
        return torch._grouped_mm(rows_MI, matrix_EIO, offs=ends_E.int())
    out_MO = rows_MI.new_empty(rows_MI.shape[0], width)
    for e, (start, end) in enumerate(_spans(ends_E)):
        torch.mm(rows_MI[start:end], matrix_EIO[e], out=out_MO[start:end])
    return out_MO


def _plain_outer(left_MO: Tensor, right_MI: Tensor, ends_E: Tensor) -> Tensor:
    width = right_MI.shape[-1]
    if _is_native(left_MO, width):
        return torch._grouped_mm(left_MO.mT, right_MI, offs=ends_E.int())
    out_EOI = left_MO.new_empty(ends_E.shape[0], left_MO.shape[-1], width)
    for e, (start, end) in enumerate(_spans(ends_E)):
        torch.mm(left_MO[start:end].mT, right_MI[start:end], out=out_EOI[e])  # zeros if empty
    return out_EOI


def _spans(ends_E: Tensor) -> list[tuple[int, int]]:
    ends = ends_E.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


# The compiler can't look into a loop over numbers of rows: for it each product is one operation.
@torch.library.custom_op("forescale::grouped_times", mutates_args=())
def _times_op(rows: Tensor, matrix: Tensor, ends: Tensor) -> Tensor:
    return _plain_times(rows, matrix, ends)


@_times_op.register_fake
def _(rows: Tensor, matrix: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], matrix.shape[-1])


@torch.library.custom_op("forescale::grouped_outer", mutates_args=())
def _outer_op(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return _plain_outer(left, right, ends)


@_outer_op.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[-1], right.shape[-1])
