"""Groups of ranks that compute one model together, as the model's own code sees them.

The n ranks of a SequenceGroup divide the columns of rows. A rank holds L/n of a row's L columns in
all that acts on a token alone: embedding, norms, MLPs, head and loss. Around attention, s ranks
exchange columns for heads (Ulysses: Jacobs et al. 2023, arXiv 2309.14509): each then has the
columns of all s, of H/s heads. The n/s ranks with the same heads form a ring, around which keys and
values pass (mixers/ring.py; both together: USP, Fang and Zhao 2024, arXiv 2405.07719). A mixer with
a state takes it from the ranks before. Invariant: what is exchanged is exact, in the backward pass
too, so that the gradients of a parameter, summed over ranks, are those of one rank.

A row is dealt out in `runs` of successive columns, two a rank for causal attention in a ring
(deal.py), else one.

Those of a TensorGroup divide matrices (engine/parallel/tensor.py). Invariant: all of them have the
same residual stream, and the gradient of it, to the bit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

from forescale.models.init import Product
from forescale.models.parallel.deal import Ring
from forescale.models.part import copies

_c10d = torch.ops._c10d_functional


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


@dataclass(frozen=True)
class SequenceGroup(Group):
    """The ranks that divide a row; the place of a rank is ring.rank * exchange.size +
    exchange.rank.

    exchange: those of them that exchange columns for heads with this one; ring: those that pass
    keys and values around with it; runs: of successive columns, that a rank has.
    """

    exchange: Group
    ring: Group
    runs: int = 1

    def runs_of(self, rank: int) -> list[int]:
        """Return the numbers of the runs of a rank, in the order of the columns."""
        place, part = divmod(rank, self.exchange.size)
        numbers = Ring(place, self.ring.size, self.runs).numbers(place)
        return [number * self.exchange.size + part for number in numbers]

    def columns(self, x: Tensor, before: int = 0) -> Tensor:
        """Return this rank's columns of rows: (..., L) -> (..., L/n); of each run also the `before`
        columns before it, 0 outside of the row."""
        each = x.shape[-1] // (self.runs * self.size)
        x = F.pad(x, (before, 0)) if before else x
        firsts = [run * each for run in self.runs_of(self.rank)]
        parts = [x[..., first : first + each + before] for first in firsts]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def beside(self, x_BLD: Tensor, by: int) -> Tensor:
        """Return the `by` columns before each run of this rank, or the -by columns after it: of
        this rank's (B, L/n, D), (B, runs, |by|, D); 0 outside of the row. A collective."""
        x_BRLD = x_BLD.unflatten(1, (self.runs, -1))
        take = min(abs(by), x_BRLD.shape[2])  # a run may be shorter
        edge_BRTD = x_BRLD[:, :, -take:] if by > 0 else x_BRLD[:, :, :take]
        every_NBRTD = self._exchanged(edge_BRTD.expand(self.size, -1, -1, -1, -1))
        order = sorted((r, n, i) for n in range(self.size) for i, r in enumerate(self.runs_of(n)))
        edges_BED = torch.cat([every_NBRTD[rank, :, i] for _, rank, i in order], 1)
        edges_BED = F.pad(edges_BED, (0, 0, by, 0) if by > 0 else (0, 0, 0, -by))
        firsts = [(run + (by < 0)) * take for run in self.runs_of(self.rank)]
        return torch.stack([edges_BED[:, first : first + abs(by)] for first in firsts], 1)

    def earlier(self, x_BLD: Tensor, by: int) -> Tensor:
        """Return x of `by` columns earlier in the row (later, if negative), (B, L/n, D), 0 where
        there is none. A collective."""
        x_BRLD, beside = x_BLD.unflatten(1, (self.runs, -1)), self.beside(x_BLD, by)
        length, both = x_BRLD.shape[2], [beside, x_BRLD] if by > 0 else [x_BRLD, beside]
        joined = torch.cat(both, 2)
        return (joined[:, :, :length] if by > 0 else joined[:, :, -length:]).flatten(1, 2)

    def entering(
        self,
        decay: Tensor,
        state: Tensor,
        back: bool = False,
        times: Callable[[Tensor, Tensor], Tensor] = torch.mul,
    ) -> Tensor:
        """Return the state that the ranks before this one leave (back: those after it), where each
        makes times(decay, x) + state of a state x that enters it. A collective, without gradient.
        """
        both = torch.cat([decay, state], -1)[None].contiguous()
        gathered = _c10d.all_gather_into_tensor(both, self.size, self.name)
        every, total = _c10d.wait_tensor(gathered), torch.zeros_like(state)
        for rank in range(self.size - 1, self.rank, -1) if back else range(self.rank):
            by, plus = every[rank].split([decay.shape[-1], state.shape[-1]], -1)
            total = times(by, total) + plus
        return total

    def send(self, x: Tensor, by: int) -> None:
        """Send x to the rank `by` places on, if there is one."""
        if 0 <= self.rank + by < self.size:
            group = _resolve_process_group(self.name)  # type: ignore[arg-type]
            dist.send(x.contiguous(), group=group, group_dst=self.rank + by)

    def received(self, like: Tensor, by: int) -> Tensor:
        """Return what the rank `by` places on sends, of the shape of `like`; 0 without one."""
        x = torch.zeros_like(like)
        if 0 <= self.rank + by < self.size:
            group = _resolve_process_group(self.name)  # type: ignore[arg-type]
            dist.recv(x, group=group, group_src=self.rank + by)
        return x

    def attended(
        self,
        attend: Callable[[Tensor, Tensor, Tensor], Tensor],
        q_BLHK: Tensor,
        k_BLGK: Tensor,
        v_BLGK: Tensor,
    ) -> Tensor:
        """Return attend(q, k, v) of this rank's columns, (B, L/n, H, K); `attend` is given the
        columns of all ranks that exchange, of this rank's heads. Two collectives of these ranks.

        Where ranks are more than key and value heads, each of these goes to several ranks.
        """
        heads, kv_heads, n = q_BLHK.shape[2], k_BLGK.shape[2], self.exchange.size
        if n == 1:
            return attend(q_BLHK, k_BLGK, v_BLGK)
        each = copies(heads, kv_heads, n)
        parts = [q_BLHK, *(x.repeat_interleave(each, 2) for x in (k_BLGK, v_BLGK))]
        # One exchange of all three: each rank's heads of the queries, of the keys, of the values.
        sent_BLNHK = torch.cat([x.unflatten(2, (n, -1)) for x in parts], 3)
        name, runs = self.exchange.name, self.runs
        got_NBLHK = self._exchanged(sent_BLNHK.movedim(2, 0), name)  # of each rank, its columns
        whole_BLHK = got_NBLHK.unflatten(2, (runs, -1)).movedim(0, 2).flatten(1, 3)
        queries, keys = heads // n, kv_heads * each // n
        y_BLHK = attend(*whole_BLHK.split([queries, keys, keys], 2))
        y_NBRLHK = y_BLHK.unflatten(1, (runs, n, -1)).movedim(2, 0)
        back_NBLHK = self._exchanged(y_NBRLHK.flatten(2, 3), name)
        return back_NBLHK.movedim(0, 2).flatten(2, 3)  # of each rank, its heads

    def _exchanged(self, x_N: Tensor, name: str = "") -> Tensor:
        """Send the i-th of n parts to the i-th rank; return what the ranks sent, in their order.
        name: of some of these ranks; else all."""
        received = collectives.all_to_all_single(x_N.contiguous(), None, None, name or self.name)  # type: ignore[arg-type]
        return collectives.wait_tensor(received)


