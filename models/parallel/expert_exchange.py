"""Experts divided among ranks: a row travels to the rank that has its expert, and its output back.

The n ranks of a group exchange rows. Each has its own tokens, all of the router, and E / n
successive experts of each layer: those from rank * E / n on (GShard, Lepikhin et al. 2020,
arXiv 2006.16668, section 3.2). Invariant: an expert multiplies the rows of all these ranks at once,
so its gradient is already their sum, and a row's output is that of an undivided layer.

All ranks of a group call a layer together: also in evaluation, and equally often.

The sizes of what travels depend on the tokens' choice, unless each expert has a fixed number of
places. So each rank first learns how many rows come from each other rank, and a GPU waits for these
numbers, once in each forward pass of a layer. A compiler can't look into tensors of such sizes:
exchange and products run uncompiled, between the compiled parts of a block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from forescale.models.parallel.whole import Whole


class ExpertGroup(NamedTuple):
    """The ranks that divide the experts of a layer, and this one's place `rank` among them."""

    group: Any  # a torch.distributed.ProcessGroup
    rank: int
    size: int


class _Route(NamedTuple):
    """How rows travel. sends and gets: rows to and from each rank of the group. order (R,): the
    arriving rows, sorted by expert; inverse (R,): its inverse."""

    group: Any
    sends: list[int]
    gets: list[int]
    order: Tensor
    inverse: Tensor


def own_part(weight: nn.Parameter, group: ExpertGroup) -> nn.Parameter:
    """Return this rank's experts of a tensor of all experts, (E, ...) -> (E / n, ...)."""
    experts = len(weight) // group.size
    first = group.rank * experts
    part = nn.Parameter(weight.detach()[first : first + experts].clone())
    part.whole = Whole(tuple(weight.shape), group.rank, group.size)  # type: ignore[attr-defined]
    return part


@torch._disable_dynamo  # imports no compiler before it is called; see groups.py
def through(
    experts: Callable[[Tensor, Tensor], Tensor],
    rows_MD: Tensor,
    ends_E: Tensor,
    group: ExpertGroup,
    fixed: bool,
) -> Tensor:
    """Return the outputs of rows by experts of all ranks: rows (M, D), ends (E,) -> (M, D).

    Rows are sorted by expert, those of the e-th end before ends[e]. experts: this rank's, (rows
    (R, D), ends (E / n,)) -> (R, D). fixed: all ranks have equally many rows for each expert.
    """
    route, ends = _route(rows_MD, ends_E, group, fixed)
    return _Travel.apply(experts(_Travel.apply(rows_MD, route, True), ends), route, False)


def _route(
    rows_MD: Tensor, ends_E: Tensor, group: ExpertGroup, fixed: bool
) -> tuple[_Route, Tensor]:
    """Return the route of rows to this rank's experts, and the ends of the experts' rows there."""
    n = group.size
    counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
    if fixed:
        arriving_E = counts_E
        sends = gets = [len(rows_MD) // n] * n
    else:
        arriving_E = torch.empty_like(counts_E)
        dist.all_to_all_single(arriving_E, counts_E, group=group.group)
        both = torch.stack([counts_E, arriving_E]).view(2, n, -1).sum(-1)
        sends, gets = both.tolist()  # the one wait
    arriving_PE = arriving_E.view(n, -1)  # rows by rank, and by expert here
    number = torch.arange(arriving_PE.shape[1], device=rows_MD.device).repeat(n)
    expert_R = number.repeat_interleave(arriving_E, output_size=sum(gets))
    order_R = expert_R.argsort(stable=True)
    inverse_R = torch.empty_like(order_R)
    inverse_R[order_R] = torch.arange(len(order_R), device=order_R.device)
    route = _Route(group.group, sends, gets, order_R, inverse_R)
    return route, arriving_PE.sum(0).cumsum(0)


class _Travel(torch.autograd.Function):
    """Takes rows to the experts, or back; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: _Route, there: bool) -> Tensor:
        ctx.route, ctx.there = route, there
        return _moved(rows, route, there)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _moved(grad, ctx.route, not ctx.there), None, None


def _moved(rows: Tensor, route: _Route, there: bool) -> Tensor:
    if there:
        arrived = rows.new_empty(sum(route.gets), rows.shape[1])
        dist.all_to_all_single(
            arrived, rows.contiguous(), route.gets, route.sends, group=route.group
        )
        return arrived[route.order]
    back = rows.new_empty(sum(route.sends), rows.shape[1])
    dist.all_to_all_single(back, rows[route.inverse], route.sends, route.gets, group=route.group)
    return back
