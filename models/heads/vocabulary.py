"""The table of token vectors, and what stands before it where it makes the logits.

Invariant: the table and its bias are read only in a call of their module, which a tied model calls
twice.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.config import ModelConfig
from forescale.models.heads.loss import capped, window_losses
from forescale.models.init import Linear
from forescale.models.norms import make_norm
from forescale.models.parallel.groups import TensorGroup
from forescale.models.parametrization import scales


class Vocabulary(nn.Module):
    """A table (V, D) for embedding and logits, both by a call: a tied table is called twice.

    makes_logits: False for a table that only embeds. With head=dense or head.bias logits have
    a bias (V).
    group: the ranks that divide the rows, V being this rank's; None: this one has them all.
    product: as in Linear, of logits.

    tokens (B, L) int64             -> vectors (B, L, D)
    hidden (B, L, D)                -> logits (B, L, V), of all ranks' rows
    hidden (B, L, D), targets (B, L) -> what window_losses returns
    """

    product: Callable[[Tensor, Tensor], Tensor] | None = None

    def __init__(self, config: ModelConfig, makes_logits: bool = True):
        super().__init__()
        self.makes_logits = makes_logits
        self.chunks = config.targets_at_once(False), config.targets_at_once(True)
        self.z_loss = config.z_loss
        self.softcap = config.head.softcap
        self.group: TensorGroup | None = None
        self.vocab_size = config.sizes.vocab_size
        self.weight = nn.Parameter(torch.empty(self.vocab_size, config.sizes.width))
        has_bias = makes_logits and config.head.has_bias
        self.bias = nn.Parameter(torch.zeros(self.vocab_size)) if has_bias else None
        scale = scales(config)
        self.multiplier = scale.logits
        nn.init.normal_(self.weight, 0, scale.table_std)

    def divides(self, ranks: int) -> bool:
        """True if so many ranks can divide the rows."""
        return self.vocab_size % ranks == 0

    def forward(self, x: Tensor, targets_BL: Tensor | None = None) -> Any:
        if not x.is_floating_point():
            if self.group is None:
                return F.embedding(x, self.weight)
            rows_BL, count = x - self.group.rank * len(self.weight), len(self.weight)
            absent_BL = (rows_BL < 0) | (rows_BL >= count)
            x_BLD = F.embedding(rows_BL.masked_fill(absent_BL, 0), self.weight)
            return self.group.summed(x_BLD.masked_fill(absent_BL[..., None], 0.0))
        if self.group is not None:
            x = self.group.copied(x)
        if self.multiplier != 1:
            x = x * self.multiplier  # not the logits, which are many more
        if targets_BL is None:
            if self.product is None:
                logits = F.linear(x, self.weight, self.bias)
            else:
                logits = self.product(x, self.weight)
                logits = logits if self.bias is None else logits + self.bias
            logits = capped(logits, self.softcap)
            return logits if self.group is None else self.group.joined(logits)
        chunk = self.chunks[x.is_cuda]
        return window_losses(
            x, self.weight, targets_BL, chunk, self.z_loss, self.softcap, self.bias, self.group
        )


class Transform(nn.Module):
    """(B, L, D) -> (B, L, D): norm(gelu(dense(x))), before the logits of BERT's head for masked
    tokens (Devlin et al. 2019; BertPredictionHeadTransform of transformers), with the exact GELU.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        width = config.sizes.width
        self.dense = Linear(width, width, config.bias, scales(config).hidden_std)
        self.norm = make_norm(config)

    def forward(self, x_BLD: Tensor) -> Tensor:
        return self.norm(F.gelu(self.dense(x_BLD)))
