"""What experts and modules for later tokens add to a training forward pass: to its loss, to what is
counted of it, and to the numbers of a step."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from forescale.models.block import Trunk
from forescale.models.heads.mtp import counts_of, later_losses, mtp_metrics
from forescale.models.mlps.balance import load_metrics, penalty_of
from forescale.models.tallies import Tallies

# Targets, padding mask, documents; each (B, L).
Labels = tuple[Tensor, Tensor | None, Tensor | None]


def counted_penalty(
    tallies: Tallies,
    trunk: Trunk,
    labels: Labels,
    modules: nn.ModuleList,
    weight: float,
    head: Callable[[Tensor, Tensor | None], Any],
) -> Tensor | float:
    """Count a training forward pass; return what experts and later tokens add to its loss.

    modules: those for later tokens, of whose mean loss `weight` is added; head: as
    Transformer._head.
    """
    penalty: Tensor | float = penalty_of(trunk.routings, labels[0]) if trunk.routings else 0.0
    routings, losses = [*trunk.routings], []
    for later in later_losses(modules, trunk, labels, head):
        losses.append(later)
        penalty += weight / len(modules) * later.objective
        if later.routings:
            penalty += penalty_of(later.routings, later.targets)
            routings += later.routings
    if routings:
        tallies.of("experts").add_(torch.stack([r.counts for r in routings]))
    if losses:
        tallies.of("mtp").add_(counts_of(losses))
    return penalty


def metrics_of(tallies: Tallies | None, top_k: int) -> dict[str, Tensor]:
    """Return the experts' load and the losses of later tokens in the step, where there are."""
    metrics: dict[str, Tensor] = {}
    if tallies is not None:
        if (totals := tallies.total("experts")) is not None:
            metrics |= load_metrics(totals, top_k)
        if (totals := tallies.total("mtp")) is not None:
            metrics |= mtp_metrics(totals)
    return metrics
