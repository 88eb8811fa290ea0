"""The load of experts over a step: what is counted, and what is added to the objective.

Invariant: counts are integers (tallies.py); tokens that can be padding don't count.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from forescale.models.heads.loss import IGNORE
from forescale.models.tallies import UNIT


class Routing(NamedTuple):
    """What a layer reports of a training forward pass, apart from its output.

    penalty: (), of one token, differentiable. counts (E + 2,) int64, of the tokens that count:
    pairs of token and expert by expert, pairs that were dropped, and the sum of the router's
    entropies in UNIT.
    """

    penalty: Tensor
    counts: Tensor


def that_count(targets_BL: Tensor, padding_mask_BL: Tensor | None, causal: bool) -> Tensor:
    """Return (B, L) bool, True for the tokens on which a target depends: in a causal model those up
    to a row's last target, for what is behind it can be padding; else all of a row with a target.
    """
    has_BL = targets_BL.ne(IGNORE)
    if causal:
        real_BL = has_BL.flip(1).cumsum(1).flip(1) > 0
    else:
        real_BL = has_BL.any(1, keepdim=True).expand_as(has_BL)
    return real_BL if padding_mask_BL is None else real_BL & padding_mask_BL.bool()


def penalty_of(routings: Sequence[Routing], targets_BL: Tensor) -> Tensor:
    """Return the layers' penalties of one token, added up, times the number of targets: ()."""
    return torch.stack([r.penalty for r in routings]).sum() * targets_BL.ne(IGNORE).sum()


def load_metrics(totals: Tensor, top_k: int) -> dict[str, Tensor]:
    """Return numbers of a step. expert_load: pairs of the fullest expert / mean, averaged over
    layers; expert_load_worst: of the worst layer; router_entropy: nats, at most log E; dropped:
    share of the pairs. totals (layers, E + 2): the counts of the layers with experts."""
    counts = totals.double()
    load, dropped, entropy = counts[:, :-2], counts[:, -2], counts[:, -1]
    pairs = load.sum(-1).clamp(min=1)
    fullest = load.amax(-1) * load.shape[-1] / pairs
    return {
        "expert_load": fullest.mean(),
        "expert_load_worst": fullest.max(),
        "router_entropy": (entropy * UNIT * top_k / pairs).mean(),
        "dropped": dropped.sum() / pairs.sum(),
    }
