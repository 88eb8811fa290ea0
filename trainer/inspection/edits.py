"""Places inside a decoder at which a forward pass can be read or changed.

    stream[0] -> mixer[0] (heads[0] inside) -> mlp[0] -> stream[1] -> ... -> stream[N] -> logits

Invariant: outside of `edited` a model is as it was; inside, a place without an edit computes the
same bits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from forescale.models.transformer import Transformer

Edit = Callable[[int, Tensor], Tensor]  # (layer, values) -> values to go on with


def _same(layer: int, values: Tensor) -> Tensor:
    return values


def blocks_of(model: Transformer) -> list[Any]:
    """Return the blocks, each with the modules mixer and mlp."""
    return [*model.blocks]


@contextmanager
def edited(
    model: Transformer,
    *,
    stream: Edit = _same,
    mixer: Edit = _same,
    mlp: Edit = _same,
    heads: Edit = _same,
) -> Iterator[None]:
    """Change a forward pass of a decoder.

    stream: of the residual stream (B, L, D), 0 before the first block, i + 1 after block i. mixer,
    mlp: of what the part of block i adds to the stream, before a norm that comes after it. heads:
    of the outputs of attention's heads in block i, (B, L, H, K); a mixer without heads has none.
    """
    with ExitStack() as stack:

        def hook(module: nn.Module, edit: Edit, layer: int) -> None:
            def after(module: nn.Module, inputs: Any, output: Any) -> Any:
                first, *rest = output if isinstance(output, tuple) else (output,)
                first = edit(layer, first)
                return (first, *rest) if rest else first

            stack.callback(module.register_forward_hook(after).remove)

        def before(module: nn.Module, inputs: Any) -> Any:
            return (stream(0, inputs[0]), *inputs[1:])

        stack.callback(blocks_of(model)[0].register_forward_pre_hook(before).remove)
        for i, block in enumerate(blocks_of(model)):
            hook(block, lambda layer, x: stream(layer + 1, x), i)
            hook(block.mixer, mixer, i)
            hook(block.mlp, mlp, i)
            if has_heads(block.mixer):
                attend = block.mixer._attend
                stack.enter_context(
                    _replaced(block.mixer, lambda *x, i=i, attend=attend: heads(i, attend(*x)))
                )
        yield


def has_heads(mixer: nn.Module) -> bool:
    """True for attention of any kind: its heads average values."""
    return hasattr(mixer, "_attend")


@contextmanager
def _replaced(mixer: Any, attend: Callable[..., Tensor]) -> Iterator[None]:
    """Let a mixer attend by this function."""
    mixer._attend = attend
    try:
        yield
    finally:
        del mixer._attend  # the method of its class is seen again


@contextmanager
def mapped(model: Transformer) -> Iterator[dict[int, Tensor]]:
    """Give attention's weights of the forward passes inside, by layer: (B, H, L, L), of queries and
    keys.

    They are read by averaging values that are the rows of an identity matrix, K columns at a time,
    with the mixer's own code: whatever a head sees, and by whatever score, its weights are these.
    """
    weights: dict[int, Tensor] = {}

    def reading(attend: Callable[..., Tensor], layer: int) -> Callable[..., Tensor]:
        def read(q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor:
            (B, L, G, K), pieces = v.shape, []
            for first in range(0, L, K):
                ones = torch.eye(L, device=v.device, dtype=v.dtype)[:, first : first + K]
                ones = nn.functional.pad(ones, (0, K - ones.shape[1]))
                pieces.append(attend(q, k, ones[None, :, None].expand(B, L, G, K), context))
            weights[layer] = torch.cat(pieces, -1)[..., :L].transpose(1, 2)
            return attend(q, k, v, context)

        return read

    with ExitStack() as stack:
        for i, block in enumerate(blocks_of(model)):
            if has_heads(block.mixer):
                stack.enter_context(_replaced(block.mixer, reading(block.mixer._attend, i)))
        yield weights


def token_losses(logits_BLV: Tensor, tokens_BL: Tensor) -> Tensor:
    """Return the loss of each token but the first, in nats: (B, L, V), (B, L) -> (B, L - 1)."""
    known = logits_BLV[:, :-1].float().log_softmax(-1)
    return -known.gather(-1, tokens_BL[:, 1:, None])[..., 0]


def in_parts(count: int, length: int, most_tokens: int = 4096) -> Sequence[slice]:
    """Return slices of `count` rows of so many tokens, each of at most `most_tokens` or one row."""
    step = max(1, most_tokens // length)
    return [slice(i, min(count, i + step)) for i in range(0, count, step)]
