"""A block of a decoder as an inspection sees it: its parts, and what its heads read and return.

Invariant: outside of a context a block is as it was.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Block:
    """A block of ours.

    mixer, mlp: its modules, the second None if it has none; mixer_kind, mlp_kind: their names;
    num_heads: of the mixer, 0 if it doesn't average values by weights, or if a class doesn't return
    them. adds: the block adds what its mixer and its MLP return to the stream of residuals, and
    nothing else.
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


def changed(output: Any, edit: Callable[[Tensor], Tensor]) -> Any:
    """Return what a module returns, with its first tensor edited."""
    if not isinstance(output, tuple | list):
        return edit(output)
    items = [edit(output[0]), *output[1:]]
    return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)


def first_of(output: Any) -> Any:
    """Return the first tensor of what a module returned."""
    return output[0] if isinstance(output, tuple | list) else output


@contextmanager
def _replaced(mixer: Any, attend: Callable[..., Tensor]) -> Iterator[None]:
    """Let a mixer attend by this function."""
    mixer._attend = attend
    try:
        yield
    finally:
        del mixer._attend  # the method of its class is seen again
