"""How every hidden matrix begins: normal, with the standard deviation that the parametrisation
(models/parametrization.py) has for it. Biases start at 0, norms at 1.

Each module draws its own weights while it is constructed: a module that DeepSpeed's zero.Init
splits on construction is then already right.
"""

import torch
from torch import nn


class Linear(nn.Linear):
    """nn.Linear, (..., in) -> (..., out), whose weights begin with standard deviation `std`.

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
