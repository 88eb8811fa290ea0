"""The blocks of a decoder, of ours or of a class of transformers, whose parts are known by a trial.

Invariant: a part has a number only where the trial shows that the number is that of the part.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from forescale.inspection.block import Block, changed, first_of
from forescale.models.flops import layers_of
from forescale.models.hf.any_class import AnyModel
from forescale.models.transformer import Transformer

Decoder = Transformer | AnyModel
Calls = dict[nn.Module, tuple[tuple, Any]]  # by module: its arguments and its output
_TOLERANCE = 1e-5  # of two streams that should be equal
# Blocks of a class, as they are known after a forward pass alone.
_KNOWN: WeakKeyDictionary[nn.Module, list[Block]] = WeakKeyDictionary()


class UnknownParts(ValueError):
    """The blocks of a class of transformers, or their parts, are not recognised."""


class ClassBlock(Block):
    """A block of a class of transformers. Of its modules that return a stream, but for norms, the
    mixer is the first that returns weights, or the first; the MLP is the last."""

    def __init__(self, module: nn.Module, calls: Calls):
        x = calls[module][0][0]
        parts = [m for m in module.children() if _returns_stream(m, calls, x)]
        if not parts:
            raise UnknownParts(f"no part of its {type(module).__name__} could be recognised")
        parts.sort(key=[*calls].index)  # as they were called
        attends = (part for part in parts if _weights(calls[part][1]) is not None)
        self.module, self.mixer = module, next(attends, parts[0])
        self.mlp = parts[-1] if parts[-1] is not self.mixer else None
        self.mixer_kind = type(self.mixer).__name__
        self.mlp_kind = type(self.mlp).__name__ if self.mlp else ""
        self.adds, self.num_heads = False, 0
        weights, returned = _weights(calls[self.mixer][1]), first_of(calls[self.mixer][1])
        for part in self.mixer.modules():  # the matrix behind the heads
            is_last = part in calls and torch.equal(first_of(calls[part][1]), returned)
            if weights is not None and is_last and _follow(calls[part][0][0], weights):
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


@torch.enable_grad()
def _of_class(model: AnyModel) -> list[Block]:
    """Return the blocks of a class. No class says which they are and what they add, so both are
    tried, on a few tokens. Its attention returns its weights from then on."""
    inner = model.inner
    inner.set_attn_implementation("eager")  # the one that returns its weights
    count = inner.config.get_text_config().num_hidden_layers
    lists = [m for m in inner.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    ids = 3 * torch.arange(min(7, model.sequence_length)) % model.tables()[0].num_embeddings
    row_1L = ids.to(next(model.parameters()).device)[None]
    try:
        calls, times = _calls(model, row_1L, lists)
        # Of images or sounds there may be a list too, which a text doesn't reach.
        modules = next(([*m] for m in lists if all(block in calls for block in m)), [])
        if not modules or max(times[block] for block in modules) > 1:
            raise UnknownParts(f"{type(inner).__name__} doesn't call {count} blocks, each once")
        blocks = [ClassBlock(module, calls) for module in modules]
        with torch.no_grad():
            _try_sums(model, row_1L, blocks)
            _try_rows(model, row_1L, blocks[-1])
    except UnknownParts:
        raise
    except Exception as e:  # of whatever the class does with it
        line = next(iter(str(e).splitlines()), "")[:200]
        problem = f"{type(inner).__name__} can't be tried ({type(e).__name__}: {line})"
        raise UnknownParts(problem) from e
    return [*blocks]


def _calls(
    model: AnyModel, row_1L: Tensor, lists: list[nn.ModuleList]
) -> tuple[Calls, Counter[nn.Module]]:
    """Return the calls of all modules in lists of blocks, with the graph of gradients, and how
    often each was called."""
    calls, times = Calls(), Counter[nn.Module]()

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls[module] = args or tuple(kwargs.values()), output
        times[module] += 1

    with ExitStack() as stack:
        for module in dict.fromkeys(m for blocks in lists for m in blocks.modules()):
            stack.enter_context(module.register_forward_hook(keep, with_kwargs=True))
        model(row_1L)
    return calls, times


def _try_sums(model: AnyModel, row_1L: Tensor, blocks: list["ClassBlock"]) -> None:
    """Set `adds` of the blocks that return their input where their parts return 0."""

    def silenced(module: nn.Module, args: tuple, output: Any) -> Any:
        return changed(output, torch.zeros_like)

    def compared(block: ClassBlock) -> Callable[..., Any]:
        def compare(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            x, y = (args or tuple(kwargs.values()))[0], first_of(output)
            block.adds = torch.allclose(x, y, atol=_TOLERANCE, rtol=_TOLERANCE)
            return changed(output, lambda _: x)  # whatever this one does, the next gets a stream

        return compare

    with ExitStack() as stack:
        for block in blocks:
            for part in filter(None, (block.mixer, block.mlp)):
                stack.enter_context(part.register_forward_hook(silenced))
            hook = block.module.register_forward_hook(compared(block), with_kwargs=True)
            stack.enter_context(hook)
        model(row_1L)


def _try_rows(model: AnyModel, row_1L: Tensor, last: Block) -> None:
    """Raise UnknownParts unless two rows whose streams change places behind the last block have
    each other's logits, whatever else the class keeps of a row."""
    rows_2L = torch.cat((row_1L, row_1L.flip(1)))
    logits = model(rows_2L)

    def swapped(module: nn.Module, args: tuple, output: Any) -> Any:
        return changed(output, lambda x: x.flip(0))

    with last.module.register_forward_hook(swapped):
        again = model(rows_2L)
    if not torch.allclose(again.flip(0), logits, atol=_TOLERANCE, rtol=_TOLERANCE * 10):
        raise UnknownParts(f"{type(model.inner).__name__} reads more than the last block's stream")


def _weights(output: Any) -> Any:
    """Return the weights of attention, (B, H, L, L), of what a module returned; None: none."""
    rest = output[1:] if isinstance(output, tuple | list) else ()
    maps = (x for x in rest if isinstance(x, Tensor) and x.dim() == 4 and x.shape[2] == x.shape[3])
    return next(maps, None)


def _returns_stream(module: nn.Module, calls: Calls, x: Any) -> bool:
    """True if a part of a block changes the stream, and more than a norm does."""
    if module not in calls:
        return False
    output, matrices = first_of(calls[module][1]), (p.dim() > 1 for p in module.parameters())
    return isinstance(output, Tensor) and output.shape == x.shape and any(matrices)


def _follow(heads: Any, weights: Tensor) -> bool:
    """True if of the columns of a module's input, divided among the heads, each head's depend on
    its own weights alone: else they are no outputs of heads."""
    count = weights.shape[1]
    if not isinstance(heads, Tensor) or heads.shape[-1] % count or not weights.requires_grad:
        return False
    heads = heads.unflatten(-1, (count, -1))
    for i in range(count):
        # A sum alone could have a gradient of 0, as a norm's has.
        probe = torch.linspace(-1, 2, heads[..., i, :].numel()).view_as(heads[..., i, :])
        output = (heads[..., i, :] * probe.to(heads)).sum()
        (g,) = torch.autograd.grad(output, weights, retain_graph=True, allow_unused=True)
        if g is None or [h for h in range(count) if g[:, h].any()] != [i]:
            return False
    return True
