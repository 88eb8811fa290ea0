"""The blocks of a decoder as an inspection sees them: of ours, and of any class of transformers.

Invariant: outside of a context a block is as it was.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from forescale.models.flops import layers_of
from forescale.models.hf.any_class import AnyModel
from forescale.models.transformer import Transformer

Decoder = Transformer | AnyModel
_TOLERANCE = 1e-5  # of two streams that should be equal
# Blocks of a class, as they are known after a forward pass alone.
_KNOWN: WeakKeyDictionary[nn.Module, list["Block"]] = WeakKeyDictionary()


class UnknownParts(ValueError):
    """The blocks of a class of transformers, or their parts, are not recognised."""


class Block:
    """A block of ours.

    mixer, mlp: its modules, the second None if it has none; mixer_kind, mlp_kind: their names;
    num_heads: of the mixer, 0 if it doesn't average values by weights. adds: the block adds what
    its mixer and its MLP return to the stream of residuals, and nothing else.
    """

    def __init__(self, module: Any, kinds: tuple[str, str]):
        self.module, self.mixer_kind, self.mlp_kind = module, *kinds
        self.mixer: Any = module.mixer
        self.mlp: Any = module.mlp
        self.num_heads: int = self.mixer.num_heads if hasattr(self.mixer, "_attend") else 0
        self.adds = True

    @contextmanager
    def heads_edited(self, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Change the outputs of the heads, (B, L, H, K)."""
        attend = self.mixer._attend
        with _replaced(self.mixer, lambda *x: edit(attend(*x))):
            yield

    @contextmanager
    def weights_read(self, keep: Callable[[Tensor], None]) -> Iterator[None]:
        """Give the weights of the heads in the forward passes inside to `keep`: (B, H, L, L).

        They are read by averaging values that are the rows of an identity matrix, K columns at a
        time, with the mixer's own code: whatever a head sees, and by whatever score, its weights
        are these.
        """
        attend = self.mixer._attend

        def read(q: Tensor, k: Tensor, v: Tensor, context: Any) -> Tensor:
            (B, L, G, K), pieces = v.shape, []
            for first in range(0, L, K):
                ones = torch.eye(L, device=v.device, dtype=v.dtype)[:, first : first + K]
                ones = nn.functional.pad(ones, (0, K - ones.shape[1]))
                pieces.append(attend(q, k, ones[None, :, None].expand(B, L, G, K), context))
            keep(torch.cat(pieces, -1)[..., :L].transpose(1, 2))
            output: Tensor = attend(q, k, v, context)
            return output

        with _replaced(self.mixer, read):
            yield


