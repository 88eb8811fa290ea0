"""Places inside a decoder at which a forward pass can be read or changed.

    stream[0] -> mixer[0] (heads[0] inside) -> mlp[0] -> stream[1] -> ... -> stream[N] -> logits

Invariant: outside of `edited` a model is as it was; inside, a place without an edit computes the
same bits.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from forescale.inspection.block import changed
from forescale.inspection.blocks import Decoder, blocks_of

Edit = Callable[[int, Tensor], Tensor]  # (layer, values) -> values to go on with


def _same(layer: int, values: Tensor) -> Tensor:
    return values


@contextmanager
def edited(
    model: Decoder,
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
                return changed(output, partial(edit, layer))

            stack.callback(module.register_forward_hook(after).remove)

        def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
            if args:
                return (stream(0, args[0]), *args[1:]), kwargs
            (name, x), *_ = kwargs.items()
            return args, kwargs | {name: stream(0, x)}

        blocks = blocks_of(model)
        first = blocks[0].module.register_forward_pre_hook(before, with_kwargs=True)
        stack.callback(first.remove)
        for i, block in enumerate(blocks):
            hook(block.module, lambda layer, x: stream(layer + 1, x), i)
            hook(block.mixer, mixer, i)
            if block.mlp is not None:
                hook(block.mlp, mlp, i)
            if block.num_heads and heads is not _same:
                stack.enter_context(block.heads_edited(partial(heads, i)))
        yield


@contextmanager
def mapped(model: Decoder) -> Iterator[dict[int, Tensor]]:
    """Give attention's weights of the forward passes inside, by layer: (B, H, L, L), of queries and
    keys."""
    weights: dict[int, Tensor] = {}
    with ExitStack() as stack:
        for i, block in enumerate(blocks_of(model)):
            if block.num_heads:
                stack.enter_context(block.weights_read(partial(weights.__setitem__, i)))
        yield weights


def token_losses(logits_BLV: Tensor, tokens_BL: Tensor) -> Tensor:
    """Return the loss of each token but the first, in nats: (B, L, V), (B, L) -> (B, L - 1)."""
    known = logits_BLV[:, :-1].float().log_softmax(-1)
    return -known.gather(-1, tokens_BL[:, 1:, None])[..., 0]


def in_parts(count: int, length: int, most_tokens: int = 4096) -> Sequence[slice]:
    """Return slices of `count` rows of so many tokens, each of at most `most_tokens` or one row."""
    step = max(1, most_tokens // length)
    return [slice(i, min(count, i + step)) for i in range(0, count, step)]
