"""What the heads of attention do, from their weights alone; and the same of mixers without heads.

Invariant: every number is a mean over queries that have a choice: the first token, which sees
itself alone, counts nowhere.
"""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forescale.inspection.block import first_of
from forescale.inspection.blocks import Decoder, blocks_of
from forescale.inspection.edits import edited, mapped, token_losses

IS_INDUCTION = 0.3  # mean weight from which a head is marked
_PROBES = 8  # random directions that estimate an influence


@dataclass(frozen=True)
class Head:
    """Means over queries. entropy: of the weights, in bits; distance: tokens back, by weight;
    previous, first: weights of the token before and of the first one; induction: on random tokens
    read twice, the weight of the token behind the earlier copy (Olsson et al. 2022, arXiv
    2209.11895)."""

    entropy: float
    distance: float
    previous: float
    first: float
    induction: float

    @property
    def is_induction(self) -> bool:
        """True if the head looks for what followed the token before."""
        return self.induction >= IS_INDUCTION


@dataclass(frozen=True)
class Copying:
    """The mean loss of so many random tokens, in nats, as they are read first and again."""

    tokens: int
    first: float
    again: float


@torch.no_grad()
def maps_of(model: Decoder, tokens_L: Tensor) -> dict[int, Tensor]:
    """Return the weights of each layer with heads, (H, L, L)."""
    with mapped(model) as maps:
        model(tokens_L[None])
    return {layer: weights[0].float() for layer, weights in maps.items()}


def describe(maps: dict[int, Tensor], repeated: dict[int, Tensor]) -> dict[int, list[Head]]:
    """Return the heads of each layer. maps, repeated: their weights on a text, and on random tokens
    read twice after a first token (repeated_tokens)."""
    heads = {}
    for layer, weights_HLL in maps.items():
        length = weights_HLL.shape[1]
        back_LL = torch.arange(length)[:, None] - torch.arange(length)
        rows_HLL = weights_HLL[:, 1:]
        entropy = torch.special.entr(rows_HLL).sum(-1).mean(-1) / math.log(2)
        distance = (rows_HLL * back_LL[1:].to(rows_HLL)).sum(-1).mean(-1)
        previous = weights_HLL.diagonal(-1, 1, 2).mean(-1)
        first = rows_HLL[:, :, 0].mean(-1)
        # Of the second copy of each token, the weight of the token after the first.
        n = (repeated[layer].shape[1] - 1) // 2
        queries = torch.arange(1 + n, 1 + 2 * n)
        induction = repeated[layer][:, queries, queries - n + 1].mean(-1)
        columns = (entropy, distance, previous, first, induction)
        heads[layer] = [Head(*map(float, row)) for row in zip(*columns, strict=True)]
    return heads


@torch.no_grad()
def copying(model: Decoder, repeated_L: Tensor) -> Copying:
    """Return the loss of random tokens read twice: a model that copies loses less again."""
    losses = token_losses(model(repeated_L[None]), repeated_L[None])[0]
    half = len(losses) // 2
    return Copying(half, float(losses[:half].mean()), float(losses[half:].mean()))


def influences_of(model: Decoder, tokens_L: Tensor, seed: int = 0) -> dict[int, Tensor]:
    """Return for each mixer without heads how much its output at a token depends on its input at
    another, (L, L), each row divided by its sum.

    That is the Frobenius norm of the Jacobian's block, estimated with random directions (Hutchinson
    1989): such a mixer has no weights to show.
    """
    inputs: dict[nn.Module, tuple[tuple, dict[str, Any]]] = {}
    mixers = {i: block.mixer for i, block in enumerate(blocks_of(model)) if not block.num_heads}

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        inputs[module] = args, kwargs

    with ExitStack() as stack:
        for mixer in mixers.values():
            stack.enter_context(mixer.register_forward_pre_hook(keep, with_kwargs=True))
        with torch.no_grad():
            model(tokens_L[None])
    return {i: _influence(mixer, *inputs[mixer], seed) for i, mixer in mixers.items()}


@torch.enable_grad()
def _influence(mixer: nn.Module, args: tuple, kwargs: dict[str, Any], seed: int) -> Tensor:
    x_1LD = (args or tuple(kwargs.values()))[0].detach().requires_grad_()
    name = next(iter(kwargs), "")
    y = mixer(x_1LD, *args[1:], **kwargs) if args else mixer(**kwargs | {name: x_1LD})
    y_LD = first_of(y)[0]
    length, width = y_LD.shape
    generator = torch.Generator().manual_seed(seed)
    squares_LL = torch.zeros(length, length)
    for _ in range(_PROBES):
        direction_D = torch.randn(width, generator=generator).to(y_LD)
        for i in range(length):
            (gradient_1LD,) = torch.autograd.grad(y_LD[i] @ direction_D, x_1LD, retain_graph=True)
            squares_LL[i] += gradient_1LD[0].square().sum(-1).float().cpu()
    sizes_LL = (squares_LL / _PROBES).sqrt()
    return sizes_LL / sizes_LL.sum(-1, keepdim=True).clamp(min=1e-12)


@torch.no_grad()
def lens(model: Decoder, tokens_L: Tensor) -> Tensor:
    """Return what the head would say of the stream after each block, (layers + 1, L, V) logits: the
    logit lens (nostalgebraist 2020). 0 is the embedding. Each stream goes on from behind the last
    block, through whatever norms and head the model has there."""
    streams: list[Tensor] = []

    def keep(layer: int, values: Tensor) -> Tensor:
        streams.append(values)
        return values

    with edited(model, stream=keep):
        model(tokens_L[None])
    rows_NLD, last = torch.cat(streams), len(streams) - 1
    with edited(model, stream=lambda layer, values: rows_NLD if layer == last else values):
        logits_NLV: Tensor = model(tokens_L.expand(len(rows_NLD), -1))
    return logits_NLV.float()
