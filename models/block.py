"""A block of the transformer, made of the modules that its cost records name, and its mixer's view.

Invariant: a block knows no mixer and no MLP by name.
"""

import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from forescale.models.config import ModelConfig
from forescale.models.experts.balance import Routing
from forescale.models.flops import layers_of, parts_of
from forescale.models.mixers.context import Columns, Context, Viewer
from forescale.models.norm import make_norm
from forescale.models.parametrization import scales


def named(dotted: str) -> Any:
    """Import and return the class or function of a cost record."""
    module, _, name = dotted.rpartition(".")
    return getattr(importlib.import_module(module), name)


def no_view(columns: Columns) -> None:
    """The viewer of mixers that need no view."""


def viewers(config: ModelConfig) -> list[Viewer]:
    """Return what makes the view of each layer; layers that share a view have the same."""
    made: dict[tuple[str, int], Any] = {}
    found = []
    for i, parts in enumerate(layers_of(config)):
        mixer = parts["mixer"]
        key = mixer.viewer, i if mixer.varies(config) else 0
        if key not in made:
            made[key] = named(mixer.viewer)(config, i) if mixer.viewer else no_view
        found.append(made[key])
    return found


class Block(nn.Module):
    """(B, L, D) -> (B, L, D): mixer and MLP, each with its norms, added to the residual stream.

    pre: x + f(norm(x)). post: x + norm(f(x)), as OLMo 2. sandwich: x + norm(f(norm(x))), as Gemma.
    residual: norm(x + f(x)), as Vaswani et al. 2017 and BERT: the stream itself is normed.
    In the decoder of an encoder-decoder, attention to the encoder's output comes between the two,
    and the encoder's last block ends with a norm, unless the stream is normed.

    With experts (is_routed) it returns the Routing too: as an output, because what is computed
    again for the backward pass then counts once. The first layer of a value residual (gives_values)
    returns its values before that.
    """

    def __init__(self, config: ModelConfig, layer: int = 0):
        super().__init__()
        parts, is_last = parts_of(config, layer), layer == config.encoder_layers - 1
        config = config.of_block(layer)
        self.divided = {name: part.divided(config) for name, part in parts.items()}
        self.heads = {name: part.heads for name, part in parts.items()}
        before, after = config.norms_before, config.norms_after
        self.mixer_norm = make_norm(config) if before else None
        self.mixer = named(parts["mixer"].module)(config)
        self.mixer_post_norm = make_norm(config) if after else None
        self.cross_norm = self.cross = self.cross_post_norm = None
        if "cross" in parts:
            self.cross_norm = make_norm(config) if before else None
            self.cross = named(parts["cross"].module)(config)
            self.cross_post_norm = make_norm(config) if after else None
        self.mlp_norm = make_norm(config) if before else None
        self.mlp = named(parts["mlp"].module)(config)
        self.mlp_post_norm = make_norm(config) if after else None
        self.is_routed = parts["mlp"].is_routed
        self.gives_values = bool(config.value_residual) and layer == 0
        self.output_norm = make_norm(config) if is_last and config.norms_stream else None
        self.norms_sum = config.norm_placement == "residual"
        self.dropout = nn.Dropout(config.dropout)
        self.multiplier = scales(config).residual

    def forward(self, x_BLD: Tensor, *context: Any) -> Any:
        """Return the output of the block. context: the fields of a Context, as separate arguments.

        Activation checkpointing tracks only tensors that are direct arguments.
        """
        own, more = Context(*context), []
        y_BLD = self.mixer(normed(self.mixer_norm, x_BLD), own)
        if self.gives_values:
            y_BLD, *more = y_BLD
        x_BLD = self._add(x_BLD, y_BLD, self.mixer_post_norm)
        if self.cross is not None:
            y_BLD = self.cross(normed(self.cross_norm, x_BLD), own)
            x_BLD = self._add(x_BLD, y_BLD, self.cross_post_norm)
        y_BLD = normed(self.mlp_norm, x_BLD)
        if self.is_routed:
            y_BLD, routing = self.mlp(y_BLD, own.counted, own.group)
            more = [*more, *routing]
        else:
            y_BLD = self.mlp(y_BLD)
        x_BLD = self._add(x_BLD, y_BLD, self.mlp_post_norm)
        x_BLD = normed(self.output_norm, x_BLD)
        return (x_BLD, *more) if more else x_BLD

    def _add(self, x_BLD: Tensor, y_BLD: Tensor, norm: nn.Module | None) -> Tensor:
        """Return the stream after a part's output y, with the norm that comes after, if any."""
        y_BLD = y_BLD if self.norms_sum else normed(norm, y_BLD)
        x_BLD = torch.add(x_BLD, self.dropout(y_BLD), alpha=self.multiplier)
        return normed(norm, x_BLD) if self.norms_sum else x_BLD


class Trunk(NamedTuple):
    """What the blocks leave: the hidden states (B, L, D), as the head reads them, and the routing
    of the experts; of a decoder or encoder alone also the embeddings (B, L, D), and the context of
    the last block."""

    hidden: Tensor
    routings: list[Routing]
    embedded: Tensor | None = None
    context: Context | None = None


def passed(
    block: nn.Module, x_BLD: Tensor, context: Context, recomputes: bool
) -> tuple[Tensor, Tensor | None, list[Routing]]:
    """Return the output of a block, its values if it gives them, and its Routing if it has experts.

    recomputes: keep only the input in training, and compute the rest again in the backward pass.
    """
    if recomputes and context.memory is None and torch.is_grad_enabled():
        out = checkpoint(block, x_BLD, *context, use_reentrant=False)
    else:
        out = block(x_BLD, *context)
    x_BLD, *more = out if isinstance(out, tuple) else (out,)
    values = more.pop(0) if block.gives_values else None
    return x_BLD, values, [Routing(*more)] if block.is_routed else []


def normed(norm: nn.Module | None, x_BLD: Tensor) -> Tensor:
    """Return norm(x), or x where there is no norm."""
    return x_BLD if norm is None else norm(x_BLD)