@dataclass(frozen=True)
class TensorGroup(Group):
    """The ranks that divide matrices; chunks: parts in which they sum a product, of its rows."""

    chunks: int = 1

    def copied(self, x: Tensor) -> Tensor:
        """Return x. Its gradient is summed over the group: each rank has computed a part of it."""
        return _Copied.apply(x, self)

    def summed(self, x: Tensor) -> Tensor:
        """Return the sum of x over the group. The gradient passes unchanged: all have the same."""
        return _Summed.apply(x, self)

    def sum_of(self, x: Tensor, weight: Tensor, product: Product | None) -> Tensor:
        """Return the sum of the group's products of x (..., in) and weight (out, in): (..., out).
        product: instead of torch's."""
        if self.chunks == 1 or product is not None:
            return self.summed((product or F.linear)(x, weight))
        return _SumOfProducts.apply(x, weight, self)

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


class _SumOfProducts(torch.autograd.Function):
    """The sum over ranks of x @ weight.T in parts, of which each is sent while the next is made."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: TensorGroup) -> Tensor:
        ctx.save_for_backward(x, weight)
        parts = x.flatten(0, -2).chunk(group.chunks)
        sums = [collectives.all_reduce(F.linear(part, weight), "sum", group.name) for part in parts]  # type: ignore[arg-type]
        return torch.cat([*map(collectives.wait_tensor, sums)]).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        return gradient @ weight, gradient.flatten(0, -2).t() @ x.flatten(0, -2), None