class ClassBlock(Block):
    """A block of a class of transformers. Its mixer is the first of its modules that returns a
    stream, its MLP the last; norms don't count."""

    def __init__(self, module: nn.Module, calls: dict[nn.Module, tuple[tuple, Any]]):
        x = calls[module][0][0]
        parts = [m for m in module.children() if _returns_stream(m, calls, x)]
        if not parts:
            raise UnknownParts(f"no part of its {type(module).__name__} could be recognised")
        parts.sort(key=[*calls].index)  # as they were called
        self.module, self.mixer = module, parts[0]
        self.mlp = parts[-1] if len(parts) > 1 else None
        self.mixer_kind = type(self.mixer).__name__
        self.mlp_kind = type(self.mlp).__name__ if self.mlp else ""
        self.adds, self.num_heads = False, 0
        weights, returned = _weights(calls[self.mixer][1]), _first(calls[self.mixer][1])
        for part in self.mixer.modules():  # the matrix behind the heads
            is_last = part in calls and torch.equal(_first(calls[part][1]), returned)
            if weights is not None and is_last and getattr(part, "weight", None) is not None:
                self.num_heads, self.behind_heads = weights.shape[1], part

    @contextmanager
    def heads_edited(self, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
        def before(module: nn.Module, inputs: Any) -> Any:
            x = inputs[0]
            return edit(x.unflatten(-1, (self.num_heads, -1))).reshape(x.shape), *inputs[1:]

        with self.behind_heads.register_forward_pre_hook(before):
            yield

    @contextmanager
    def weights_read(self, keep: Callable[[Tensor], None]) -> Iterator[None]:
        """As of a block of ours; they are those that the class returns itself."""
        with self.mixer.register_forward_hook(lambda m, x, output: keep(_weights(output))):
            yield


def blocks_of(model: Decoder) -> list[Block]:
    """Return the blocks, first to last. Raises UnknownParts for a class of transformers whose
    blocks are not recognised."""
    if isinstance(model, Transformer):
        kinds = [(layer.mixer.kind, layer.mlp.kind) for layer in layers_of(model.config)]
        return [Block(block, names) for block, names in zip(model.blocks, kinds, strict=True)]
    if model not in _KNOWN:
        _KNOWN[model] = _of_class(model)
    return _KNOWN[model]


@torch.no_grad()
def _of_class(model: AnyModel) -> list[Block]:
    """Return the blocks of a class. No class says which they are and what they add, so both are
    tried."""
    inner = model.inner
    inner.set_attn_implementation("eager")  # the one that returns its weights
    count = inner.config.get_text_config().num_hidden_layers
    lists = [m for m in inner.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise UnknownParts(f"{type(inner).__name__} has no list of {count} blocks")
    tokens_1L = torch.arange(3, 24, 3, device=next(model.parameters()).device)[None]
    calls: dict[nn.Module, tuple[tuple, Any]] = {}

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls[module] = args or tuple(kwargs.values()), output

    def silenced(module: nn.Module, args: tuple, output: Any) -> Any:
        return changed(output, torch.zeros_like)

    modules = [*lists[0]]
    with ExitStack() as stack:
        for module in (m for block in modules for m in block.modules()):
            stack.enter_context(module.register_forward_hook(keep, with_kwargs=True))
        model(tokens_1L)
    blocks = [ClassBlock(module, calls) for module in modules]
    with ExitStack() as stack:
        for block in blocks:
            for part in filter(None, (block.mixer, block.mlp)):
                stack.enter_context(part.register_forward_hook(silenced))
            stack.enter_context(block.module.register_forward_hook(keep, with_kwargs=True))
        model(tokens_1L)
    for block in blocks:
        (x, *_), output = calls[block.module]
        is_same = torch.allclose(x, _first(output), atol=_TOLERANCE, rtol=_TOLERANCE)
        block.adds = is_same and bool(x.any())  # behind a block that doesn't, all is 0
    return [*blocks]


def changed(output: Any, edit: Callable[[Tensor], Tensor]) -> Any:
    """Return what a module returns, with its first tensor edited."""
    first, *rest = output if isinstance(output, tuple) else (output,)
    return (edit(first), *rest) if rest else edit(first)


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _weights(output: Any) -> Any:
    """Return the weights of attention, (B, H, L, L), of what a module returned; None: none."""
    rest = output[1:] if isinstance(output, tuple) else ()
    maps = (x for x in rest if isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] == x.shape[3])
    return next(maps, None)


def _returns_stream(module: nn.Module, calls: dict[nn.Module, tuple[tuple, Any]], x: Any) -> bool:
    """True if a part of a block changes the stream, and more than a norm does."""
    if module not in calls or "norm" in type(module).__name__.lower():
        return False
    output, matrices = _first(calls[module][1]), (p.dim() > 1 for p in module.parameters())
    return isinstance(output, Tensor) and output.shape == x.shape and any(matrices)


@contextmanager
def _replaced(mixer: Any, attend: Callable[..., Tensor]) -> Iterator[None]:
    """Let a mixer attend by this function."""
    mixer._attend = attend
    try:
        yield
    finally:
        del mixer._attend  # the method of its class is seen again
