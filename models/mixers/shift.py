"""The token before, mixed into queries, keys and values.

With it one layer can find what followed an earlier occurrence of a token, for which two layers are
needed otherwise: the key of a token has a part of the token before (Olsson et al. 2022, arXiv
2209.11895, "smeared keys"). Primer found it useful for all three (So et al. 2021, arXiv 2109.08668,
section 4, a depthwise convolution over 3 tokens). Doubt: here it reads 2.
"""

import torch
from torch import Tensor, nn

from forescale.models.mixers.context import Context, continued, earlier


class TokenShift(nn.Module):
    """(B, L, D) -> x + weight * (x of the token before), (B, L, D); the weight (D,) begins at 0.

    The first token of a row or of a document has none before it. name: of what a cache keeps.
    """

    def __init__(self, width: int, name: str):
        super().__init__()
        self.name = f"{name}_before"
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x_BLD: Tensor, context: Context) -> Tensor:
        memory, length = context.memory, x_BLD.shape[1]
        read_BLD = x_BLD if memory is None else memory.keep_last(self.name, x_BLD, 1)
        before_BLD = earlier(read_BLD, 1)[:, -length:]
        if context.starts is not None or context.real is not None:
            before_BLD = before_BLD * continued(x_BLD, context)[..., None]
        return torch.addcmul(x_BLD, self.weight, before_BLD)


def shifted(shift: nn.Module | None, x_BLD: Tensor, context: Context) -> Tensor:
    """Return shift(x, context), or x where there is no shift."""
    return x_BLD if shift is None else shift(x_BLD, context)
