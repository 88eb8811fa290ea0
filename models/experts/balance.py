"""The load of experts over a step: what is counted, what is added to the objective, what follows.

The model counts in its training forward passes; the engine zeroes the counts before a step, adds
them up over ranks, and says when the update is made (the protocol of trainer/train/model.py).
Invariant: counts are integers, so sums don't depend on ranks, micro-batches or their order; tokens
that can be padding don't count.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from forescale.models.heads.loss import IGNORE

if TYPE_CHECKING:
    from forescale.models.experts.moe import MixtureOfExperts

ENTROPY_UNIT = 1e-6  # nats: entropies are counted in whole units, whose sum has no rounding


class Routing(NamedTuple):
    """What a layer reports of a training forward pass, apart from its output.

    penalty: (), of one token, differentiable. counts (E + 2,) int64, of the tokens that count:
    pairs of token and expert by expert, pairs that were dropped, and the sum of the router's
    entropies in ENTROPY_UNIT.
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


class Tallies(nn.Module):
    """Counts (layers, E + 2) of the layers with experts, as Routing has them, since the last step.

    totals: those of the whole step over all ranks, once it is known.
    """

    counts: Tensor

    def __init__(self, num_layers: int, num_experts: int, top_k: int):
        super().__init__()
        self.top_k = top_k
        zeros = torch.zeros(num_layers, num_experts + 2, dtype=torch.int64)
        self.register_buffer("counts", zeros, persistent=False)
        self.totals: Tensor | None = None

    def add(self, routings: Sequence[Routing]) -> None:
        """Count a forward pass."""
        self.counts += torch.stack([r.counts for r in routings])

    def metrics(self) -> dict[str, Tensor]:
        """Return numbers of the step. expert_load: pairs of the fullest expert / mean, averaged
        over layers; expert_load_worst: of the worst layer; router_entropy: nats, at most log E;
        dropped: share of the pairs."""
        if self.totals is None:
            return {}
        counts = self.totals.double()
        load, dropped, entropy = counts[:, :-2], counts[:, -2], counts[:, -1]
        pairs = load.sum(-1).clamp(min=1)
        fullest = load.amax(-1) * load.shape[-1] / pairs
        return {
            "expert_load": fullest.mean(),
            "expert_load_worst": fullest.max(),
            "router_entropy": (entropy * ENTROPY_UNIT * self.top_k / pairs).mean(),
            "dropped": dropped.sum() / pairs.sum(),
        }

    def move_biases(self, layers: Sequence["MixtureOfExperts"]) -> None:
        """Move the bias of each layer by the load of the step."""
        assert self.totals is not None, "the engine gives the totals before the update"
        for layer, counts in zip(layers, self.totals, strict=True):
            layer.move_bias(counts[:-2])
