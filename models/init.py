"""The initialisation of hidden matrices: normal, with the parametrisation's standard deviation.

See models/parametrization.py. Biases start at 0, norms at 1. Each module initialises its weights
in its constructor, because DeepSpeed's zero.Init partitions a module right after it is constructed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Product = Callable[[Tensor, Tensor], Tensor]


class Linear(nn.Linear):
    """nn.Linear, (..., in) -> (..., out), whose initial weights have standard deviation `std`.

    All hidden matrices, and nothing else, use this class: muon_parameters() relies on it.
    product: set where the product is made in another number format: it takes x and the weight, as
    torch.nn.functional.linear does.
    sum_of: set where ranks divide the inputs: it takes x, the weight and `product`, and returns the
    sum of the ranks' products, to which the bias is added once.
    """

    product: Product | None = None
    sum_of: Callable[[Tensor, Tensor, Product | None], Tensor] | None = None

    def __init__(self, num_in: int, num_out: int, bias: bool, std: float):
        self.std = std  # before nn.Linear's own constructor, which calls reset_parameters
        super().__init__(num_in, num_out, bias=bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the weights; called by the constructor of nn.Linear."""
        self.weight.normal_(0, self.std)
        if self.bias is not None:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        if self.sum_of is not None:
            y = self.sum_of(x, self.weight, self.product)
        elif self.product is not None:
            y = self.product(x, self.weight)
        else:
            return super().forward(x)
        return y if self.bias is None else y + self.bias


# torch.nn.init's own too: while one of them is in this mode, what it calls is not.
_DRAWS = (
    torch.Tensor.normal_,
    torch.Tensor.uniform_,
    nn.init.normal_,
    nn.init.uniform_,
    nn.init.kaiming_uniform_,
)


class Undrawn(TorchFunctionMode):
    """A context in which a module is built without random draws: where they would be are zeros.

    For a model whose weights are read from a checkpoint. A draw takes a core about 30 times as long
    as zeros do: ten minutes for 70e9 weights, which every rank draws.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _DRAWS:
            with torch.no_grad():
                return (args[0] if args else kwargs["tensor"]).zero_()
        return func(*args, **(kwargs or {}))
