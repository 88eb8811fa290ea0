"""Frequencies of rotary positions for contexts longer than the model was trained for.

Invariant: frequencies depend on the config alone and not on the sequence, so a token's outputs
don't depend on what follows it. That excludes the "dynamic" NTK of transformers, whose base grows
with the length of the sequence. Without scaling the frequencies are the original ones, bit for bit.
"""

import math

import torch
from torch import Tensor

from forescale.models.config import ModelConfig
from forescale.models.positions.kinds import Linear, Llama3, Ntk, Rotary, Yarn

BETA_FAST, BETA_SLOW = 32, 1  # YaRN, section 3.2: rotations within the original length
MOST, LEAST = 4, 1  # the same of llama3: high_freq_factor and low_freq_factor in Llama 3.1 to 3.3


def frequencies(
    config: ModelConfig, device: torch.device, theta: float | None = None
) -> tuple[Tensor, float]:
    """Return the angle per position of each pair, (K/2,) fp32, and the factor of cosine and sine.
    theta: a base without scaling, instead of the config's.

    `none`: theta^(-2i/K), and 1 (Su et al. 2021, arXiv 2104.09864).
    `linear`: divided by the factor (Chen et al. 2023, arXiv 2306.15595).
    `ntk`: the same with theta * factor^(K / (K - 2)), so that the lowest frequency is divided by
    the factor and the highest stays (bloc97's NTK-aware scaling; Peng et al. 2023, arXiv
    2309.00071, definition 1).
    `yarn`: frequencies are divided by the factor if they rotate less than once within the original
    length, kept if more than 32 times, and blended in between (2309.00071, section 3.2); scores
    grow by (0.1 ln(factor) + 1)^2, the two factors of queries and keys (equation 22). Doubt: the
    paper blends linearly in the number of rotations; the authors' code and transformers blend
    linearly in i, between whole numbers. We do as they do, because exports must compute the same.
    `llama3`: frequencies are divided by the factor below 1 rotation within the original length,
    kept above 4, and blended linearly in the number of rotations in between; no factor of scores
    (Meta's code of Llama 3.1, apply_scaling; without a paper that states it).
    """
    size = config.rotary_width
    position = _rotary(config)
    scaling = position.scaling
    base = ntk_theta(config) if isinstance(scaling, Ntk) else position.theta
    even = torch.arange(0, size, 2, dtype=torch.float32, device=device)
    plain = 1.0 / (base if theta is None else theta) ** (even / size)
    if theta is not None:
        return plain, 1.0
    if isinstance(scaling, Linear):
        return plain / scaling.factor, 1.0
    if isinstance(scaling, Llama3):
        rotations = scaling.original(config) / (2 * math.pi / plain)
        share = ((rotations - LEAST) / (MOST - LEAST)).clamp(0, 1)
        return (1 - share) * plain / scaling.factor + share * plain, 1.0
    if not isinstance(scaling, Yarn):
        return plain, 1.0
    low, high = (_pair(config, scaling, rotations) for rotations in (BETA_FAST, BETA_SLOW))
    first, last = max(math.floor(low), 0), min(math.ceil(high), size - 1)
    width = last - first or 0.001  # as in transformers: no division by zero
    scaled = ((even / 2 - first) / width).clamp(0, 1)  # the part of each pair that is divided
    divided = plain / scaling.factor * scaled
    return divided + plain * (1 - scaled), yarn_attention(scaling.factor)


def _rotary(config: ModelConfig) -> Rotary:
    assert isinstance(config.position, Rotary)
    return config.position


def ntk_theta(config: ModelConfig) -> float:
    """Return the base of `ntk`; rotary positions with this base and no scaling are the same."""
    size, position = config.rotary_width, _rotary(config)
    assert isinstance(position.scaling, Ntk)
    return position.theta * position.scaling.factor ** (size / (size - 2))


def yarn_attention(factor: float) -> float:
    """Return the factor of cosine and sine of `yarn` (Peng et al. 2023, equation 22)."""
    return 0.1 * math.log(factor) + 1


def _pair(config: ModelConfig, scaling: Yarn, rotations: float) -> float:
    """Return the index of the pair that rotates this often within the original length."""
    original, theta = scaling.original(config), _rotary(config).theta
    per_size = math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))
    return config.rotary_width * per_size
