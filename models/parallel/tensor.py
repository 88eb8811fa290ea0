"""Ranks that divide matrices (engine/parallel/tensor.py), and what they exchange.

Invariant: all ranks of a group have the same residual stream, and the gradient of it, to the bit.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from forescale.models.parallel.group import Group


class TensorGroup(Group):
    """The ranks that divide matrices."""

    def copied(self, x: Tensor) -> Tensor:
        """Return x. Its gradient is summed over the group: each rank has computed a part of it."""
        return _Copied.apply(x, self)

    def summed(self, x: Tensor) -> Tensor:
        """Return the sum of x over the group. The gradient passes unchanged: all have the same."""
        return _Summed.apply(x, self)

    def joined(self, x: Tensor) -> Tensor:
        """Return the last dimension of all ranks, side by side: (..., N / n) -> (..., N). Has no
        gradient."""
        gathered = collectives.all_gather_tensor(x.contiguous(), x.dim() - 1, self.name)  # type: ignore[arg-type]
        return collectives.wait_tensor(gathered)

    # A compiled graph can't exchange the state of a generator. torch.compiler.disable would import
    # the whole compiler here, a second of every process; torch's own name for it does when called.
    @torch._disable_dynamo
    def drawing_apart(self, f: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return f(x, ...), whose random draws on the device of x are this rank's own; all draws
        after it are again the same on all ranks of the group.

        As Megatron's tracker of random states does, with a seed drawn on the host: where the call
        is made again for the backward pass, from the same states, it draws the same.
        """
        generators = torch.cuda.default_generators if x.is_cuda else [torch.default_generator]
        seeds = torch.randint(2**62, (self.size,), device="cpu").tolist()
        generator = generators[x.device.index or 0]
        state = generator.get_state()
        generator.manual_seed(seeds[self.rank])
        try:
            return f(x, *args, **kwargs)
        finally:
            generator.set_state(state)

    def share(self, tokens: int) -> slice:
        """Return which of so many tokens are this rank's alone where each rank has some of them,
        nearly equally many."""
        first, end = (place * tokens // self.size for place in (self.rank, self.rank + 1))
        return slice(first, end)

    def pooled(self, log_z_N: Tensor, logits_N: Tensor) -> tuple[Tensor, Tensor]:
        """Return the log-partition of all ranks' rows, and the sum of the ranks' logits, of which
        all but one are 0. Has no gradient."""
        every_T2N = log_z_N.new_zeros(self.size, 2, len(log_z_N))
        every_T2N[self.rank] = torch.stack([log_z_N, logits_N])
        every_T2N = self.sum(every_T2N)
        return every_T2N[:, 0].logsumexp(0), every_T2N[:, 1].sum(0)


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return ctx.group.sum(gradient), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: TensorGroup) -> Tensor:
        return group.sum(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
