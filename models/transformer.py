"""The decoder-only transformer: embedding, pre-norm blocks, and a head that is also the loss.

Invariant: a parameter is read only inside the forward method of the module that owns it, and every
module is used by calling it. ZeRO-3 gathers a module's parameters around its call, so this code
need not know that the weights are partitioned. A tied table is one module that is called twice.
"""

import importlib
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from forescale.models.attention import additive_mask, visible_keys
from forescale.models.config import ModelConfig
from forescale.models.costs import Part
from forescale.models.flops import parts_of
from forescale.models.init import Linear
from forescale.models.loss import window_losses
from forescale.models.norm import make_norm
from forescale.models.parametrization import Factors, factors, scales
from forescale.models.positions.alibi import biased_mask
from forescale.models.positions.position import (
    LearnedPosition,
    Rotation,
    document_starts,
    positions_of,
    rotation,
    sinusoids,
)


class Vocabulary(nn.Module):
    """A table (V, D) for embedding and logits, both by a call: a tied table is called twice.

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

    def forward(self, x: Tensor, targets_BL: Tensor | None = None) -> Any:
        if not x.is_floating_point():
            return F.embedding(x, self.weight)
        if self.multiplier != 1:
            x = x * self.multiplier  # not the logits, which are many more
        if targets_BL is None:
            return F.linear(x, self.weight)
        return window_losses(x, self.weight, targets_BL, self.chunk, self.z_loss)


class Context(NamedTuple):
    """The inputs of a mixer besides the hidden states, the same for all layers; None: absent.

    rotation: of queries and keys, with rotary positions. mask (B, 1, L, L): added to the scores, 0
    for a visible key, else -inf (attention.additive_mask); without it a token attends to itself and
    all earlier tokens. With alibi, which only mixers that take it receive, mask is (B or 1, H, L,
    L) and has a bias for a visible key (alibi.biased_mask).
    """

    rotation: Rotation | None = None
    mask: Tensor | None = None


def module_of(part: Part) -> type[nn.Module]:
    """Import and return the class of a part of a block."""
    module, _, name = part.module.rpartition(".")
    return getattr(importlib.import_module(module), name)


class Block(nn.Module):
    """(B, L, D) -> (B, L, D): mixer and MLP, each after a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        parts = parts_of(config)
        self.mixer_norm = make_norm(config)
        self.mixer = module_of(parts["mixer"])(config)
        self.mlp_norm = make_norm(config)
        self.mlp = module_of(parts["mlp"])(config)
        self.dropout = nn.Dropout(config.dropout)
        self.multiplier = scales(config).residual

    def forward(self, x_BLD: Tensor, *context: Any) -> Tensor:
        """Return the output of the block. context: the fields of a Context, as separate arguments.

        Activation checkpointing tracks only tensors that are direct arguments.
        """
        y_BLD = self.mixer(self.mixer_norm(x_BLD), Context(*context))
        x_BLD = torch.add(x_BLD, self.dropout(y_BLD), alpha=self.multiplier)
        y_BLD = self.mlp(self.mlp_norm(x_BLD))
        return torch.add(x_BLD, self.dropout(y_BLD), alpha=self.multiplier)


class Transformer(nn.Module):
    """A language model of `config`, whose vocabulary and longest sequence must be known.

    Raises ValueError with one sentence if the config has problems.
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
    ) -> Any:
        """Return logits, or the loss of each window.

        Args: tokens (B, L) int64; targets (B, L) int64, -100 for no target; padding_mask
        (B, L), True (or 1) for a real token, on either side. Outputs at padding are undefined, so
        their targets must be -100. documents (B, L), integers: the number of the document that each
        token belongs to, nondecreasing along the row (a change begins a new document). Then a
        token attends only to its own document, and positions count from the document's first token
        in the row, so each document has the same outputs as if it were alone. Without documents a
        token attends to all earlier tokens. For the cost of masks see attention.additive_mask.
        Returns, without targets: logits (B, L, V). With targets: losses (B,) fp32, each window's
        sum of cross-entropy in nats over its targets; with z_loss (losses, penalty), where penalty
        is a scalar, summed over all targets, for the training objective only.
        Raises ValueError if a sequence is longer than the learned position table.
        """
        x_BLD = self._hidden(tokens_BL, padding_mask_BL, documents_BL)
        head = self.embedding if self.head is None else self.head
        return head(x_BLD) if targets_BL is None else head(x_BLD, targets_BL)

    def _hidden(
        self, tokens_BL: Tensor, padding_mask_BL: Tensor | None, documents_BL: Tensor | None
    ) -> Tensor:
        """Return the input of the head: (B, L) -> (B, L, D)."""
        config, s = self.config, self.sizes
        starts_BL = None if documents_BL is None else document_starts(documents_BL)
        positions = positions_of(tokens_BL, padding_mask_BL, starts_BL)
        x_BLD = self.embedding(tokens_BL)
        turn = None
        if config.position == "rotary":
            turn = rotation(positions, config)
        elif config.position == "sinusoidal":
            x_BLD = x_BLD * self.scales.sinusoidal  # sinusoids have amplitude 1
            x_BLD = x_BLD + sinusoids(positions, s.width).to(x_BLD.dtype)
        elif self.position is not None:
            if tokens_BL.shape[1] > s.max_sequence_length:
                raise ValueError(
                    f"{tokens_BL.shape[1]} tokens are more than the model's learned positions; "
                    f"give at most max_sequence_length = {s.max_sequence_length}."
                )
            x_BLD = x_BLD + self.position(positions)
        x_BLD = self.dropout(x_BLD)
        seen_B1LL = mask = None
        if padding_mask_BL is not None or starts_BL is not None:
            seen_B1LL = visible_keys(padding_mask_BL, starts_BL)
        if config.position == "alibi":
            mask = biased_mask(positions, seen_B1LL, s.num_heads, x_BLD.dtype)
        elif seen_B1LL is not None:
            mask = additive_mask(seen_B1LL, x_BLD.dtype)
        context = Context(turn, mask)
        for block in self.blocks:
            if config.activation_checkpointing and torch.is_grad_enabled():
                x_BLD = checkpoint(block, x_BLD, *context, use_reentrant=False)
            else:
                x_BLD = block(x_BLD, *context)
        return self.norm(x_BLD)

    def muon_parameters(self) -> set[str]:
        """Return the names of the hidden matrices: all but embedding, positions and head."""
        linear = (name for name, module in self.named_modules() if isinstance(module, Linear))
        return {f"{name}.weight" for name in linear}

    def optimizer_factors(self) -> dict[str, Factors]:
        """Return multipliers of AdamW's settings by parameter name; see parametrization.py."""
        return factors(self.config)
