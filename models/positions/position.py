"""Position encodings: rotary, sinusoidal, learned.

Rotary and sinusoidal tables are computed in fp32 from the positions in every forward pass, not kept
as buffers. So no table must be saved, can be cast to bf16 by accident, or limits the length; the
cost is one row per position. Positions count from the first real token of a row, or of each
document if documents are given, so padding and earlier documents have no effect.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forescale.models.config import ModelConfig
from forescale.models.parametrization import scales
from forescale.models.positions.rope_scaling import frequencies

Rotation = tuple[Tensor, Tensor]  # cos and sin, each (L, 1, R/2) or (B, L, 1, R/2)


def document_starts(documents_BL: Tensor) -> Tensor:
    """Return the column at which each token's document begins, (B, L) int64.

    A document begins in the first column, and wherever the document number changes.
    """
    columns_L = torch.arange(documents_BL.shape[1], device=documents_BL.device)
    begins_BL = F.pad(
        documents_BL.diff(dim=-1).ne(0), (1, 0)
    )  # the first document begins at column 0
    return torch.where(begins_BL, columns_L, 0).cummax(-1).values


def positions_of(
    length: int,
    device: torch.device,
    padding_mask_BL: Tensor | None = None,
    starts_BL: Tensor | None = None,
) -> Tensor:
    """Return positions (L,); (B, L) with a padding mask (True: real token) or document starts."""
    if padding_mask_BL is None:
        columns_L = torch.arange(length, device=device)
        return columns_L if starts_BL is None else columns_L - starts_BL
    real_BL = padding_mask_BL.long()
    before_BL = real_BL.cumsum(-1) - real_BL  # number of real tokens before each token
    if starts_BL is not None:
        before_BL = before_BL - before_BL.gather(-1, starts_BL)
    return before_BL


def rotation(
    positions: Tensor,
    config: ModelConfig,
    constants: dict[str, Any] | None = None,
    theta: float | None = None,
) -> Rotation:
    """Return the rotation at each position: (...) -> cos, sin, each (..., 1, R/2), fp32, where R is
    config.rotary_width. constants: where decoding keeps the frequencies from token to token. theta:
    a base without scaling, instead of the config's."""
    cached = {} if constants is None else constants
    if "frequencies" not in cached:
        cached["frequencies"] = frequencies(config, positions.device, theta)
    by, length = cached["frequencies"]
    angles = (positions[..., None].float() * by)[..., None, :]
    turn = angles.cos(), angles.sin()
    return turn if length == 1 else (turn[0] * length, turn[1] * length)


def rotate(x_BLHK: Tensor, by: Rotation) -> Tensor:
    """Rotate each head, (B, L, H, K) -> (B, L, H, K); coordinate i is paired with i + R/2, where R
    is the width that rotates: the first coordinates; the rest stay as they are.

    Su et al. 2021 (arXiv 2104.09864), in the pairing of GPT-NeoX and of Llama in transformers.
    """
    cos, sin = by
    turning, still = x_BLHK.tensor_split([2 * cos.shape[-1]], dim=-1)
    a, b = turning.float().chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_BLHK.dtype)
    return torch.cat((turned, still), -1) if still.shape[-1] else turned


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """Return (...) -> (..., width), fp32: sine and cosine in turns (Vaswani et al. 2017, 3.5)."""
    even = torch.arange(0, width, 2, dtype=torch.float32, device=positions.device)
    angles = positions[..., None].float() * (1.0 / 10_000.0 ** (even / width))
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-2)


class LearnedPosition(nn.Module):
    """A learned vector for each position: (L,) or (B, L) -> (..., D)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        s = config.sizes
        self.weight = nn.Parameter(torch.empty(s.max_sequence_length, s.width))
        nn.init.normal_(self.weight, 0, scales(config).table_std)

    def forward(self, positions: Tensor) -> Tensor:
        return F.embedding(positions, self.weight)
