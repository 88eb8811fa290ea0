"""Groups of ranks that compute one model together, as the model's own code sees them.

The ranks of a SequenceGroup divide the columns of rows (Ulysses: Jacobs et al. 2023, arXiv
2309.14509). A rank holds L/n of a row's L columns in all that acts on a token alone: embedding,
norms, MLPs, head and loss. Around attention the ranks exchange columns for heads: each then has all
L columns of H/n heads, and attends as one rank would. Invariant: the exchange is exact, in the
backward pass too, so that the gradients of a parameter, summed over ranks, are those of one rank.

Those of a TensorGroup divide matrices (engine/parallel/tensor.py). Invariant: all of them have the
same residual stream, and the gradient of it, to the bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed._functional_collectives as collectives
from torch import Tensor

from forescale.models.part import copies


@dataclass(frozen=True)
class Group:
    """The ranks of a group, and this one's place `rank` among the `size` of them.

    name: of their process group, as torch.distributed knows it.
    """

    rank: int
    size: int
    name: str

    def heads(self, of: slice) -> slice:
        """Return which of the query heads `of` this rank has, where the group divides them."""
        each = (of.stop - of.start) // self.size
        return slice(of.start + self.rank * each, of.start + (self.rank + 1) * each)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum over the group, the same bits on all its ranks. Has no gradient."""
        # A functional collective, because a compiler can follow it.
        total = collectives.all_reduce(x.contiguous(), "sum", self.name)  # type: ignore[arg-type]
        return collectives.wait_tensor(total)


class SequenceGroup(Group):
    """The ranks that divide a row."""

    def columns(self, x: Tensor) -> Tensor:
        """Return this rank's columns of rows: (..., L) -> (..., L/n)."""
        return x.chunk(self.size, -1)[self.rank]

    def attended(
        self,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        q_BLHK: Tensor,
        k_BLGK: Tensor,
        v_BLGK: Tensor,
    ) -> Tensor:
        """Return attend(q, k, v) of this rank's columns, (B, L/n, H, K); `attend` is given all
        columns of this rank's heads. Two collectives of the group, which all its ranks call.

        Where ranks are more than key and value heads, each of these goes to several ranks.
        """
        heads, kv_heads = q_BLHK.shape[2], k_BLGK.shape[2]
        each = copies(heads, kv_heads, self.size)
        parts = [q_BLHK, *(x.repeat_interleave(each, 2) for x in (k_BLGK, v_BLGK))]
        # One exchange of all three: each rank's heads of the queries, of the keys, of the values.
        n = self.size
        sent_BLNHK = torch.cat([x.unflatten(2, (n, -1)) for x in parts], 3)
        got_NBLHK = self._exchanged(sent_BLNHK.movedim(2, 0))  # of each rank, its columns
        whole_BLHK = got_NBLHK.movedim(0, 1).flatten(1, 2)
        queries, keys = heads // n, kv_heads * each // n
        y_BLHK = attend(*whole_BLHK.split([queries, keys, keys], 2))
        back_NBLHK = self._exchanged(y_BLHK.unflatten(1, (n, -1)).movedim(1, 0))
        return back_NBLHK.movedim(0, 2).flatten(2, 3)  # of each rank, its heads

    def _exchanged(self, x_N: Tensor) -> Tensor:
        """Send the i-th of n parts to the i-th rank; return what the ranks sent, in their order."""
        received = collectives.all_to_all_single(x_N.contiguous(), None, None, self.name)  # type: ignore[arg-type]
        return collectives.wait_tensor(received)


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
