"""How every matrix begins.

1. Weights are normal with standard deviation sqrt(2 / (5 * width)): the "small init" of Nguyen and
   Salazar 2019 (arXiv 1910.05895), which GPT-NeoX-20B trained with (arXiv 2204.06745).
   At width 1000 it is GPT-2's 0.02; unlike a constant it keeps the scale of activations at any
   width. `init_std` overrides it.
2. Matrices that write to the residual stream (attention and MLP output) start smaller by
   sqrt(2 * num_layers), so that the stream's variance does not grow with depth (GPT-2, Radford et
   al. 2019, section 2.3).
3. Biases start at 0, norms at 1.

Each module draws its own weights while it is constructed: a module that DeepSpeed's zero.Init
splits on construction is then already right.
"""

import math

import torch
from torch import nn

from models.config import ModelConfig


def weight_std(config: ModelConfig) -> float:
    """Rule 1."""
    return config.init_std or math.sqrt(2 / (5 * config.sizes.width))


def output_std(config: ModelConfig) -> float:
    """Rule 2."""
    return weight_std(config) / math.sqrt(2 * config.sizes.num_layers)


class Linear(nn.Linear):
    """nn.Linear, (..., in) -> (..., out), that begins by the rules above.

    The hidden matrices, and only they, are of this class: muon_parameters() counts on it.
    """

    def __init__(self, num_in: int, num_out: int, bias: bool, std: float):
        self.std = std  # before nn.Linear's own constructor, which calls reset_parameters
        super().__init__(num_in, num_out, bias=bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.weight.normal_(0, self.std)
        if self.bias is not None:
            self.bias.zero_()
