"""A mixture of experts in place of the MLP: each token uses top_k of E small SwiGLU MLPs.

A router scores all experts for each token (softmax or sigmoid of E logits, in fp32 as in Switch,
Fedus et al. 2021, arXiv 2101.03961, section 2.4); the token's output is the sum of its top_k
experts' outputs, weighted by their scores, which renormalise divides by their sum. Shared
experts (DeepSeekMoE, Dai et al. 2024, arXiv 2401.06066) act on every token with weight 1.

Dropless: the pairs of a token and an expert are sorted by expert, and each expert multiplies its
rows (grouped.py, as MegaBlocks, Gale et al. 2022, arXiv 2211.15841). With capacity each
expert has ceil(capacity * top_k * tokens / E) places in a micro-batch in training; first choices
come before second ones, earlier tokens before later ones (GShard, Lepikhin et al. 2020, arXiv
2006.16668, algorithm 1), and a pair without a place adds nothing. Evaluation drops nothing.
Invariant: without a capacity a token's output depends on that token alone.

Ranks that divide matrices hold the same tokens. Of these each routes a part, so that a row travels
and is computed once, by whole experts; of the shared experts each has some channels, for all
tokens. The outputs of both add up over the ranks.

Balance, in training, over the real tokens of a micro-batch (n of them, on all ranks that have some
of them):
1. balance_loss * E * sum over experts of f * P for each layer, added up over layers (Switch,
   equations 4 to 6). f: the expert's share of all pairs; P: mean probability (of sigmoid scores:
   their share of the token's sum, DeepSeek-V3, arXiv 2412.19437, equations 17 to 20). 1 at
   balance. transformers' load_balancing_loss_func is top_k times this, and takes all layers as one.
2. z_loss * mean of log(sum of exp(logits))^2 (ST-MoE, Zoph et al. 2022, arXiv 2202.08906,
   equation 5).
3. bias_speed: no loss, but a bias that is added to the scores for the choice alone; after each
   update it moves up by the speed where an expert had fewer pairs than the mean, else down (Wang et
   al. 2024, arXiv 2408.15664, algorithm 1). The load is that of the whole step: all micro-batches
   and ranks. The bias is an integer times the speed: a buffer that no precision rounds, that every
   rank computes alike from sums of integers, and that checkpoints carry. This is the paper's rule.

The objective of a step divides all losses by its targets. So a micro-batch adds its penalty times
its targets: each counts by its share of the targets, at any number of ranks.

muP: router and experts are hidden matrices. Doubt: Małaśnicki et al. 2025 (arXiv 2508.09752) take
the router for an output, whose first logits then vanish with width. Muon takes each expert's
matrices; AdamW takes the router, which like a head makes logits.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.config import ModelConfig
from forescale.models.mlps.balance import Routing
from forescale.models.mlps.dense import SwiGLU
from forescale.models.mlps.dense_module import DenseMLP
from forescale.models.mlps.grouped import GroupedLinear
from forescale.models.mlps.moe import Experts
from forescale.models.parallel.expert_exchange import ExpertGroup, arrived, own_part, through
from forescale.models.parallel.groups import Group, SequenceGroup, TensorGroup
from forescale.models.parametrization import scales
from forescale.models.tallies import UNIT


class _Dispatch(NamedTuple):
    """M rows for the experts: token (M,) of each row (N: a place without a token), ends (E,) of the
    experts' rows, and row (N, k) of each pair (M: dropped)."""

    token: Tensor
    ends: Tensor
    row: Tensor


