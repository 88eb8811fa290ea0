"""Multi-token prediction: modules behind the last block that predict the tokens after the next.

DeepSeek-V3 (2024, arXiv 2412.19437, section 2.2; MtpLayer of transformers). Module k, from 1, joins
the hidden state of the model (k = 1) or of module k - 1 with the embedding of the token k columns
later, and has a block of its own like the model's last. From its output the model's own head
predicts the token k + 1 columns later. The mean of the modules' losses, times mtp_weight, is added
to the objective.

They serve training alone: the model predicts, is evaluated and exported without them. Invariant: a
module has no target beyond the end of a row or of a document, and a column without a target is
visible to none with one.

This file also adds up what they and the experts add to a training forward pass: to its loss, to
what is counted of it, and to the numbers of a step.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.block import Block, Trunk, normed, run_block
from forescale.models.config import ModelConfig
from forescale.models.heads.loss import IGNORE
from forescale.models.init import Linear
from forescale.models.mixers.context import Context
from forescale.models.mlps.balance import Routing, load_metrics, penalty_of, that_count
from forescale.models.norms import make_norm
from forescale.models.parallel.groups import SequenceGroup
from forescale.models.parametrization import scales
from forescale.models.tallies import UNIT, Tallies

# Targets, padding mask, documents; each (B, L).
Labels = tuple[Tensor, Tensor | None, Tensor | None]


class MtpModule(nn.Module):
    """hidden (B, L, D), later embeddings (B, L, D) -> hidden (B, L, D), and the block's Routing."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.sizes.width
        self.embedding_norm = make_norm(config)
        self.hidden_norm = make_norm(config)
        self.join = Linear(2 * width, width, False, scales(config).hidden_std)
        self.block = Block(config, config.num_blocks - 1)
        self.norm = make_norm(config) if config.norms_stream else None
        self.recomputes = config.activation_checkpointing == "full"

    def forward(
        self, hidden_BLD: Tensor, later_BLD: Tensor, *context: Any
    ) -> tuple[Tensor, list[Routing]]:
        """context: the fields of the Context of the model's last block."""
        both = [self.embedding_norm(later_BLD), self.hidden_norm(hidden_BLD)]
        x_BLD = self.join(torch.cat(both, -1))
        x_BLD, _, routings = run_block(self.block, x_BLD, Context(*context), self.recomputes)
        return normed(self.norm, x_BLD), routings


def counted_penalty(
    tallies: Tallies,
    trunk: Trunk,
    labels: Labels,
    modules: nn.ModuleList,
    weight: float,
    head: Callable[[Tensor, Tensor | None], Any],
    group: SequenceGroup | None = None,
) -> Tensor | float:
    """Count a training forward pass; return what experts and later tokens add to its loss.

    modules: those for later tokens, of whose mean loss `weight` is added; head: (hidden, targets)
    -> what window_losses returns. labels: of whole rows; group: the ranks that divide these.
    """
    targets_BL, padding_mask_BL, documents_BL = labels
    penalty: Tensor | float = penalty_of(trunk.routings, targets_BL) if trunk.routings else 0.0
    routings, x_BLD = [*trunk.routings], trunk.hidden
    counts: list[Tensor] = []  # of each module: its loss in UNIT, and its number of targets
    for by, module in enumerate(modules, 1):
        assert trunk.context is not None
        assert trunk.embedded is not None
        later_BL = later_targets(targets_BL, documents_BL, by)
        counted_BL = that_count(later_BL, padding_mask_BL, causal=True)
        own_BL, embedded_BLD = later_BL, trunk.embedded
        if group is None:
            embedded_BLD = later(embedded_BLD, by)
        else:
            own_BL, counted_BL = group.columns(later_BL), group.columns(counted_BL)
            embedded_BLD = group.earlier(embedded_BLD, -by)
        context = trunk.context._replace(counted=counted_BL)
        x_BLD, of_module = module(x_BLD, embedded_BLD, *context)
        result = head(x_BLD, own_BL)
        losses_B, z = result if isinstance(result, tuple) else (result, 0.0)
        penalty += weight / len(modules) * (losses_B.sum() + z)
        if of_module:
            penalty += penalty_of(of_module, later_BL)
            routings += of_module
        nats = (losses_B.detach().double().sum() / UNIT).round().long()
        counts.append(torch.stack([nats, own_BL.ne(IGNORE).sum()]))
    if routings:
        counted = torch.stack([r.counts for r in routings])
        tallies.of("experts")[trunk.routed_before :][: len(counted)].add_(counted)
    if counts:
        tallies.of("mtp").add_(torch.stack(counts))
    return penalty


def later(x_BLD: Tensor, by: int) -> Tensor:
    """Return x of `by` columns later, 0 behind the last, (B, L, D)."""
    return F.pad(x_BLD[:, by:], (0, 0, 0, min(by, x_BLD.shape[1])))


def later_targets(targets_BL: Tensor, documents_BL: Tensor | None, by: int) -> Tensor:
    """Return the targets of `by` columns later, (B, L); IGNORE behind the last, and where that
    column belongs to another document."""
    by = min(by, targets_BL.shape[1])
    later_BL = F.pad(targets_BL[:, by:], (0, by), value=IGNORE)
    if documents_BL is None:
        return later_BL
    documents = F.pad(documents_BL[:, by:], (0, by), value=-1)
    return later_BL.masked_fill(documents != documents_BL, IGNORE)


def metrics_of(tallies: Tallies | None, top_k: int) -> dict[str, Tensor]:
    """Return the experts' load and mtp_loss_k, nats per target of module k, in the step, where
    there are."""
    metrics: dict[str, Tensor] = {}
    if tallies is not None:
        if (totals := tallies.total("experts")) is not None:
            metrics |= load_metrics(totals, top_k)
        if (totals := tallies.total("mtp")) is not None:
            nats, targets = totals.double().unbind(-1)
            means = nats * UNIT / targets.clamp(min=1)
            metrics |= {f"mtp_loss_{k}": mean for k, mean in enumerate(means, 1)}
    return metrics
