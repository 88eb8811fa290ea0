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
) -> tuple[Tensor, "Flight"]:
    """Return the outputs of rows by experts of all ranks, rows (M, D), ends (E,) -> (M, D), which
    are still under way: `arrived` gives their values. Until then a rank may compute other things.

    Rows are sorted by expert, those of the e-th end before ends[e]. experts: this rank's, (rows
    (R, D), ends (E / n,)) -> (R, D). fixed: all ranks have equally many rows for each expert.
    """
    route, ends = _route(rows_MD, ends_E, group, fixed)
    flight = Flight()
    outputs = experts(_Travel.apply(rows_MD, route, True), ends)
    return _Leave.apply(outputs, route, flight), flight


@torch._disable_dynamo
def arrived(rows_MD: Tensor, flight: "Flight") -> Tensor:
    """Return what `through` gave, once it is there. What is computed between the two calls is
    computed between two others in the backward pass, where the gradients travel."""
    return _Arrive.apply(rows_MD, flight)


class Flight:
    """Rows that are under way, or their gradients, whose memory is `gradients`."""

    work: Any = None
    gradients: Tensor | None = None
    route: _Route


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


class _Leave(torch.autograd.Function):
    """Starts the way back of outputs; ends that of their gradients, which `_Arrive` has started."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: _Route, flight: Flight) -> Tensor:
        ctx.flight, flight.route = flight, route
        back, flight.work = _started(rows, route, False)
        return back

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.flight.work.wait()
        arrived, ctx.flight.gradients = ctx.flight.gradients, None
        return arrived[ctx.flight.route.order], None, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, flight: Flight) -> Tensor:
        ctx.flight = flight
        flight.work.wait()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        flight = ctx.flight
        flight.gradients, flight.work = _started(grad, flight.route, True)
        return grad, None  # autograd takes none of another shape; `_Leave` reads those that travel


def _moved(rows: Tensor, route: _Route, there: bool) -> Tensor:
    moved, work = _started(rows, route, there)
    work.wait()
    return moved[route.order] if there else moved


def _started(rows: Tensor, route: _Route, there: bool) -> tuple[Tensor, Any]:
    """Return what rows become on the other side, not yet in the order of experts, and the handle to
    wait for."""
    receives, sends = (route.gets, route.sends) if there else (route.sends, route.gets)
    moved = rows.new_empty(sum(receives), rows.shape[1])
    sent = rows.contiguous() if there else rows[route.inverse]
    return moved, dist.all_to_all_single(
        moved, sent, receives, sends, group=route.group, async_op=True
    )