class _Gated(torch.autograd.Function):
    """silu(gate) * up, with the bits of both operations. Keeps no silu(gate), the backward pass
    makes it again."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        of_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return of_gate, F.silu(gate).mul_(grad)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    if torch.compiler.is_compiling():  # a compiler makes silu(gate) again by itself
        return F.silu(gate) * up
    return _Gated.apply(gate, up)


class Router(nn.Module):
    """(N, D) -> logits (N, E), in fp32."""

    def __init__(self, config: ModelConfig, part: Experts):
        super().__init__()
        shape = (part.experts, config.sizes.width)
        self.weight = nn.Parameter(torch.empty(shape).normal_(0, scales(config).hidden_std))

    def forward(self, x_ND: Tensor) -> Tensor:
        return F.linear(x_ND.float(), self.weight.float())


class MixtureOfExperts(nn.Module):
    """x (B, L, D), real (B, L) or None for all -> (B, L, D), Routing; see the file's docstring."""

    bias_steps: Tensor | None

    def __init__(self, config: ModelConfig, part: Experts):
        super().__init__()
        self.part, scale = part, scales(config)
        experts, width, inner = part.experts, config.sizes.width, part.width(config)
        self.router = Router(config, part)
        as_one = config.activation_checkpointing == "selective"
        self.gate = GroupedLinear(experts, width, inner, scale.hidden_std, as_one)
        self.up = GroupedLinear(experts, width, inner, scale.hidden_std, as_one)
        self.down = GroupedLinear(experts, inner, width, scale.writing_std, as_one)
        shared = part.shared * inner
        self.shared = DenseMLP(config, SwiGLU(), shared) if shared else None
        zeros = torch.zeros(experts, dtype=torch.int64) if part.bias_speed else None
        self.register_buffer("bias_steps", zeros)
        self.expert_group: ExpertGroup | None = None
        self.tensor_group: TensorGroup | None = None  # the ranks that hold the same tokens

    def forward(
        self, x_BLD: Tensor, real_BL: Tensor | None = None, group: SequenceGroup | None = None
    ) -> tuple[Tensor, Routing]:
        x_ND, same = x_BLD.flatten(0, 1), self.tensor_group
        real_N = None if real_BL is None else real_BL.flatten().bool()
        if same is None:
            y_ND, routing, shared_ND = self._routed(x_ND, real_N, [group] if group else [], x_ND)
        else:
            part = same.share(len(x_ND))
            among = [group, same] if group else [same]
            part_real_N = None if real_N is None else real_N[part]
            y_ND, routing, shared_ND = self._routed(x_ND[part], part_real_N, among, x_ND)
            y_ND = F.pad(y_ND, (0, 0, part.start, len(x_ND) - part.stop))
        if self.shared is not None:
            y_ND = y_ND + (self.shared(x_ND) if shared_ND is None else shared_ND)
        if same is not None:
            y_ND = same.summed(y_ND)
        return y_ND.view_as(x_BLD), routing

    def _routed(
        self, x_ND: Tensor, real_N: Tensor | None, groups: Sequence[Group], whole_ND: Tensor
    ) -> tuple[Tensor, Routing, Tensor | None]:
        """Return the outputs of the chosen experts; groups: whose ranks have tokens of the same
        micro-batch. Where the outputs travel, also those of the shared experts for whole_ND, which
        are computed meanwhile."""
        logits_NE = self.router(x_ND)
        c = self.part
        scores_NE = logits_NE.softmax(-1) if c.scores == "softmax" else logits_NE.sigmoid()
        with torch.no_grad():
            ranked_NE = scores_NE
            if self.bias_steps is not None:
                ranked_NE = scores_NE + c.bias_speed * self.bias_steps
            chosen_NK = ranked_NE.topk(c.top_k, -1).indices
        weights_NK = scores_NE.gather(-1, chosen_NK)
        if c.renormalise:
            weights_NK = weights_NK / weights_NK.sum(-1, keepdim=True)
        if self.training and c.capacity:
            places = math.ceil(c.capacity * len(x_ND) * c.top_k / c.experts)
            to = _with_capacity(chosen_NK, real_N, places, logits_NE.shape[1])
            rows_MD = F.pad(x_ND, (0, 0, 0, 1)).index_select(0, to.token)
        else:
            to = _sorted_by_expert(chosen_NK, logits_NE.shape[1])
            rows_MD = x_ND.index_select(0, to.token)
        shared_ND = None
        if self.expert_group is None:
            out_MD = self._experts(rows_MD, to.ends)
        else:
            fixed = self.training and c.capacity > 0
            leaving = through(self._experts, rows_MD, to.ends, self.expert_group, fixed)
            shared_ND = None if self.shared is None else self.shared(whole_ND)
            out_MD = arrived(*leaving)
        if self.training and c.capacity:
            out_MD = F.pad(out_MD, (0, 0, 0, 1))
        each_NKD = out_MD.index_select(0, to.row.flatten()).view(*chosen_NK.shape, -1)
        y_ND = (each_NKD * weights_NK[..., None].to(each_NKD.dtype)).sum(1)
        dropped_NK = to.row == len(rows_MD)
        routing = self._routing(logits_NE, scores_NE, chosen_NK, dropped_NK, real_N, groups)
        return y_ND, routing, shared_ND

    def _experts(self, rows_MD: Tensor, ends_E: Tensor) -> Tensor:
        """Return the outputs of the experts that this rank has, for rows sorted by expert."""
        inner_MF = gated(self.gate(rows_MD, ends_E), self.up(rows_MD, ends_E))
        return self.down(inner_MF, ends_E)

    def divide(self, group: ExpertGroup) -> None:
        """Keep this rank's experts alone: from now on all ranks of the group call together.

        The experts must have their initial weights, those of all of them, equal on these ranks.
        """
        for module in (self.gate, self.up, self.down):
            module.weight = own_part(module.weight, group)
        self.expert_group = group

    def _routing(
        self,
        logits_NE: Tensor,
        scores_NE: Tensor,
        chosen_NK: Tensor,
        dropped_NK: Tensor,
        real_N: Tensor | None,
        groups: Sequence[Group],
    ) -> Routing:
        """Return penalty and counts of a training forward pass; zeros in evaluation.

        Where ranks of groups divide the tokens, the balance is that of all of them, and a rank has
        the part of the penalty that its own make.
        """
        c, (tokens, experts) = self.part, logits_NE.shape
        if not self.training:
            none = torch.zeros(experts + 2, dtype=torch.int64, device=logits_NE.device)
            return Routing(logits_NE.new_zeros(()), none)
        if real_N is None:
            real_N = torch.ones(tokens, dtype=torch.bool, device=logits_NE.device)
        whole_N = real_N.long()
        pairs_NK = whole_N[:, None].expand_as(chosen_NK)
        load_E = whole_N.new_zeros(experts).scatter_add_(0, chosen_NK.flatten(), pairs_NK.flatten())
        every_E = load_E
        for group in groups:
            every_E = group.sum(every_E)
        tokens_of_all = every_E.sum() // c.top_k
        share_N = real_N.float() / tokens_of_all.clamp(min=1)  # adds up to 1
        p_NE = scores_NE
        if c.scores != "softmax":
            p_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
        penalty = logits_NE.new_zeros(())
        if c.balance_loss:
            f_E = every_E / every_E.sum().clamp(min=1)
            balance = (f_E * (share_N[:, None] * p_NE).sum(0)).sum() * experts
            penalty = penalty + c.balance_loss * balance
        if c.z_loss:
            z = (share_N * logits_NE.logsumexp(-1).square()).sum()
            penalty = penalty + c.z_loss * z
        with torch.no_grad():
            entropy_N = -torch.special.xlogy(p_NE, p_NE).sum(-1) / UNIT
            entropy = (entropy_N.round().long() * whole_N).sum()
            dropped = (dropped_NK.long() * pairs_NK).sum()
        return Routing(penalty, torch.cat([load_E, torch.stack([dropped, entropy])]))

    @torch.no_grad()
    def move_bias(self, load_E: Tensor) -> None:
        """Move the bias by one step, given the pairs of each expert in the whole optimizer step."""
        if self.bias_steps is not None:
            # sign(mean - load) in integers: exact, whatever the load.
            self.bias_steps += torch.sign(load_E.sum() - load_E * len(load_E))


