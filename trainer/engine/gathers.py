"""Stage 3's gathers and reductions of several parameters, whose parts are taken apart and put
together by parameter: with a copy or two for each.

DeepSpeed 0.19.8 does both rank by rank. In a gather (AllGatherCoalescedHandle.wait) it makes for
each parameter a view of each rank's part, a `cat` of all views, and a record_stream for each; in a
reduction (reduce_scatter_coalesced) two views of each rank's part. With 1,024 ranks these are 3,000
and 2,000 calls of the host for each parameter, in each pass over each micro-batch.

Invariant: parameters and gradients get the same values, in memory of the same size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def take_apart_by_parameter() -> None:
    """Replace DeepSpeed's methods in this process."""
    from deepspeed.runtime.zero import partition_parameters as zero
    from deepspeed.runtime.zero import stage3

    stage3.reduce_scatter_coalesced = reduce_scattered
    handle, original = zero.AllGatherCoalescedHandle, zero.AllGatherCoalescedHandle.wait
    if original.__module__ == __name__:
        return

    def wait(self, handle_dependency: bool = True) -> None:
        if self.complete or self.quantization or self.partitions[0]._base is None:
            original(self, handle_dependency)  # the last: torch.inference_mode
            return
        self.allgather_handle.wait()
        gathered_WN = self.partitions[0]._base.view(self.world_size, -1)
        at = 0
        for param in self.params:
            size = param.ds_tensor.ds_numel  # of each rank's part, the last of which end in padding
            if self.use_secondary_tensor:
                size *= param.ds_secondary_tensor_num_of_groups
            values = joined(gathered_WN[:, at : at + size], param.ds_numel)
            param.data = values.view(param.ds_shape).to(param.ds_tensor.dtype)
            param.ds_status = zero.ZeroParamStatus.AVAILABLE
            at += size
        if handle_dependency and gathered_WN.is_cuda:
            # Views share their memory, which isn't given away before this stream has copied it.
            gathered_WN.record_stream(torch.cuda.current_stream())
        self.complete = True

    handle.wait = wait


def reduce_scattered(
    tensors: Sequence[Tensor], group: Any = None, *, mean: bool = True
) -> list[Tensor]:
    """Return this rank's part of the mean over the ranks of each tensor, else of the sum, without
    padding."""
    from deepspeed import comm

    rank, ranks = comm.get_rank(group), comm.get_world_size(group)
    rows = [rows_of(tensor, ranks) for tensor in tensors]
    rows_WN = torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]
    if mean:
        rows_WN.div_(ranks)
    comm.reduce_scatter_fn(rows_WN[rank], rows_WN.view(-1), group=group)
    parts = rows_WN[rank].split([row.shape[1] for row in rows])
    return [
        part[: max(0, tensor.numel() - rank * len(part))]
        for part, tensor in zip(parts, tensors, strict=True)
    ]


def rows_of(whole: Tensor, ranks: int) -> Tensor:
    """Return a tensor as the parts of the ranks, (W, N), padded with zeros; a view if it divides
    by them."""
    values = whole.reshape(-1)
    if missing := -values.numel() % ranks:
        values = F.pad(values, (0, missing))
    return values.view(ranks, -1)


def joined(parts_WN: Tensor, numel: int) -> Tensor:
    """Return the first `numel` elements of the parts one after the other, as a tensor of its
    own."""
    size = parts_WN.shape[1]
    whole, rest = divmod(numel, size)
    values = torch.empty(numel, dtype=parts_WN.dtype, device=parts_WN.device)
    values[: whole * size].view(whole, size).copy_(parts_WN[:whole])
    if rest:
        values[whole * size :].copy_(parts_WN[whole, :rest])
    return values
