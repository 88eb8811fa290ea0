"""The initialisation of hidden matrices: normal, with the parametrisation's standard deviation.

See models/parametrization.py. Biases start at 0, norms at 1. Each module initialises its weights
in its constructor, because DeepSpeed's zero.Init partitions a module right after it is constructed.
"""

import torch
from torch import nn


class Linear(nn.Linear):
    """nn.Linear, (..., in) -> (..., out), whose initial weights have standard deviation `std`.

    All hidden matrices, and nothing else, use this class: muon_parameters() relies on it.
    """

    def __init__(self, num_in: int, num_out: int, bias: bool, std: float):
        self.std = std  # before nn.Linear's own constructor, which calls reset_parameters
        super().__init__(num_in, num_out, bias=bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the weights; called by the constructor of nn.Linear."""
        self.weight.normal_(0, self.std)
        if self.bias is not None:
            self.bias.zero_()