def _sorted_by_expert(chosen_NK: Tensor, experts: int) -> _Dispatch:
    sorted_M, order_M = chosen_NK.flatten().sort(stable=True)
    ends_E = torch.searchsorted(
        sorted_M, torch.arange(experts, device=chosen_NK.device), right=True
    )
    row_M = torch.empty_like(order_M)
    row_M[order_M] = torch.arange(len(order_M), device=order_M.device)
    return _Dispatch(order_M // chosen_NK.shape[1], ends_E, row_M.view_as(chosen_NK))


def _with_capacity(
    chosen_NK: Tensor, real_N: Tensor | None, places: int, experts: int
) -> _Dispatch:
    """Give each expert `places` rows. Tokens that are not real take no place."""
    tokens, k = chosen_NK.shape
    if real_N is not None:
        chosen_NK = chosen_NK.masked_fill(~real_N[:, None], experts)
    device, rows = chosen_NK.device, experts * places
    sorted_P, order_P = chosen_NK.T.flatten().sort(stable=True)  # all first choices come first
    before_P = torch.searchsorted(sorted_P, sorted_P)  # the pairs of smaller experts
    place_P = torch.arange(len(sorted_P), device=device) - before_P
    has_place = (place_P < places) & (sorted_P < experts)
    row_P = torch.where(has_place, sorted_P * places + place_P, rows)
    token_M = torch.full((rows + 1,), tokens, device=device)
    token_M[row_P] = order_P % tokens  # the last one is of all dropped pairs, and not used
    row_KN = torch.empty_like(row_P)
    row_KN[order_P] = row_P
    ends_E = torch.arange(1, experts + 1, device=device) * places
    return _Dispatch(token_M[:-1], ends_E, row_KN.view(k, tokens).T)
