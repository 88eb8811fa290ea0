"""Stage 3's gathers of several parameters: what they bring is taken apart with two copies for each.

DeepSpeed 0.19.8 (AllGatherCoalescedHandle.wait) takes it apart rank by rank: for each parameter a
view of each rank's part, a `cat` of all views, and a record_stream for each. With 1,024 ranks these
are 3,000 calls of the host for each parameter, in each pass over each micro-batch.

Invariant: parameters get the same values, in memory of the same size.
"""

import torch
from torch import Tensor


def take_apart_by_parameter() -> None:
    """Replace DeepSpeed's method in this process."""
    from deepspeed.runtime.zero import partition_parameters as zero

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
            values = _joined(gathered_WN[:, at : at + size], param.ds_numel)
            param.data = values.view(param.ds_shape).to(param.ds_tensor.dtype)
            param.ds_status = zero.ZeroParamStatus.AVAILABLE
            at += size
        if handle_dependency and gathered_WN.is_cuda:
            # Views share their memory, which isn't given away before this stream has copied it.
            gathered_WN.record_stream(torch.cuda.current_stream())
        self.complete = True

    handle.wait = wait


def _joined(parts_WN: Tensor, numel: int) -> Tensor:
    """Return the first `numel` elements of the parts one after the other, as a tensor of its
    own."""
    size = parts_WN.shape[1]
    whole, rest = divmod(numel, size)
    values = torch.empty(numel, dtype=parts_WN.dtype, device=parts_WN.device)
    values[: whole * size].view(whole, size).copy_(parts_WN[:whole])
    if rest:
        values[whole * size :].copy_(parts_WN[whole, :rest])
    return values
