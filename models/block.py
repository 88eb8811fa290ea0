"""A block of the transformer, built of its parts' modules, and the view of its mixer.

Invariant: a block knows no mixer and no MLP by name.

Selective activation checkpointing keeps the results of matrices and of attention kernels, and makes
all else (norms, activation functions, rotations, sums) again in the backward pass: most of the
memory for little time. Products of batches, such as those inside Gated DeltaNet, are made again:
their results are larger than what they come from. So are those of an LSTM's gates, which torch
changes in place (CHANGES_PRODUCTS). So is attention with dropout: what is not
computed draws no random numbers, and the dropout after it would have another mask. What ranks
exchange inside of a block is exchanged again: as all ranks make the same again, they meet.

That checkpoint is inside of what is compiled: the compiler sees a block's operations, and decides
by the same policy. At ZeRO stage 3 it is inside of the hooks of a block, whose weights are there
when its backward pass makes the rest again.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from forescale.models.config import ModelConfig
from forescale.models.flops import parts_of
from forescale.models.mixers.context import CHANGES_PRODUCTS, Context, Viewer
from forescale.models.mlps.balance import Routing
from forescale.models.norms import make_norm
from forescale.models.parametrization import scales
from forescale.models.part import imported

# Names, because a build of torch has the kernels of its own devices.
_MATRICES = (
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_mm",  # of fp8
    "aten::_grouped_mm",
    "forescale::grouped_times",
)
_KERNELS = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "forescale::ring",
)


def viewers(config: ModelConfig) -> list[Viewer | None]:
    """Return what makes the view of each layer, the same for equal mixers; None: no view."""
    views = {m: partial(imported(m.viewer), m) if m.viewer else None for m in config.mixers_used}
    return [views[mixer] for mixer in config.mixers]


class Block(nn.Module):
    """(B, L, D) -> (B, L, D): mixer and MLP, each with its norms, added to the residual stream.

    pre: x + f(norm(x)). post: x + norm(f(x)), as OLMo 2. sandwich: x + norm(f(norm(x))), as Gemma.
    residual: norm(x + f(x)), as Vaswani et al. 2017 and BERT: the stream itself is normed.
    parallel: x + f(norm(x)) + g(norm'(x)), as GPT-NeoX; shared: with one norm, as Phi.
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
        self.mixer = parts.mixer.build(config)
        self.mixer_post_norm = make_norm(config) if after else None
        self.cross_norm = self.cross = self.cross_post_norm = None
        if parts.cross is not None:
            self.cross_norm = make_norm(config) if before else None
            self.cross = parts.cross.build(config)
            self.cross_post_norm = make_norm(config) if after else None
        self.is_parallel, shares = config.in_parallel, config.norm.placement == "shared"
        self.mlp_norm = make_norm(config) if before and not shares else None
        self.mlp = parts.mlp.build(config)
        self.mlp_post_norm = make_norm(config) if after else None
        self.is_routed = parts.mlp.is_routed
        self.gives_values = bool(parts.mixer.shared_values) and layer == 0
        self.output_norm = make_norm(config) if is_last and config.norms_stream else None
        self.norms_sum = config.norm.placement == "residual"
        self.dropout = nn.Dropout(config.dropout)
        self.multiplier = scales(config).residual
        self.is_selective = config.activation_checkpointing == "selective"
        self.drops = config.dropout > 0

    def forward(self, x_BLD: Tensor, *context: Any) -> Any:
        """Return the output of the block. context: the fields of a Context, as separate arguments.

        Activation checkpointing tracks only tensors that are direct arguments.
        """
        if self.is_selective and Context(*context).memory is None and torch.is_grad_enabled():
            return keeping_products(self._through, self.training and self.drops, x_BLD, *context)
        return self._through(x_BLD, *context)

    def _through(self, x_BLD: Tensor, *context: Any) -> Any:
        of_block, rest = Context(*context), []
        read_BLD = normed(self.mixer_norm, x_BLD)
        y_BLD = self.mixer(read_BLD, of_block)
        if self.is_parallel and self.mlp_norm is not None:
            read_BLD = self.mlp_norm(x_BLD)
        if self.gives_values:
            y_BLD, *rest = y_BLD
        x_BLD = self._add(x_BLD, y_BLD, self.mixer_post_norm)
        if self.cross is not None:
            y_BLD = self.cross(normed(self.cross_norm, x_BLD), of_block)
            x_BLD = self._add(x_BLD, y_BLD, self.cross_post_norm)
        y_BLD = read_BLD if self.is_parallel else normed(self.mlp_norm, x_BLD)
        if self.is_routed:
            y_BLD, routing = self.mlp(y_BLD, of_block.counted, of_block.group)
            rest = [*rest, *routing]
        else:
            y_BLD = self.mlp(y_BLD)
        x_BLD = self._add(x_BLD, y_BLD, self.mlp_post_norm)
        x_BLD = normed(self.output_norm, x_BLD)
        return (x_BLD, *rest) if rest else x_BLD

    def _add(self, x_BLD: Tensor, y_BLD: Tensor, norm: nn.Module | None) -> Tensor:
        """Return the stream after a part's output y, with the norm that comes after, if any."""
        y_BLD = y_BLD if self.norms_sum else normed(norm, y_BLD)
        y_BLD = self.dropout(y_BLD) if self.drops else y_BLD
        x_BLD = torch.add(x_BLD, y_BLD, alpha=self.multiplier)
        return normed(norm, x_BLD) if self.norms_sum else x_BLD


class Trunk(NamedTuple):
    """What the blocks leave: the hidden states (B, L, D), as the head reads them, and the routing
    of the experts; of a decoder or encoder alone also the embeddings (B, L, D), and the context of
    the last block. routed_before: layers with experts that other stages of a pipeline have before.
    """

    hidden: Tensor
    routings: list[Routing]
    embedded: Tensor | None = None
    context: Context | None = None
    routed_before: int = 0


class ResidualStream(NamedTuple):
    """What a part of a pipeline takes from the one before: the hidden states (B, L, D); and in a
    value residual the values of the first layer, (B, L, G, K)."""

    hidden: Tensor
    values: Tensor | None = None


class Place(NamedTuple):
    """A part of a model: its blocks (None: all), its input, and whether it is the last."""

    blocks: range | None = None
    stream: ResidualStream | None = None
    is_last: bool = True


WHOLE = Place()


def run_block(
    block: nn.Module, x_BLD: Tensor, context: Context, recomputes: bool
) -> tuple[Tensor, Tensor | None, list[Routing]]:
    """Return the output of a block, its values if it gives them, and its Routing if it has experts.

    recomputes: save only the input in training, and compute the rest again in the backward pass.
    """
    if recomputes and context.memory is None and torch.is_grad_enabled():
        out = checkpoint(block, x_BLD, *context, use_reentrant=False)
    else:
        out = block(x_BLD, *context)
    x_BLD, *rest = out if isinstance(out, tuple) else (out,)
    values = rest.pop(0) if block.gives_values else None
    return x_BLD, values, [Routing(*rest)] if block.is_routed else []


def normed(norm: nn.Module | None, x_BLD: Tensor) -> Tensor:
    """Return norm(x), or x where there is no norm."""
    return x_BLD if norm is None else norm(x_BLD)


@cache
def kept_operations(drops: bool) -> frozenset[Any]:
    """Return the operations whose results are saved; drops: attention has dropout."""
    names = _MATRICES if drops else (*_MATRICES, *_KERNELS)
    spaces = [(getattr(torch.ops, name.split("::")[0]), name.split("::")[1]) for name in names]
    operations = {getattr(space, name).default for space, name in spaces if hasattr(space, name)}
    return frozenset(operations if drops else {*operations, torch.ops.higher_order.flex_attention})


def _policy(operations: frozenset[Any]) -> Callable[..., CheckpointPolicy]:
    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operation in operations and not CHANGES_PRODUCTS.get():
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def contexts(drops: bool) -> tuple[Any, Any]:
    """Return the contexts of the forward pass and of what is made again, as torch's checkpoint
    takes them."""
    both: tuple[Any, Any] = create_selective_checkpoint_contexts(_policy(kept_operations(drops)))
    return both


def keeping_products(through: Callable[..., Any], drops: bool, *args: Any) -> Any:
    """Return through(*args), of which the backward pass makes all again but the products.

    Tensors of args count only where they are arguments themselves.
    """

    # A partial of a function of this file: a compiler takes no function that is defined here.
    both = partial(contexts, drops)
    return checkpoint(through, *args, use_reentrant=False, context_fn=both)
