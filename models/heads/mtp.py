"""Multi-token prediction: modules behind the last block that predict the tokens after the next.

DeepSeek-V3 (2024, arXiv 2412.19437, section 2.2; MtpLayer of transformers). Module k, from 1, joins
the hidden state of the model (k = 1) or of module k - 1 with the embedding of the token k columns
later, and has a block of its own like the model's last. From its output the model's own head
predicts the token k + 1 columns later. The mean of the modules' losses, times mtp_weight, is added
to the objective.

They serve training alone: the model predicts, is evaluated and exported without them. Invariant: a
module has no target beyond the end of a row or of a document, and a column without a target is seen
by none with one.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.block import Block, Trunk, normed, run_block
from forescale.models.config import ModelConfig
from forescale.models.heads.loss import IGNORE
from forescale.models.init import Linear
from forescale.models.mixers.context import Context
from forescale.models.mlps.balance import Routing, that_count
from forescale.models.norms import make_norm
from forescale.models.parametrization import scales
from forescale.models.tallies import UNIT


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


class LaterLoss(NamedTuple):
    """What one module gives. targets (B, L); losses (B,): nats; objective: () with their z-loss."""

    targets: Tensor
    losses: Tensor
    objective: Tensor
    routings: list[Routing]


def later_losses(
    modules: Iterable[nn.Module],
    trunk: Trunk,
    labels: tuple[Tensor, Tensor | None, Tensor | None],
    head: Callable[[Tensor, Tensor], Any],
) -> Iterator[LaterLoss]:
    """Yield the loss of each module. labels: targets, padding mask and documents, each (B, L), as
    for Transformer.forward; head: (hidden, targets) -> what window_losses returns."""
    targets_BL, padding_mask_BL, documents_BL = labels
    x_BLD, embedded_BLD, context = trunk.hidden, trunk.embedded, trunk.context
    assert context is not None
    assert embedded_BLD is not None
    for by, module in enumerate(modules, 1):
        own_BL = later_targets(targets_BL, documents_BL, by)
        counted_BL = that_count(own_BL, padding_mask_BL, causal=True)
        x_BLD, routings = module(
            x_BLD, later(embedded_BLD, by), *context._replace(counted=counted_BL)
        )
        result = head(x_BLD, own_BL)
        losses_B, z = result if isinstance(result, tuple) else (result, 0.0)
        yield LaterLoss(own_BL, losses_B, losses_B.sum() + z, routings)


def later(x_BLD: Tensor, by: int) -> Tensor:
    """Return x of `by` columns later, 0 behind the last, (B, L, D)."""
    return F.pad(x_BLD[:, by:], (0, 0, 0, min(by, x_BLD.shape[1])))


def later_targets(targets_BL: Tensor, documents_BL: Tensor | None, by: int) -> Tensor:
    """Return the targets of `by` columns later, (B, L); IGNORE behind the last, and where that
    column belongs to another document."""
    by = min(by, targets_BL.shape[1])
    later = F.pad(targets_BL[:, by:], (0, by), value=IGNORE)
    if documents_BL is None:
        return later
    documents = F.pad(documents_BL[:, by:], (0, by), value=-1)
    return later.masked_fill(documents != documents_BL, IGNORE)


def counts_of(losses: Sequence[LaterLoss]) -> Tensor:
    """Return (modules, 2) int64: each module's loss in UNIT, and its number of targets."""
    nats = torch.stack([one.losses.detach().double().sum() for one in losses])
    targets = torch.stack([one.targets.ne(IGNORE).sum() for one in losses])
    return torch.stack([(nats / UNIT).round().long(), targets], -1)


def mtp_metrics(totals: Tensor) -> dict[str, Tensor]:
    """Return mtp_loss_k, nats per target of module k in the step."""
    nats, targets = totals.double().unbind(-1)
    means = nats * UNIT / targets.clamp(min=1)
    return {f"mtp_loss_{k}": mean for k, mean in enumerate(means, 1)}
