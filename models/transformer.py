"""The decoder-only transformer: embedding, pre-norm blocks, and a head that is also the loss.

Invariant: a parameter is read only inside the forward of the module that owns it, and every module
is entered by a call. ZeRO-3 gathers a module's parameters around its call, so nothing here needs
to know that the weights are elsewhere; a tied table is one module that is called twice.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from forescale.models.attention import Attention, additive_mask, visible_keys
from forescale.models.config import ModelConfig
from forescale.models.init import Linear
from forescale.models.loss import window_losses
from forescale.models.mlp import MLP
from forescale.models.norm import make_norm
from forescale.models.parametrization import Factors, factors, scales
from forescale.models.position import (
    LearnedPosition,
    Rotation,
    document_starts,
    positions_of,
    rotation,
    sinusoids,
)


class Vocabulary(nn.Module):
    """A table (V, D) with both its uses behind one call, so that tying is calling it twice.

    tokens (B, L) int64             -> vectors (B, L, D)
    hidden (B, L, D)                -> logits (B, L, V)
    hidden (B, L, D), targets (B, L) -> what window_losses returns
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.chunk, self.z_loss = config.loss_chunk, config.z_loss
        self.weight = nn.Parameter(torch.empty(config.sizes.vocab_size, config.sizes.width))
        scale = scales(config)
        self.multiplier = scale.logits
        nn.init.normal_(self.weight, 0, scale.table_std)

    def forward(self, x: Tensor, targets_BL: Tensor | None = None):
        if not x.is_floating_point():
            return F.embedding(x, self.weight)
        if self.multiplier != 1:
            x = x * self.multiplier  # not the logits, which are many more
        if targets_BL is None:
            return F.linear(x, self.weight)
        return window_losses(x, self.weight, targets_BL, self.chunk, self.z_loss)


class Block(nn.Module):
    """(B, L, D) -> (B, L, D): attention and MLP, each normed first and added to the stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.attention_norm, self.attention = make_norm(config), Attention(config)
        self.mlp_norm, self.mlp = make_norm(config), MLP(config)
        self.dropout = nn.Dropout(config.dropout)
        self.multiplier = scales(config).residual

    def forward(
        self, x_BLD: Tensor, rotation: Rotation | None = None, mask_B1LL: Tensor | None = None
    ) -> Tensor:
        y_BLD = self.attention(self.attention_norm(x_BLD), rotation, mask_B1LL)
        x_BLD = torch.add(x_BLD, self.dropout(y_BLD), alpha=self.multiplier)
        y_BLD = self.mlp(self.mlp_norm(x_BLD))
        return torch.add(x_BLD, self.dropout(y_BLD), alpha=self.multiplier)


class Transformer(nn.Module):
    """A language model of `config`, whose vocabulary and longest sequence must be known.

    Raises ValueError with one sentence where the config has problems.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config = config.resolved()
        self.sizes, self.scales = config.sizes, scales(config)
        self.embedding = Vocabulary(config)
        self.position = LearnedPosition(config) if config.position == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(self.sizes.num_layers))
        self.norm = make_norm(config)
        self.head = None if config.tie_embeddings else Vocabulary(config)

    def forward(
        self,
        tokens_BL: Tensor,
        targets_BL: Tensor | None = None,
        padding_mask_BL: Tensor | None = None,
        documents_BL: Tensor | None = None,
    ):
        """Logits, or each window's loss.

        Args: tokens (B, L) int64; targets (B, L) int64, -100 where there is none; padding_mask
        (B, L), True (or 1) for a real token, on either side. Outputs at padding mean nothing, so
        their targets must be -100. documents (B, L), integers: the number of the document that each
        token belongs to, nondecreasing along the row (another number begins a new document). Then a
        token attends to its own document alone, and positions count from the document's first token
        in the row: each document's outputs are those of it alone. Without documents a token attends
        to all before it. What either mask costs: attention.additive_mask.
        Returns, without targets: logits (B, L, V). With targets: losses (B,) fp32, each window's
        sum of cross-entropy in nats over its targets; with z_loss (losses, penalty), where penalty
        is a scalar, summed over all targets, for the training objective only.
        Raises ValueError for a sequence that is longer than a learned position table.
        """
        x_BLD = self._hidden(tokens_BL, padding_mask_BL, documents_BL)
        head = self.embedding if self.head is None else self.head
        return head(x_BLD) if targets_BL is None else head(x_BLD, targets_BL)

    def _hidden(
        self, tokens_BL: Tensor, padding_mask_BL: Tensor | None, documents_BL: Tensor | None
    ) -> Tensor:
        """(B, L) -> (B, L, D), what the head reads."""
        config, s = self.config, self.sizes
        starts_BL = None if documents_BL is None else document_starts(documents_BL)
        positions = positions_of(tokens_BL, padding_mask_BL, starts_BL)
        x_BLD = self.embedding(tokens_BL)
        turn = None
        if config.position == "rotary":
            turn = rotation(positions, s.head_dim, config.rope_theta)
        elif config.position == "sinusoidal":
            x_BLD = x_BLD * self.scales.sinusoidal  # sinusoids are of size 1
            x_BLD = x_BLD + sinusoids(positions, s.width).to(x_BLD.dtype)
        elif self.position is not None:
            if tokens_BL.shape[1] > s.max_sequence_length:
                raise ValueError(
                    f"{tokens_BL.shape[1]} tokens are more than the model's learned positions; "
                    f"give at most max_sequence_length = {s.max_sequence_length}."
                )
            x_BLD = x_BLD + self.position(positions)
        x_BLD = self.dropout(x_BLD)
        mask_B1LL = None
        if padding_mask_BL is not None or starts_BL is not None:
            mask_B1LL = additive_mask(visible_keys(padding_mask_BL, starts_BL), x_BLD.dtype)
        for block in self.blocks:
            if config.activation_checkpointing and torch.is_grad_enabled():
                x_BLD = checkpoint(block, x_BLD, turn, mask_B1LL, use_reentrant=False)
            else:
                x_BLD = block(x_BLD, turn, mask_B1LL)
        return self.norm(x_BLD)

    def muon_parameters(self) -> set[str]:
        """Names of the hidden matrices: all 2-D parameters but embedding, positions and head."""
        linear = (name for name, module in self.named_modules() if isinstance(module, Linear))
        return {f"{name}.weight" for name in linear}

    def optimizer_factors(self) -> dict[str, Factors]:
        """Multipliers of AdamW's settings by parameter name; see models/parametrization.py."""
        return factors(self.config)
